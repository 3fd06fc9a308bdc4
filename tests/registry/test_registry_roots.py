from __future__ import annotations

import pytest

from headrace_registry.errors import FieldInvalid, PathNotAllowed
from headrace_registry.models.roots import ModelRoots


@pytest.fixture
def roots(tmp_path):
    for name in ("root", "outside"):
        (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "by-link").symlink_to(tmp_path / "root")
    return ModelRoots([tmp_path / "root"])


@pytest.mark.parametrize("path", ["root/link", "root/link/model", "by-link/link/model"])
def test_a_link_out_of_a_root_is_named_as_a_link_and_its_root_is_not_told_to_be_allowed(roots, tmp_path, path):
    with pytest.raises(PathNotAllowed, match=r"by a link.*for the folder that the link leads to") as caught:
        roots.folder(str(tmp_path / path), field="path")
    assert str(tmp_path / "root") not in caught.value.message.partition("--models-root")[2]


def test_a_path_outside_names_the_root_to_allow(roots, tmp_path):
    with pytest.raises(PathNotAllowed, match=f"--models-root {tmp_path / 'outside'}$"):
        roots.folder(str(tmp_path / "outside" / "model"), field="path")


def test_a_link_into_a_root_is_allowed(roots, tmp_path):
    assert roots.folder(str(tmp_path / "by-link" / "model"), field="path") == str(tmp_path / "root" / "model")


def test_a_path_that_the_system_does_not_follow_is_refused_by_its_field(roots, tmp_path):
    # Stands for a folder that may not be entered, which root may.
    path = str(tmp_path / "root" / ("x" * 300) / "model")
    for look in (roots.folder, roots.file):
        with pytest.raises(FieldInvalid, match="may not enter") as caught:
            look(path, field="path")
        assert caught.value.field == "path"
