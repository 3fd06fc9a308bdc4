"""Recipes and corpora through the whole system: the rows show the recipe that the client gave."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from fix_system import BOS_ID, HOOKPOINT, MODEL, PATIENCE_S, texts
from headrace_client import Recipe, errors

DOCUMENTS = texts(40, seed=11, longest=12)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
TALKS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in texts(12, seed=12)
]


@pytest.fixture(scope="module")
def chatty(system, text_llama):
    """A model with a chat template."""
    folder = text_llama.with_name("chatty")
    shutil.copytree(text_llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    system.add_model("chatty", folder)
    return AutoTokenizer.from_pretrained(folder)


def rows_of(system, model, corpus, **recipe):
    extraction = system.client.extractions.start(
        model, corpus, HOOKPOINT, recipe=Recipe(**{"context_size": 48, "batch_size": 2} | recipe)
    )
    columns = ["token_id", "document", "position", HOOKPOINT]
    parts = {name: [] for name in columns}
    with system.client.chunks(extraction, columns) as chunks:
        for chunk in chunks:
            for name, values in chunk.arrays.items():
                parts[name].append(values.copy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def key(rows):
    return list(zip(rows["document"].tolist(), rows["position"].tolist(), strict=True))


@pytest.mark.parametrize("recipe", [{}, {"packing": "one_document"}, {"long_documents": "truncate"}])
@pytest.mark.parametrize("window", [(-1, 0), (1, 5), (-3, -1)])
def test_rows_of_a_window_have_the_values_they_have_without_it(system, recipe, window):
    corpus = system.variant(DOCUMENTS)
    everything = rows_of(system, MODEL, corpus, **recipe)
    windowed = rows_of(system, MODEL, corpus, window=window, **recipe)

    keys = key(everything)
    lengths = dict(keys)  # Each document's last position.
    first, last = window
    wanted = [
        place
        for place, (document, position) in enumerate(keys)
        if position in range(lengths[document] + 1)[first : last or None]
    ]
    assert key(windowed) == [keys[place] for place in wanted]
    difference = np.abs(windowed[HOOKPOINT] - everything[HOOKPOINT][wanted]).max()
    assert difference < 1e-4 * np.abs(everything[HOOKPOINT]).max()


def test_an_estimate_of_a_window_is_exact(system):
    corpus = system.variant(DOCUMENTS)
    recipe = Recipe(context_size=48, window=(-2, 0), long_documents="truncate")

    estimate = system.client.extractions.estimate(MODEL, corpus, HOOKPOINT, recipe=recipe)
    extraction = system.client.extractions.start(MODEL, corpus, HOOKPOINT, recipe=recipe)

    assert system.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S).n_rows == estimate.n_rows
    assert estimate.n_rows == 2 * len(DOCUMENTS)


def test_an_estimate_knows_a_corpus_from_one_that_had_its_id_before(system):
    recipe = Recipe(packing="one_document", window=(-1, 0))
    counted = []
    for n in (5, 9):
        system.client.corpora.upload("reused", documents=DOCUMENTS[:n])
        counted.append(system.client.extractions.estimate(MODEL, "reused", HOOKPOINT, recipe=recipe).n_rows)
        system.client.corpora.delete("reused")

    assert counted == [5, 9]


def test_rows_of_conversations_are_the_tokens_of_the_template(system, chatty):
    corpus = system.client.corpora.upload("chatty-talks", documents=TALKS, chat=True)
    recipe = {"chat_template": True, "packing": "one_document", "context_size": 512}
    estimate = system.client.extractions.estimate("chatty", "chatty-talks", HOOKPOINT, recipe=Recipe(**recipe))
    rows = rows_of(system, "chatty", "chatty-talks", **recipe)

    expected = [chatty.apply_chat_template(talk, return_dict=False) for talk in TALKS]
    assert corpus.chat
    assert rows["token_id"].tolist() == [token for tokens in expected for token in tokens]
    assert (rows["token_id"] == BOS_ID).sum() == len(TALKS)
    assert estimate.n_rows == len(rows["token_id"])


def test_conversations_without_template_say_what_to_do(system, chatty):
    system.client.corpora.upload("talk", documents=TALKS[:1], chat=True)
    with_template = Recipe(chat_template=True)

    with pytest.raises(errors.HeadraceError, match="no chat template") as caught:
        system.client.extractions.start(MODEL, "talk", HOOKPOINT, recipe=with_template)
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    with pytest.raises(errors.InvalidArgument, match="holds conversations"):
        system.client.extractions.start("chatty", "talk", HOOKPOINT)
    with pytest.raises(errors.InvalidArgument, match="no conversations"):
        system.client.extractions.start("chatty", system.variant(DOCUMENTS), HOOKPOINT, recipe=with_template)


def test_an_array_of_token_ids_is_a_corpus(system, tmp_path):
    ids = np.arange(2, 202, dtype=np.uint16).reshape(20, 10)
    np.save(tmp_path / "ids.npy", ids)

    corpus = system.client.corpora.upload("array", tmp_path / "ids.npy")
    rows = rows_of(system, MODEL, "array", bos="none", packing="one_document")

    assert (corpus.tokenized, corpus.n_documents) == (True, 20)
    assert rows["token_id"].tolist() == ids.ravel().tolist()


def test_a_mixture_is_a_corpus_of_its_own(system):
    for name in ("mixa", "mixb"):
        system.client.corpora.upload(name, documents=[f"{name} {i}" for i in range(50)])

    corpus = system.client.corpora.register_mix("mixed", {"mixa": 1, "mixb": 2}, seed=3, max_documents=30)
    again = system.client.corpora.register_mix("mixed", {"mixa": 1, "mixb": 2}, seed=3, max_documents=30)

    assert corpus == again
    assert (corpus.n_documents, corpus.origin) == (30, "mix:mixa:1 mixb:2 seed 3")
    with pytest.raises(errors.CorpusNotFound):
        system.client.corpora.register_mix("m2", {"mixa": 1, "nowhere": 1})
    with pytest.raises(errors.InvalidArgument, match="above 0"):
        system.client.corpora.register_mix("m2", {"mixa": 1, "mixb": 0})


def test_a_dataset_that_can_not_be_had_is_refused_and_keeps_nothing(system):
    for changes, message in (
        ({"repo_id": "words"}, "owner/name"),
        ({"repo_id": "a/b", "max_documents": -1}, "negative"),
    ):
        with pytest.raises(errors.InvalidArgument, match=message):
            system.client.corpora.register_hub("words", **changes)
    with pytest.raises(errors.CorpusNotFound):
        system.client.corpora.get("words")


def test_a_malformed_array_names_its_row(system, tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([[1, 2], [3, -4]]))
    (tmp_path / "bad.npy").write_bytes(file.getvalue())
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": [1]}) + "\n" + json.dumps({"text": "x"}))

    with pytest.raises(errors.CorpusMalformed, match="Row 1"):
        system.client.corpora.upload("bad", tmp_path / "bad.npy")
    with pytest.raises(errors.CorpusMalformed, match="Line 2"):
        system.client.corpora.upload("bad", tmp_path / "bad.jsonl", format="token_ids")


@pytest.mark.parametrize("recipe", [{}, {"packing": "one_document"}])
def test_the_first_documents_alone_are_a_set_of_their_own(system, recipe):
    corpus = system.variant(DOCUMENTS)
    everything = rows_of(system, MODEL, corpus, **recipe)
    first = rows_of(system, MODEL, corpus, max_documents=5, **recipe)
    alone = rows_of(system, MODEL, system.variant(DOCUMENTS[:5]), **recipe)
    counted = system.client.extractions.estimate(
        MODEL, corpus, HOOKPOINT, recipe=Recipe(context_size=48, batch_size=2, max_documents=5, **recipe)
    )

    kept = everything["document"] < 5
    for name in ("token_id", "document", "position"):
        np.testing.assert_array_equal(first[name], everything[name][kept])
    np.testing.assert_array_equal(first[HOOKPOINT], alone[HOOKPOINT])
    assert counted.n_rows == kept.sum() == len(first["document"])
    assert counted.n_rows_cached == counted.n_rows
    assert len(rows_of(system, MODEL, corpus, max_documents=10_000, **recipe)["document"]) == len(kept)


def test_a_negative_number_of_documents_is_refused(system):
    with pytest.raises(errors.InvalidArgument, match="max_documents"):
        system.client.extractions.start(MODEL, system.variant(DOCUMENTS), HOOKPOINT, recipe=Recipe(max_documents=-1))


@pytest.fixture(scope="module")
def spelling(system, text_llama):
    """A model whose tokenizer has a token that its embedding lacks."""
    folder = text_llama.with_name("spelling")
    shutil.copytree(text_llama, folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens(["<extra>"])
    inner.save(str(folder / "tokenizer.json"))
    system.add_model("spelling", folder)
    return "spelling"


def test_a_text_that_spells_a_token_beyond_the_embedding_is_named_or_left_out(system, spelling):
    bad = 9
    texts_with = [*DOCUMENTS[:bad], "so it <extra> goes", *DOCUMENTS[bad:]]
    corpus, recipe = system.variant(texts_with), Recipe(context_size=48, skip_bad_documents=True)
    strict = system.client.extractions.start(spelling, corpus, HOOKPOINT, recipe=Recipe(context_size=48))

    with pytest.raises(errors.CorpusMalformed, match="so it <extra> goes") as caught:
        system.client.extractions.wait(strict.id, deadline_s=PATIENCE_S)
    assert caught.value.metadata["document"] == str(bad)
    estimate = system.client.extractions.estimate(spelling, corpus, HOOKPOINT, recipe=recipe)
    rows = rows_of(system, spelling, corpus, skip_bad_documents=True)
    assert set(rows["document"].tolist()) == set(range(len(texts_with))) - {bad}
    done = [
        system.client.extractions.wait(
            system.client.extractions.start(spelling, corpus, HOOKPOINT, recipe=asked).id, deadline_s=PATIENCE_S
        )
        for asked in (Recipe(context_size=48, batch_size=2, skip_bad_documents=True), recipe)
    ]
    assert [each.n_documents_skipped for each in done] == [1, 1]
    assert [each.cached for each in done] == [True, False]
    assert done[0].n_rows == done[1].n_rows == estimate.n_rows == len(rows["document"])
    assert done[0].set_id != strict.set_id
