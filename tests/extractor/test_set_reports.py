"""What the registry hears of sets, and what keeps it from hearing."""

import asyncio
import errno
import json

import pytest

from fix_runner import documents
from headrace_extractor.extractions.reports import SetReports
from headrace_extractor.sets.activation_set import ActivationSet
from headrace_extractor.sets.spec import Retention

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def reports(extractor):
    extractions = extractor.extractions
    return SetReports(extractions.sets, extractions.keeper, extractor.registry, epoch=lambda: 1)


async def test_a_window_does_not_stand_for_the_retained_set_of_its_id(extractor, reports):
    extractor.add_corpus(documents(400, seed=1))
    kept = await extractor.extract(max_rows=500)
    await extractor.read(kept)
    window = await extractor.extract(retention=Retention(kind="window", window_bytes=2**20, reader_grace_s=30.0))
    await extractor.read(window)

    await reports.report(kept)
    await reports.report(window)

    assert window.value.set_id == kept.value.set_id
    held = extractor.registry.sets[kept.value.set_id]
    assert (held.retention, held.path) == ("RETAIN", str(kept.folder))
    assert json.loads(held.identity_json)["recipe"] == kept.value.spec.recipe.to_json()


async def test_a_set_that_goes_while_it_is_reported_is_gone(extractor, reports, monkeypatch):
    extractor.add_corpus(documents(20, seed=2))
    job = await extractor.extract()
    await extractor.read(job)
    await asyncio.wait([job.task])
    await reports.report(job)
    manifest = job.folder / "manifest.json"
    manifest.rename(job.folder / "was-there")
    monkeypatch.setattr(type(manifest), "exists", lambda path: True)

    await reports.report(job)

    assert job.value.set_id not in extractor.registry.sets


async def test_what_can_not_be_read_now_is_left_to_the_next_report(extractor, reports, monkeypatch, caplog):
    extractor.add_corpus(documents(20, seed=3))
    job = await extractor.extract()
    await extractor.read(job)

    def fail(*args, **kwargs):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(ActivationSet, "report", fail)
    await reports.report(job)

    assert "could not be reported" in caplog.text
