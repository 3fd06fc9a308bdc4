"""The sides of the peers' benchmark: `python -m bench.peer_sources KIND REGISTRY MODEL_FOLDER`.

Each answers a question `{kind, n_rows, corpus_id, at_most_s}` with the number of rows it computed and the seconds.
Models are loaded before. `kind` is `long` (full contexts, no padding) or `short` (paragraphs, which some sides pad).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

from bench.end_to_end import HOOKPOINT
from bench.processes import answer_with_rows
from bench.row_sources import headrace
from bench.text import BATCH_SIZE, CONTEXT_SIZE, LAYER, PLAIN_BATCH_SIZE, paragraphs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Callable[[dict[str, Any]], Iterator[int]]
# Runs one token batch, with its attention mask if it is padded; returns its number of rows.
Run = Callable[["torch.Tensor | None", "torch.Tensor"], int]
MODULE = f"model.layers.{LAYER}"


def contexts(files_path: str) -> list[torch.Tensor]:
    """Returns token batches `[BATCH_SIZE, CONTEXT_SIZE]` of all documents joined, without padding."""
    import torch  # noqa: PLC0415 -- each process imports what it measures

    from headrace_extractor.corpora.tokenizer import Tokenizer  # noqa: PLC0415

    tokens = [token for document in Tokenizer.load(files_path).encode_batch(paragraphs()) for token in document]
    size = BATCH_SIZE * CONTEXT_SIZE
    whole = torch.tensor(tokens[: len(tokens) // size * size], dtype=torch.long)
    return list(whole.view(-1, BATCH_SIZE, CONTEXT_SIZE))


def sae_lens(_registry: str, files_path: str) -> Rows:
    """SAELens' ActivationsStore over its proxy of a transformers model: full contexts only, rows mixed."""
    import torch  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from sae_lens.load_model import load_model  # noqa: PLC0415
    from sae_lens.training.activations_store import ActivationsStore  # noqa: PLC0415

    model = load_model("AutoModelForCausalLM", files_path, "cpu", {"dtype": torch.float32}, hook_names=[MODULE])
    rows = [row.tolist() for batch in contexts(files_path) for row in batch]
    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows}),
        streaming=False,
        hook_name=MODULE,
        hook_head_index=None,
        context_size=CONTEXT_SIZE,
        d_in=model.model.config.hidden_size,
        n_batches_in_buffer=16,
        total_training_tokens=10**9,
        store_batch_size_prompts=BATCH_SIZE,
        train_batch_size_tokens=BATCH_SIZE * CONTEXT_SIZE,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        sequence_separator_token=None,
    )

    def found(_question: dict[str, Any]) -> Iterator[int]:
        for batch in store:
            yield len(batch)

    return found


def transformer_lens(_registry: str, files_path: str) -> Rows:
    """HookedTransformer's `run_with_cache`, stopped after the layer; texts are padded on the right."""
    import torch  # noqa: PLC0415
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: PLC0415
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights  # noqa: PLC0415

    model, tokenizer = _causal_lm(files_path)
    config = model.config
    lens = HookedTransformer(
        HookedTransformerConfig(
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_key_value_heads=config.num_key_value_heads,
            d_head=config.hidden_size // config.num_attention_heads,
            d_mlp=config.intermediate_size,
            n_ctx=CONTEXT_SIZE,
            d_vocab=config.vocab_size,
            act_fn="silu",
            normalization_type="RMS",
            final_rms=True,
            gated_mlp=True,
            eps=config.rms_norm_eps,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=config.hidden_size // config.num_attention_heads,
            rotary_base=int(config.rope_parameters["rope_theta"]),
            dtype=torch.float32,
            device="cpu",
        ),
        tokenizer,
        default_padding_side="right",
    )
    lens.load_state_dict(convert_llama_weights(model, lens.cfg), strict=False)
    del model

    def run(mask: torch.Tensor | None, tokens: torch.Tensor) -> int:
        _, cache = lens.run_with_cache(
            tokens, names_filter=HOOKPOINT, stop_at_layer=LAYER + 1, attention_mask=mask, return_type=None
        )
        return _kept(cache[HOOKPOINT], mask)

    return partial(_of_batches, contexts(files_path), tokenizer, run)


def nnsight(_registry: str, files_path: str) -> Rows:
    """nnsight's trace, stopped after the layer; texts are padded by the tokenizer."""
    from nnsight import LanguageModel  # noqa: PLC0415

    model, tokenizer = _causal_lm(files_path)
    traced = LanguageModel(model, tokenizer=tokenizer)

    def run(mask: torch.Tensor | None, tokens: torch.Tensor) -> int:
        inputs = {"input_ids": tokens} if mask is None else {"input_ids": tokens, "attention_mask": mask}
        with traced.trace(inputs) as tracer:
            activations = traced.model.layers[LAYER].output.save()
            tracer.stop()
        return _kept(activations[0] if isinstance(activations, tuple) else activations, mask)

    return partial(_of_batches, contexts(files_path), tokenizer, run)


def full(_registry: str, files_path: str) -> Rows:
    """A forward pass of the whole model with a hook at the layer, as sparsify's trainer runs it."""
    model, tokenizer = _causal_lm(files_path)
    seen: list[torch.Tensor] = []
    model.get_submodule(MODULE).register_forward_hook(lambda _module, _args, output: seen.append(output))

    def run(mask: torch.Tensor | None, tokens: torch.Tensor) -> int:
        seen.clear()
        model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return _kept(seen[0], mask)

    return partial(_of_batches, contexts(files_path), tokenizer, run)


def _of_batches(
    long: Sequence[torch.Tensor], tokenizer: PreTrainedTokenizerBase, run: Run, question: dict[str, Any]
) -> Iterator[int]:
    import torch  # noqa: PLC0415

    with torch.inference_mode():
        if question["kind"] == "long":
            for tokens in cycle(long):
                yield run(None, tokens)
        texts = paragraphs()
        for at in cycle(range(0, len(texts), PLAIN_BATCH_SIZE)):
            batch = tokenizer(
                texts[at : at + PLAIN_BATCH_SIZE],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=CONTEXT_SIZE,
            )
            yield run(batch["attention_mask"], batch["input_ids"])


def _kept(activations: torch.Tensor, mask: torch.Tensor | None) -> int:
    """Selects the rows of real tokens, as a trainer would; returns their number."""
    return len(activations.flatten(0, 1) if mask is None else activations[mask.bool()])


def _causal_lm(files_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(files_path, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(files_path, local_files_only=True, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


KINDS = {
    "headrace": headrace,
    "sae_lens": sae_lens,
    "transformer_lens": transformer_lens,
    "nnsight": nnsight,
    "full": full,
}


def main() -> None:
    """Answers questions until standard input ends."""
    kind, registry, files_path = sys.argv[1:]
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    sys.stdout, answers = sys.stderr, sys.stdout  # Libraries print to standard output, too.
    source = KINDS[kind](registry, files_path)
    answer_with_rows(source, answers)


if __name__ == "__main__":
    main()
