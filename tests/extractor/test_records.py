"""Small files beside the rows: a damaged one is set aside or counts as none, and is never a reason not to start."""

import json

import pytest

from headrace_extractor.extractions.records import Records
from headrace_extractor.sets.notes import NOTES_NAME, SetNotes


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"id": "x1"}', b"[" * 100_000, b"\xff"])
def test_a_record_that_can_not_be_read_is_set_aside_not_removed(tmp_path, content):
    (tmp_path / "x1.json").write_bytes(content)

    assert list(Records(tmp_path).load()) == []

    assert (tmp_path / "x1.unreadable").read_bytes() == content
    assert list(Records(tmp_path).load()) == []


def test_a_record_that_the_disk_does_not_give_stays_for_the_next_start(tmp_path):
    (tmp_path / "x1.json").mkdir()  # An OSError for any user.

    assert list(Records(tmp_path).load()) == []
    assert (tmp_path / "x1.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"[" * 100_000, b"\xff"])
def test_notes_that_can_not_be_read_count_as_none(tmp_path, content):
    (tmp_path / NOTES_NAME).write_bytes(content)

    assert SetNotes.load(tmp_path) == SetNotes()


def test_notes_of_a_later_version_keep_what_this_one_knows(tmp_path):
    (tmp_path / NOTES_NAME).write_text(json.dumps({"model_id": "m", "pinned": True, "colour": "blue"}))

    assert SetNotes.load(tmp_path) == SetNotes(model_id="m", pinned=True)
