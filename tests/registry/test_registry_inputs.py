"""Input from outside: ids, paths, filters, page tokens, labels."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_chassis.errors import ServiceError
from headrace_registry import errors
from headrace_registry.errors import FieldInvalid, ModelUnsupported, PathNotAllowed
from headrace_registry.inputs import checked_id, checked_labels, checked_request_id
from headrace_registry.models.filters import Match, parse_filter
from headrace_registry.models.identifiers import checked_repo, derived_ids
from headrace_registry.models.models import NewModel, Source, SourceKind
from headrace_registry.models.roots import ModelRoots
from headrace_registry.paging import page_from
from headrace_registry.residency.leases import checked_ttl_s, checked_wait_s
from headrace_registry.rpc.status import STATUSES


def test_every_error_has_a_code_and_a_reason():
    ours = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, ServiceError)}
    leaves = {e for e in ours - {ServiceError} if not any(o is not e and issubclass(o, e) for o in ours)}

    assert leaves
    assert all(STATUSES.row(leaf.__new__(leaf)) is not None for leaf in leaves)


@pytest.mark.parametrize("value", ["", "A", "1a", "a_b", "a-", "a" * 64, "ä", "a/b", "a\x00"])
def test_a_bad_id_is_refused(value):
    with pytest.raises(FieldInvalid, match="letter"):
        checked_id(value, field="model_id")


@pytest.mark.parametrize(
    "value", ["x", "123e4567-e89b-12d3-a456-426614174000", "{0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a}"]
)
def test_a_request_id_must_be_a_uuid4(value):
    with pytest.raises(FieldInvalid, match="UUID4"):
        checked_request_id(value)


@pytest.mark.parametrize("repo", ["", "a/b/c", "/a", "a/", "../x", "a/..b", "a b", "a/b\x00"])
def test_a_bad_repo_is_refused(repo):
    with pytest.raises(FieldInvalid, match="owner/name"):
        checked_repo(repo, "")


@given(st.text(max_size=120))
def test_every_derived_id_is_valid(name):
    new = NewModel(id="", source=Source(kind=SourceKind.HUB, location=f"owner/{name}", revision="main"))

    for candidate in derived_ids(new):
        assert checked_id(candidate, field="id") == candidate


def test_an_id_is_derived_from_the_name_first():
    new = NewModel(id="", source=Source(kind=SourceKind.HUB, location="HuggingFaceTB/SmolLM2-135M", revision="main"))

    assert list(derived_ids(new))[:2] == ["smollm2-135m", "huggingfacetb-smollm2-135m"]


def test_labels_have_bounds():
    with pytest.raises(FieldInvalid):
        checked_labels({"Bad Key": "x"})
    with pytest.raises(FieldInvalid):
        checked_labels({"a": "x" * 256})
    with pytest.raises(FieldInvalid):
        checked_labels({f"k{n}": "" for n in range(65)})


def test_times_of_leases_have_bounds():
    assert (checked_ttl_s(0), checked_wait_s(0)) == (60.0, 600.0)
    for bad in (1.0, 3601.0, float("nan"), -5.0):
        with pytest.raises(FieldInvalid):
            checked_ttl_s(bad)
    with pytest.raises(FieldInvalid):
        checked_wait_s(float("inf"))


def test_a_filter_is_parsed_term_by_term():
    terms = parse_filter('state = READY AND id : smol AND labels.team = "a b"')

    assert [(t.field, t.label, t.match, t.value) for t in terms] == [
        ("state", "", Match.EQUALS, "READY"),
        ("id", "", Match.CONTAINS, "smol"),
        ("labels", "team", Match.EQUALS, "a b"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "state",
        "state =",
        "= x",
        "color = red",
        "state = READY OR id = x",
        "state = NOPE",
        "id = a AND",
        'id = "x',
        "a" * 2000,
    ],
)
def test_a_bad_filter_is_refused(text):
    with pytest.raises(FieldInvalid, match=r"^filter"):
        parse_filter(text)


@given(st.text(max_size=60))
def test_any_filter_parses_or_is_refused(text):
    with contextlib.suppress(FieldInvalid):
        parse_filter(text)


@given(st.text(max_size=80))
def test_any_foreign_token_is_refused(token):
    try:
        page = page_from(size=0, token=token, bound_to=("models", ""), default=50, key_length=1)
    except FieldInvalid:
        return
    assert page.after is None


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 1500,
        b'["%s", null, "\\ud800"]',
        b'["%s", null, "\\u0000"]',
        b'["%s", null, 1]',
        b'["%s", -1, "a"]',
        b'["%s", true, "a"]',
        b'["%s", "3", "a"]',
        b'["%s", 1e9, "a"]',
        b'["%s", 9223372036854775808, "a"]',
        b'["%s"]',
        b"[]",
        b"{}",
        b"7",
    ],
)
def test_a_token_of_crooked_json_is_refused(content):
    binding = page_from(size=0, token="", bound_to=("models", ""), default=50, key_length=1).binding
    token = base64.urlsafe_b64encode(content.replace(b"%s", binding.encode())).decode()

    with pytest.raises(FieldInvalid) as caught:
        page_from(size=0, token=token, bound_to=("models", ""), default=50, key_length=1)

    assert caught.value.field == "page_token"


async def test_a_listing_is_counted_once_and_not_at_all_if_it_has_one_page():
    counts = []

    async def count():
        counts.append(None)
        return 7

    def page_of(token):
        return page_from(size=3, token=token, bound_to=("a",), default=50, key_length=1)

    first = page_of("")
    whole = await first.counted("xy", "", count)
    assert (whole, counts) == (("", 2), [])

    token, total = await first.counted("xyz", first.token_after(("z",)), count)
    second = page_of(token)
    assert (second.after, second.total, total, len(counts)) == (("z",), 7, 7, 1)

    token, total = await second.counted("xyz", second.token_after(("c",)), count)
    third = page_of(token)
    assert (third.after, total) == (("c",), 7)
    assert await third.counted("x", "", count) == ("", 7)
    assert len(counts) == 1


def test_a_token_is_bound_to_its_arguments():
    token = page_from(size=1, token="", bound_to=("a",), default=50, key_length=1).token_after(("x",))

    assert page_from(size=1, token=token, bound_to=("a",), default=50, key_length=1).after == ("x",)
    with pytest.raises(FieldInvalid, match="other arguments"):
        page_from(size=1, token=token, bound_to=("b",), default=50, key_length=1)


def test_page_sizes_are_coerced_down_and_negative_ones_refused():
    assert page_from(size=0, token="", bound_to=(), default=50, key_length=1).size == 50
    assert page_from(size=5000, token="", bound_to=(), default=50, key_length=1).size == 1000
    with pytest.raises(FieldInvalid, match="negative"):
        page_from(size=-1, token="", bound_to=(), default=50, key_length=1)


def test_paths_outside_the_roots_are_refused_and_the_flag_is_named(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    roots = ModelRoots([inside])

    for path in (outside, inside / "link", outside / "missing"):
        with pytest.raises(PathNotAllowed, match="--models-root"):
            roots.folder(str(path), field="path")
    for path in ("relative", str(inside / ".." / "out"), "", "/a\x00b"):
        with pytest.raises(FieldInvalid):
            roots.folder(path, field="path")
    with pytest.raises(FieldInvalid, match="no folder"):
        roots.folder(str(inside / "missing"), field="path")
    assert roots.folder(str(inside), field="path") == str(inside)


def test_a_link_in_a_folder_must_not_lead_out_of_the_roots(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "config.json").symlink_to("/etc/hostname")

    with pytest.raises(ModelUnsupported, match="outside"):
        ModelRoots([inside]).check_inside(inside / "config.json")
