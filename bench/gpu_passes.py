"""Forward passes alone, in one process: `python -m bench.gpu_passes MODEL_FOLDER DEVICE JOB`, JOB as JSON.

Answers a question `{kind, n_hookpoints}` with the seconds of a pass over the job's text:

- `bare`: transformers' model, cut after the deepest layer, with a hook there; the rows are dropped on the device
- `dropped`: our forward passes with that many hookpoints; the rows are dropped on the device
- `staged`: the same, with rows copied to the host as in a runner, two batches in flight
- `waiting`: the same, but each batch is copied before the next begins
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from bench.gpu_models import Job
from bench.processes import answer, questions
from headrace_extractor.corpora.packing import Packer, SpecialTokens, TokenBatch
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.runner.hooks.binding import bind
from headrace_extractor.runner.passes.forward import DirectFetch, fetch_for, forward_rows


class Passes:
    """A model cut after the deepest layer, and its batches."""

    def __init__(self, files_path: str, device: str, job: Job) -> None:
        self._device = torch.device(device)
        self._job = job
        self._model = _cut(files_path, self._device, job)
        recipe = Recipe(context_size=job.context_size, batch_size=job.batch_size, bos="none")
        special = SpecialTokens(bos_id=None, eos_id=None)
        self._batches = list(Packer(list(job.token_ids(seed=0)), recipe, special).batches())

    def seconds(self, kind: str, n_hookpoints: int) -> float:
        """Returns the seconds of one pass over all batches."""
        run = {"bare": self._bare, "dropped": self._dropped, "staged": self._staged, "waiting": self._waiting}[kind]
        self._synchronize()
        began = time.perf_counter()
        run(self._job.hookpoints[-n_hookpoints:])
        self._synchronize()
        return time.perf_counter() - began

    @torch.inference_mode()
    def _bare(self, _hookpoints: list[str]) -> None:
        seen: list[object] = []
        blocks: Any = getattr(self._model, "layers", None) or self._model.h
        hook = blocks[-1].register_forward_hook(lambda _module, _args, output: seen.append(output))
        for batch in self._batches:
            seen.clear()
            token_ids = torch.from_numpy(batch.token_ids).to(self._device, torch.int64)
            self._model(input_ids=token_ids, use_cache=False)
            assert len(seen) == 1
        hook.remove()

    def _dropped(self, hookpoints: list[str]) -> None:
        deque(self._passes(hookpoints), maxlen=0)

    def _staged(self, hookpoints: list[str]) -> None:
        fetch = fetch_for(self._device, dict.fromkeys(hookpoints, torch.bfloat16))
        deque(fetch.rows(self._passes(hookpoints)), maxlen=0)

    def _waiting(self, hookpoints: list[str]) -> None:
        deque(DirectFetch().rows(self._passes(hookpoints)), maxlen=0)

    def _passes(self, hookpoints: list[str]) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
        sites = bind(self._model, hookpoints)
        for batch in self._batches:
            yield batch, forward_rows(self._model, batch, sites)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _cut(files_path: str, device: torch.device, job: Job) -> PreTrainedModel:
    n_layers = max(job.layers) + 1
    config = AutoConfig.from_pretrained(files_path, local_files_only=True)
    config.num_hidden_layers = n_layers
    arguments: dict[str, Any] = {"config": config, "dtype": torch.bfloat16, "local_files_only": True}
    model: Any = AutoModel.from_pretrained(files_path, **arguments)
    cut: PreTrainedModel = model.eval().to(device)
    return cut


def main() -> None:
    """Answers questions until standard input ends."""
    files_path, device, job = sys.argv[1:]
    given = json.loads(job)
    passes = Passes(files_path, device, Job(**{**given, "layers": tuple(given["layers"])}))
    for question in questions():
        answer({"seconds": passes.seconds(question["kind"], question["n_hookpoints"])})


if __name__ == "__main__":
    main()
