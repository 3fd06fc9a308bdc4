"""Architectures of transformers, judged from outside; the whole table is in docs/architectures.md."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from fix_architectures import model_types, random_model, small_config
from fix_runner import load
from fix_verdict_table import EXACT, ROUNDED, line_of, lines_of_document
from fix_verdicts import judge
from headrace_extractor.errors import ModelUnsupported
from headrace_models.unsupported import known_types, why_unsupported

# Once wrong, refused for another reason, or ended by an error.
SOME = (
    *("deberta-v2", "falcon_h1", "gemma3n_text", "gpt_oss", "llama4_text", "longformer", "mamba", "modernbert"),
    *("openai-gpt", "roberta", "t5", "xlnet"),
)


def as_written(line, written):
    """True for the line of a verdict that the table has; bits may be equal where the table says rounding."""
    return line in (written, written.replace(f"| {ROUNDED} |", f"| {EXACT} |", 1))


@pytest.mark.parametrize("model_type", SOME)
def test_an_architecture_is_right_or_refused_as_the_table_says(model_type, tmp_path):
    assert as_written(line_of(judge(model_type, tmp_path / "model")), lines_of_document()[model_type])


@pytest.mark.parametrize("model_type", ["longformer", "t5", "xlnet"])
def test_a_runner_gives_the_reason_that_the_registry_gives(model_type, tmp_path):
    config = small_config(model_type)
    random_model(config).save_pretrained(tmp_path / "model")

    with pytest.raises(ModelUnsupported) as caught:
        load(tmp_path / "model")
    assert why_unsupported(config.to_dict()) in caught.value.message


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("big_bird", {"attention_type": "original_full"}),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}),  # Its last projections are not called as modules.
        ("falcon", {"multi_query": False, "num_kv_heads": 4, "parallel_attn": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
        ("phi3", {"num_key_value_heads": 4}),
    ],
)
def test_an_architecture_is_exact_also_with_settings_of_its_own(model_type, settings, tmp_path):
    assert judge(model_type, tmp_path / "model", **settings).alone == EXACT


def test_big_bird_is_refused_while_its_attention_is_sparse():
    """Its code turns to full attention with the first short text, as those that are run at every load, for good."""
    assert "becomes full attention" in why_unsupported({"model_type": "big_bird"})
    assert "becomes full attention" in why_unsupported({"model_type": "big_bird", "attention_type": "block_sparse"})
    assert why_unsupported({"model_type": "big_bird", "attention_type": "original_full"}) == ""


def test_a_hundred_architectures_are_judged():
    lines = lines_of_document()

    assert lines.keys() == set(model_types())
    assert sum("| exact |" in line for line in lines.values()) >= 100


def test_every_type_that_is_refused_at_registration_is_one_of_transformers():
    assert known_types() <= set(CONFIG_MAPPING.keys())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # MobileBERT's head has an empty layer.
def test_the_table_of_all_architectures_is_current(tmp_path):
    written = lines_of_document()
    judged = {each: line_of(judge(each, tmp_path / each)) for each in model_types()}

    assert {each: line for each, line in judged.items() if not as_written(line, written[each])} == {}
    assert judged.keys() == written.keys()
