"""Load options: which are known, which change numbers, and that any JSON passes or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_models.errors import LoadOptionInvalid
from headrace_models.load_options import (
    OPTIONS,
    checked_options,
    options_changing_numbers,
    size_bytes,
    trusts_remote_code,
)

NAMES = (
    "dtype",
    "device_map",
    "max_memory",
    "attn_implementation",
    "rope_scaling",
    "low_cpu_mem_usage",
    "use_fast",
    "sliding_window",
    "trust_remote_code",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def test_the_options_are_these():
    assert tuple(OPTIONS) == NAMES


def test_an_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(LoadOptionInvalid, match=r"'dtpye'.*known: dtype, device_map") as caught:
        checked_options({"dtpye": "float32"})

    assert caught.value.option == "dtpye"


def test_an_option_of_another_type_is_named_with_its_value_and_the_remedy():
    with pytest.raises(
        LoadOptionInvalid, match=r"sliding_window is 1\.5; it must be a positive whole number"
    ) as caught:
        checked_options({"dtype": "float32", "sliding_window": 1.5})

    assert caught.value.option == "sliding_window"


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(LoadOptionInvalid) as caught:
        checked_options({"dtype": "x" * 10_000})

    assert len(str(caught.value)) < 200


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), JSON, max_size=3))
def test_any_json_passes_or_is_refused_by_name(options):
    try:
        checked = checked_options(options)
    except LoadOptionInvalid:
        return  # Any other error fails the test.

    assert set(checked) == set(options) <= set(NAMES)
    assert checked_options(checked) == checked
    json.dumps(checked, allow_nan=False)


@given(st.integers(2**53, 2**62).map(float))
def test_a_number_that_a_double_holds_only_nearly_stays_a_double(number):
    scaling = {"rope_type": "linear", "factor": number}

    assert isinstance(checked_options({"rope_scaling": scaling})["rope_scaling"]["factor"], float)


def test_options_that_say_where_and_how_to_load_change_no_number():
    every = dict.fromkeys(NAMES, "x")

    assert set(options_changing_numbers(every)) == {
        "dtype",
        "attn_implementation",
        "rope_scaling",
        "sliding_window",
        "trust_remote_code",
    }


def test_an_unknown_option_may_change_numbers():
    assert options_changing_numbers({"of_a_later_version": 1, "use_fast": True}) == {"of_a_later_version": 1}


@pytest.mark.parametrize(
    ("options", "trusted"),
    [({}, False), ({"trust_remote_code": True}, True), ({"trust_remote_code": "true"}, False)],
)
def test_code_is_trusted_only_if_the_options_say_so(options, trusted):
    assert trusts_remote_code(options) is trusted


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [(7, 7), (2.0**34, 2**34), ("7", 7), ("7B", 7), ("2KB", 2000), ("2 KiB", 2048), ("1.5GiB", 3 * 2**29)],
)
def test_sizes_are_decimal_or_binary(size, n_bytes):
    assert size_bytes(size) == n_bytes


@pytest.mark.parametrize("size", ["", "lots", "-1", "1iB", "1 GiB ", "1e9", "10gb"])
def test_any_other_text_is_no_size(size):
    with pytest.raises(ValueError, match="no size"):
        size_bytes(size)


@given(st.from_regex(r"[0-9]{1,12}(\.[0-9]{1,6})?[ ]?([KMGT]i?B|B)?", fullmatch=True))
def test_every_size_that_the_check_accepts_has_bytes(size):
    checked = checked_options({"max_memory": {"0": size}})

    assert size_bytes(checked["max_memory"]["0"]) >= 0


def test_the_page_about_load_options_lists_all_of_them():
    page = (Path(__file__).parents[2] / "docs" / "load-options.md").read_text()

    for name, option in OPTIONS.items():
        values, in_the_identity = option.values.replace("|", "\\|"), "yes" if option.changes_numbers else "no"
        assert f"| `{name}` | {values} | {option.default} | {in_the_identity} | {option.about} |" in page
