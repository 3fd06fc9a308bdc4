"""Sets as other programs read them: SAELens' cached activations, and the folder itself."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fix_system import FAST, MODEL, PATIENCE_S, TOKEN, WIDTH, eventually, texts
from headrace_cli.app import app
from headrace_cli.commands.sets_export import extraction_of
from headrace_cli.settings import Defaults
from headrace_client.errors import InvalidArgument
from headrace_client.integrations.sae_lens_export import export_cached_activations
from headrace_client.values import Dtype

pytestmark = pytest.mark.timeout(240)

HOOKPOINTS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
CONTEXT = 16
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def extraction(system):
    corpus = system.variant(texts(200, seed=5))
    started = system.client.extractions.start(MODEL, corpus, HOOKPOINTS, recipe=FAST)
    return system.client.extractions.wait(started.id, deadline_s=PATIENCE_S)


def rows_of(system, extraction, columns):
    with system.client.activations(extraction, columns=columns, batch_size=1 << 20) as stream:
        return next(iter(stream))


def store_of(sae_lens, folder, hookpoint, n_prompts):
    """Opens SAELens' own store on a folder of cached activations."""
    from sae_lens.training.activations_store import ActivationsStore  # noqa: PLC0415 -- imports much

    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=hookpoint,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=WIDTH,
        n_batches_in_buffer=2,
        total_training_tokens=10_000,
        store_batch_size_prompts=n_prompts,
        train_batch_size_tokens=64,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder),
    )


def test_saelens_reads_every_context_of_every_hookpoint(system, extraction, tmp_path, sae_lens):
    done = export_cached_activations(
        system.client, extraction, tmp_path / "cached", context_size=CONTEXT, shard_bytes=200_000
    )
    rows = rows_of(system, extraction, [*HOOKPOINTS, "token_id", "document", "position"])
    aligned = torch.arange(len(rows["document"]))[: done.n_contexts * CONTEXT]

    for hookpoint in HOOKPOINTS:
        store = store_of(sae_lens, done.folder, hookpoint, done.n_contexts)
        acts, token_ids = store.get_raw_llm_batch()
        dataset = store.cached_activation_dataset.with_format("numpy")
        documents, positions = np.asarray(dataset["document"]), np.asarray(dataset["position"])

        assert acts.shape == (len(aligned), WIDTH)
        assert (documents == documents[:, :1]).all()
        assert (np.diff(positions, axis=1) == 1).all()
        keys = {
            key: row for row, key in enumerate(zip(rows["document"].tolist(), rows["position"].tolist(), strict=True))
        }
        at = [keys[key] for key in zip(documents.ravel().tolist(), positions.ravel().tolist(), strict=True)]
        assert torch.equal(acts, rows[hookpoint][at])
        assert torch.equal(token_ids.to(torch.int32), rows["token_id"][at])
    assert done.n_files > 1
    assert done.n_contexts * CONTEXT + done.n_rows_left_out == extraction.n_rows


def test_joined_documents_are_all_rows_in_order(system, extraction, tmp_path, sae_lens):
    done = export_cached_activations(
        system.client,
        extraction,
        tmp_path / "cached",
        hookpoints=HOOKPOINTS[1:],
        context_size=CONTEXT,
        join_documents=True,
    )
    acts, _ = store_of(sae_lens, done.folder, HOOKPOINTS[1], done.n_contexts).get_raw_llm_batch()
    rows = rows_of(system, extraction, [HOOKPOINTS[1]])

    assert done.n_rows_left_out < CONTEXT
    assert torch.equal(acts, rows[: len(acts)])


def test_the_command_exports_a_set_by_the_beginning_of_its_id(system, extraction, tmp_path):
    defaults = Defaults(registry=system.registry.address, token=TOKEN)
    # The node reports its sets every few seconds.
    eventually(lambda: extraction.set_id in {one.id for one in system.client.sets.list()}, "the set is listed")
    arguments = ["--json", "sets", "export", extraction.set_id[:12], str(tmp_path / "out"), "--to", "sae-lens"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, [*arguments, "--context-size", "8"], obj=defaults)

    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["hookpoints"] == HOOKPOINTS
    assert (tmp_path / "out" / "state.json").exists()


def test_the_whole_set_is_exported_although_less_of_it_was_asked_for_since(system, extraction):
    less = system.client.extractions.start(MODEL, extraction.corpus_id, HOOKPOINTS, recipe=FAST, max_rows=64)
    less = system.client.extractions.wait(less.id, deadline_s=PATIENCE_S)
    eventually(lambda: extraction.set_id in {one.id for one in system.client.sets.list()}, "the list knows")

    chosen = extraction_of(system.client, extraction.set_id[:12], HOOKPOINTS)

    assert less.set_id == extraction.set_id
    assert chosen.n_rows == extraction.n_rows > less.n_rows


def test_what_can_not_be_exported_leaves_nothing_behind(system, extraction, tmp_path):
    with pytest.raises(InvalidArgument, match="join_documents"):
        export_cached_activations(system.client, extraction, tmp_path / "cached", context_size=10_000)
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidArgument, match="there already"):
        export_cached_activations(system.client, extraction, tmp_path / "there")

    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_folder_is_read_without_headrace_as_the_page_says(system, extraction):
    page = (ROOT / "docs/sets-without-headrace.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"path_of_a_set": extraction.path, "hookpoint": HOOKPOINTS[0]}
    for block in blocks:
        exec(block, names)

    rows = rows_of(system, extraction, [HOOKPOINTS[0], "token_id", "document", "position"])
    assert torch.equal(names["activations"], rows[HOOKPOINTS[0]])
    for column in ("token_id", "document", "position"):
        assert torch.equal(names[column], rows[column])
    assert names["intact"] is True
    assert names["manifest"]["columns"][3]["dtype"] == Dtype.FLOAT32.value
