"""The kind of a build, told from the model's state and source."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from headrace_registry.models.builds import BuildKind, build_kind
from headrace_registry.models.models import Model, ModelState, Source, SourceKind

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (SourceKind.HUB, BuildKind.CONVERT_PICKLED),
        (SourceKind.GGUF, BuildKind.CONVERT_GGUF),
        (SourceKind.HUB, BuildKind.QUANTIZE),
        (SourceKind.FOLDER, BuildKind.QUANTIZE),
        (SourceKind.GGUF, BuildKind.QUANTIZE),
        (SourceKind.HUB, BuildKind.CONVERT_TOKENIZER),
    ],
)
def test_the_state_that_a_kind_of_build_brings_tells_the_kind(source, kind):
    model = Model(id="m", source=Source(kind=source, location="x"), create_time=NOW, update_time=NOW)

    folder = "/store/m-0123456789ab-tokenizer" if kind is BuildKind.CONVERT_TOKENIZER else "/store/m-0123456789ab"

    assert build_kind(replace(model, state=kind.state), folder) is kind


def test_only_quantizing_is_told_as_quantizing():
    assert {kind for kind in BuildKind if kind.state is ModelState.QUANTIZING} == {BuildKind.QUANTIZE}
