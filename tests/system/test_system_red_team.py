"""Files made to harm, given to real services: typed refusals, and servers that neither grow nor end.

How long they take, and how others fare meanwhile, is measured in the slow test at the end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import threading
import time
from functools import partial

import psutil
import pytest

from fix_red_team import CORPORA, MIB, MODELS, damaged_model, greedy_template, greedy_tokenizer
from fix_system import HOOKPOINT, MODEL, PATIENCE_S, texts
from headrace_client import errors
from headrace_client.values import Recipe

pytestmark = pytest.mark.timeout(300)

GROWTH_BYTES = 100 * MIB
TYPED_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def attacked(start_system, text_llama, tmp_path_factory):
    """A pair of servers with a good model and corpora, warm; files for them lie under `attacked.folder_of_files`."""
    root = tmp_path_factory.mktemp("red-team")
    shutil.copytree(text_llama, root / "good")
    started = start_system(models_root=root, extractor=("--corpus-root", str(root)))
    started.root = root
    started.add_model(MODEL, root / "good")
    started.client.corpora.upload("docs", documents=texts(30, seed=4))
    started.client.corpora.upload("long", documents=["a" * 2000 + "!"])
    started.client.corpora.upload("talks", documents=[[{"role": "user", "content": "hi"}]], chat=True)
    started.client.extractions.estimate(MODEL, "docs", HOOKPOINT)
    return started


@pytest.fixture(autouse=True)
def no_growth(attacked):
    """Both servers live afterwards, have logged no bug, and their memory stayed within 100 MB at every moment."""
    servers = [psutil.Process(process.pid) for process in (attacked.registry, attacked.extractor)]
    before = [server.memory_info().rss for server in servers]
    peak, over = list(before), threading.Event()

    def look():
        while not over.wait(0.02):
            for number, server in enumerate(servers):
                peak[number] = max(peak[number], server.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    yield
    over.set()
    watcher.join()

    assert attacked.registry.running
    assert attacked.extractor.running
    assert all(most - first < GROWTH_BYTES for most, first in zip(peak, before, strict=True)), (before, peak)
    for process in (attacked.registry, attacked.extractor):
        assert not [
            each for each in process.log_lines() if each["level"] == "error" or each.get("reason") == "INTERNAL"
        ]


def name_of(words: str) -> str:
    return words.replace(" ", "-").lower()


def reason_of(attacked, words: str) -> str:
    """Registers and prepares a damaged model; returns the reason of its refusal."""
    client, model_id = attacked.client, name_of(words)
    folder = attacked.root / model_id
    if not folder.exists():
        damaged_model(words, attacked.root / "good", folder)
    try:
        client.models.register(folder=folder, id=model_id)
        client.models.prepare(model_id)
        client.models.wait_ready(model_id, deadline_s=PATIENCE_S)
    except errors.HeadraceError as exc:
        return exc.reason
    return "none"


def model_with(attacked, change) -> str:
    """Adds a model that is good but for the file that `change` makes."""
    model_id = name_of(change.__name__.replace("_", " "))
    if (attacked.root / model_id).exists():
        return model_id
    shutil.copytree(attacked.root / "good", attacked.root / model_id)
    change(attacked.root / model_id)
    attacked.add_model(model_id, attacked.root / model_id)
    return model_id


@pytest.mark.parametrize("words", MODELS)
def test_a_model_made_to_harm_is_refused_when_it_is_prepared(attacked, words):
    assert reason_of(attacked, words) in ("MODEL_UNSUPPORTED", "DIGEST_MISMATCH")


def test_a_config_that_was_changed_later_does_not_stop_the_extractor(attacked):
    model_id = model_with(attacked, layers_later)
    path = attacked.root / model_id / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))

    with pytest.raises(errors.HeadraceError, match=r"num_hidden_layers|chang"):
        attacked.client.extractions.estimate(model_id, "docs", HOOKPOINT)


def layers_later(folder):
    """Changes nothing yet."""


@pytest.mark.parametrize("words", CORPORA)
def test_a_corpus_made_to_harm_is_refused(attacked, words):
    file_name, make = CORPORA[words]
    path = attacked.root / file_name
    path.write_bytes(make())
    options = {"format": "token_ids"} if file_name.endswith(".npy") else {}

    with pytest.raises(errors.CorpusMalformed):
        attacked.client.corpora.register_path(name_of(words), path, **options)
    assert name_of(words) not in {corpus.id for corpus in attacked.client.corpora.list()}
    path.unlink()


def test_a_tokenizer_that_takes_for_ever_ends_the_estimate_and_the_extraction(attacked):
    model_id = model_with(attacked, greedy_tokenizer)

    with pytest.raises((errors.CorpusMalformed, errors.ModelUnsupported), match=r"tokenize"):
        attacked.client.extractions.estimate(model_id, "long", HOOKPOINT)
    extraction = attacked.client.extractions.start(model_id, "long", HOOKPOINT)
    with pytest.raises((errors.CorpusMalformed, errors.ModelUnsupported), match=r"tokenize"):
        attacked.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)


def test_a_template_that_takes_gigabytes_ends_the_estimate_and_the_extraction(attacked):
    model_id, recipe = model_with(attacked, greedy_template), Recipe(chat_template=True)
    refusals, words = (errors.CorpusMalformed, errors.ModelUnsupported), r"memory|larger|template took longer"

    # On a busy machine the time of a template is over before its memory is used up.
    with pytest.raises(refusals, match=words):
        attacked.client.extractions.estimate(model_id, "talks", HOOKPOINT, recipe=recipe)
    extraction = attacked.client.extractions.start(model_id, "talks", HOOKPOINT, recipe=recipe)
    with pytest.raises(refusals, match=words):
        attacked.client.extractions.wait(extraction.id, deadline_s=PATIENCE_S)


def attacks(attacked):
    """Makes all files; returns a call for each that is to be refused."""
    client, calls = attacked.client, {}
    for words in MODELS:
        with contextlib.suppress(errors.HeadraceError):
            client.models.delete(name_of(words), force=True)
        if not (attacked.root / name_of(words)).exists():
            damaged_model(words, attacked.root / "good", attacked.root / name_of(words))
        calls[words] = partial(reason_of, attacked, words)

    def corpus(words, path, **options):
        with pytest.raises(errors.CorpusMalformed) as caught:
            client.corpora.register_path(name_of(words), path, **options)
        return caught.value.reason

    def estimate(model_id, corpus_id, recipe):
        with pytest.raises((errors.CorpusMalformed, errors.ModelUnsupported)) as caught:
            client.extractions.estimate(model_id, corpus_id, HOOKPOINT, recipe=recipe)
        return caught.value.reason

    for words, (file_name, make) in CORPORA.items():
        (attacked.root / file_name).write_bytes(make())
        options = {"format": "token_ids"} if file_name.endswith(".npy") else {}
        calls[words] = partial(corpus, words, attacked.root / file_name, **options)
    calls["a tokenizer"] = partial(estimate, model_with(attacked, greedy_tokenizer), "long", Recipe())
    talk = Recipe(chat_template=True)
    calls["a template"] = partial(estimate, model_with(attacked, greedy_template), "talks", talk)
    return calls


@pytest.mark.slow
def test_harm_is_typed_within_seconds_and_others_hardly_notice(attacked):
    """The figures of this test depend on the machine: run it alone."""
    client, calls, took = attacked.client, attacks(attacked), {}
    alone, meanwhile, over = [], [], threading.Event()

    def others(taken, until):
        while not until.is_set():
            begun = time.monotonic()
            client.models.get(MODEL)
            list(client.corpora.list())
            taken.append(time.monotonic() - begun)
            time.sleep(0.005)

    quiet = threading.Event()
    threading.Timer(8.0, quiet.set).start()
    others(alone, quiet)
    watcher = threading.Thread(target=others, args=(meanwhile, over))
    watcher.start()
    for words, call in calls.items():
        begun = time.monotonic()
        assert call() in ("MODEL_UNSUPPORTED", "DIGEST_MISMATCH", "CORPUS_MALFORMED"), words
        took[words] = time.monotonic() - begun
    over.set()
    watcher.join()

    before, after = (statistics.quantiles(each, n=100)[98] for each in (alone, meanwhile))
    print(f"\np99 of others' calls: {before * 1e3:.1f} ms alone, {after * 1e3:.1f} ms meanwhile")  # noqa: T201
    for words, seconds in took.items():
        print(f"{seconds:6.2f} s  {words}")  # noqa: T201
    assert max(took.values()) < TYPED_WITHIN_S, took
    assert after < max(2 * before, 0.02), (before, after)
