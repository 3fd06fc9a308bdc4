"""dictionary_learning's ActivationBuffer, in an environment of its own: `python -m ... MODEL_FOLDER`.

Answers like `peer_sources`. The buffer is filled before the time starts and holds the contexts of sixteen batches. The
buffer cuts `long` texts, which have more tokens than a context, and pads `short` ones, which are paragraphs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from bench.processes import answer_with_rows
from bench.text import BATCH_SIZE, CONTEXT_SIZE, LAYER, PLAIN_BATCH_SIZE, paragraphs

_CONTEXTS = 16 * BATCH_SIZE
_LONGER = CONTEXT_SIZE + CONTEXT_SIZE // 4  # More tokens than needed: decoding and encoding again may give fewer.


def buffer(model: Any, texts: Iterator[str], batch_size: int) -> Iterator[Any]:
    """Makes the buffer and fills it."""
    from dictionary_learning.buffer import ActivationBuffer  # noqa: PLC0415

    made = ActivationBuffer(
        data=texts,
        model=model,
        submodule=model.model.layers[LAYER],
        d_submodule=model.config.hidden_size,
        n_ctxs=_CONTEXTS,
        ctx_len=CONTEXT_SIZE,
        refresh_batch_size=batch_size,
        out_batch_size=BATCH_SIZE * CONTEXT_SIZE,
        device="cpu",
    )
    next(made)
    return iter(made)


def main() -> None:
    """Answers questions until standard input ends."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    sys.stdout, answers = sys.stderr, sys.stdout  # Libraries print to standard output, too.
    import torch  # noqa: PLC0415
    from nnsight import LanguageModel  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    # This old version of transformers does not know the tokenizer class that the current one writes into a folder.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{sys.argv[1]}/tokenizer.json", pad_token="<|endoftext|>")
    model = LanguageModel(sys.argv[1], tokenizer=tokenizer, device_map="cpu", torch_dtype=torch.float32, dispatch=True)
    ids = model.tokenizer("\n\n".join(paragraphs())).input_ids
    pieces = [model.tokenizer.decode(ids[at : at + _LONGER]) for at in range(0, len(ids) - _LONGER, _LONGER)]
    buffers = {
        "long": buffer(model, cycle(pieces), BATCH_SIZE),
        "short": buffer(model, cycle(paragraphs()), PLAIN_BATCH_SIZE),
    }
    answer_with_rows(lambda question: map(len, buffers[question["kind"]]), answers)


if __name__ == "__main__":
    main()
