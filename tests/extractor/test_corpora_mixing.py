from __future__ import annotations

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_extractor.corpora.ingest.mixing import Mix, MixPart
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import AlreadyExists, CorpusNotFound, FieldInvalid


@pytest.fixture
def store(tmp_path):
    return CorpusStore(tmp_path / "corpora")


def add(store, corpus_id, n_documents, **spec):
    text = "\n".join(f"{corpus_id}{i}" for i in range(n_documents))
    return store.ingest(
        CorpusSpec(id=corpus_id, format=CorpusFormat.JSONL, **spec),
        io.BytesIO("\n".join(json.dumps({"text": line}) for line in text.split("\n")).encode()),
    )


def mix(weights, **options):
    parts = tuple(MixPart(corpus_id=name, weight=weight) for name, weight in weights.items())
    return Mix(parts=parts, **options)


def texts(store, corpus_id):
    with store.open(corpus_id) as reader:
        reader.verify()
        return [reader.text(i) for i in range(len(reader))]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=2, max_size=4),
    st.integers(0, 2**64 - 1),
    st.integers(0, 40),
)
def test_a_mixture_is_its_corpora_in_order_up_to_the_first_that_ends(tmp_path_factory, parts, seed, limit):
    store = CorpusStore(tmp_path_factory.mktemp("mix"))
    names = "abcd"[: len(parts)]
    for name, (n_documents, _) in zip(names, parts, strict=True):
        add(store, name, n_documents)
    wanted = mix({name: weight for name, (_, weight) in zip(names, parts, strict=True)}, seed=seed, max_documents=limit)
    corpus = store.ingest_mix("m", wanted)

    mixed = texts(store, "m")
    for name, (n_documents, _) in zip(names, parts, strict=True):
        own = [text for text in mixed if text.startswith(name)]
        assert own == [f"{name}{i}" for i in range(len(own))]
        assert len(own) <= n_documents
    assert not limit or len(mixed) <= limit
    exhausted = any(f"{name}{n - 1}" in mixed for name, (n, _) in zip(names, parts, strict=True))
    assert exhausted or len(mixed) == limit
    assert store.ingest_mix("again", wanted).digest == corpus.digest


def test_the_draws_are_always_the_same(store):
    add(store, "a", 10)
    add(store, "b", 10)

    store.ingest_mix("m", mix({"a": 1, "b": 3}, seed=7, max_documents=8))

    assert texts(store, "m") == ["b0", "a0", "b1", "a1", "b2", "b3", "a2", "b4"]
    assert store.get("m").origin == "mix:a:1 b:3 seed 7"


def test_weights_are_shares_of_the_documents(store):
    add(store, "a", 4000)
    add(store, "b", 4000)

    store.ingest_mix("m", mix({"a": 0.2, "b": 0.8}, max_documents=4000))

    share = sum(text.startswith("a") for text in texts(store, "m")) / 4000
    assert 0.17 < share < 0.23


def test_a_mixture_outlives_its_parts_and_another_seed_is_another_one(store):
    for name in "ab":
        add(store, name, 5)
    first = store.ingest_mix("m", mix({"a": 1, "b": 1}))
    with pytest.raises(AlreadyExists):
        store.ingest_mix("m", mix({"a": 1, "b": 1}, seed=1))
    store.delete("a")

    assert texts(store, "m")
    assert store.get("m") == first


def test_token_ids_and_conversations_mix_among_themselves(store):
    store.ingest_tokens("a", [[1], [2]])
    store.ingest_tokens("b", [[3], [4]])
    add(store, "c", 2)

    assert store.ingest_mix("m", mix({"a": 1, "b": 1})).tokenized
    # A wrong request: no line of a file is to be mended.
    with pytest.raises(FieldInvalid, match="a holds tokens and c holds text; mix corpora of one kind") as caught:
        store.ingest_mix("n", mix({"a": 1, "c": 1}))
    assert caught.value.field == "mix.parts"


def test_a_part_that_is_not_here_is_not_found(store):
    add(store, "a", 1)

    with pytest.raises(CorpusNotFound):
        store.ingest_mix("m", mix({"a": 1, "nope": 1}))


@pytest.mark.parametrize(
    ("weights", "options", "field"),
    [
        ({"a": 1}, {}, "parts"),
        ({}, {}, "parts"),
        ({"a": 1, "b": 0}, {}, "parts"),
        ({"a": 1, "b": -1}, {}, "parts"),
        ({"a": 1, "b": float("nan")}, {}, "parts"),
        ({"a": 1, "b": float("inf")}, {}, "parts"),
        ({"a": 1e308, "b": 1e308}, {}, "parts"),
        ({"a": 1, "b": 1}, {"max_documents": -1}, "max_documents"),
    ],
)
def test_a_mixture_out_of_range_names_its_field(weights, options, field):
    with pytest.raises(FieldInvalid) as caught:
        mix(weights, **options)
    assert caught.value.field == f"mix.{field}"


def test_a_corpus_named_twice_is_refused():
    part = MixPart(corpus_id="a", weight=1.0)

    with pytest.raises(FieldInvalid, match="twice"):
        Mix(parts=(part, part))


def test_memory_stays_bounded_while_corpora_are_mixed(store):
    for name in "ab":
        store.ingest_tokens(name, [range(10_000)] * 500)
    tracemalloc.start()

    corpus = store.ingest_mix("m", mix({"a": 1, "b": 1}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert corpus.size_bytes > 20_000_000
    assert peak < 5_000_000
