"""The sides of the end-to-end benchmark: `python -m bench.row_sources KIND REGISTRY MODEL_FOLDER`.

Each answers a question `{n_rows, corpus_id, at_most_s}` with a number of rows and the seconds they took: in `headrace`
from the request for an extraction to its last row in this process, in `bare` and `plain` from the first forward pass to
the last. Models are loaded before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bench.end_to_end import HOOKPOINT, MODEL_ID
from bench.processes import answer_with_rows
from bench.replay import touch
from bench.text import BATCH_SIZE, CONTEXT_SIZE, LAYER, PLAIN_BATCH_SIZE, paragraphs

Rows = Callable[[dict[str, Any]], Iterator[int]]


def headrace(registry: str, _files_path: str) -> Rows:
    """Extracts through the services and reads the rows as they come."""
    from headrace_client import BosPolicy, HeadraceClient, Recipe  # noqa: PLC0415 -- each process imports what it measures

    client = HeadraceClient.connect(registry)
    # Without BOS: a row is a token of the text, as on the other sides.
    recipe = Recipe(context_size=CONTEXT_SIZE, batch_size=BATCH_SIZE, bos=BosPolicy.NONE)

    def rows(question: dict[str, Any]) -> Iterator[int]:
        started = client.extractions.start(
            MODEL_ID, question["corpus_id"], HOOKPOINT, recipe=recipe, max_rows=question["n_rows"]
        )
        with client.chunks(started) as stream:
            for chunk in stream:
                touch(chunk.buffers[0])
                yield chunk.n_rows

    return rows


def bare(_registry: str, files_path: str) -> Rows:
    """Runs only the needed layers over the same packed batches, and drops the rows."""
    import torch  # noqa: PLC0415
    from transformers import AutoModel  # noqa: PLC0415

    from headrace_extractor.corpora.packing import Packer  # noqa: PLC0415
    from headrace_extractor.corpora.recipe import Recipe  # noqa: PLC0415
    from headrace_extractor.corpora.tokenizer import Tokenizer  # noqa: PLC0415

    model = AutoModel.from_pretrained(files_path, dtype=torch.float32, local_files_only=True).eval()
    model.layers = model.layers[: LAYER + 1]
    seen: list[torch.Tensor] = []
    model.layers[LAYER].register_forward_hook(lambda _module, _args, output: seen.append(output))
    tokenizer = Tokenizer.load(files_path)
    recipe = Recipe(context_size=CONTEXT_SIZE, batch_size=BATCH_SIZE, bos="none")
    batches = list(Packer(tokenizer.encode_batch(paragraphs()), recipe, tokenizer.special).batches())

    @torch.inference_mode()
    def rows(question: dict[str, Any]) -> Iterator[int]:
        del question
        for batch in batches:
            seen.clear()
            token_ids, position_ids = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.position_ids)
            model(input_ids=token_ids.long(), position_ids=position_ids.long(), use_cache=False)
            assert len(seen) == 1
            yield batch.n_rows

    return rows


def plain(_registry: str, files_path: str) -> Rows:
    """Runs the whole model over padded batches of paragraphs and takes the rows of real tokens: a first script."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(files_path, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(files_path, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = paragraphs()

    @torch.inference_mode()
    def rows(question: dict[str, Any]) -> Iterator[int]:
        del question
        for at in range(0, len(texts), PLAIN_BATCH_SIZE):
            batch = tokenizer(
                texts[at : at + PLAIN_BATCH_SIZE],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=CONTEXT_SIZE,
            )
            output = model(**batch, output_hidden_states=True, use_cache=False)
            yield len(output.hidden_states[LAYER + 1][batch["attention_mask"].bool()])

    return rows


def main() -> None:
    """Answers questions until standard input ends."""
    kind, registry, files_path = sys.argv[1:]
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    source = {"headrace": headrace, "bare": bare, "plain": plain}[kind](registry, files_path)
    answer_with_rows(source, sys.stdout)


if __name__ == "__main__":
    main()
