"""Conversations, from the template to the tokens of the rows, compared with transformers."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from headrace_chassis.confined.pool import Confined
from headrace_chassis.errors import ServiceError
from headrace_extractor.corpora import chat, counting
from headrace_extractor.corpora.chat import ChatRenderer, ConfinedRenderer
from headrace_extractor.corpora.chat_template import ChatTemplate
from headrace_extractor.corpora.documents import open_documents
from headrace_extractor.corpora.packing import Packer
from headrace_extractor.corpora.recipe import Recipe
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec
from headrace_extractor.corpora.store import CorpusStore
from headrace_extractor.errors import CorpusMalformed, DigestMismatch, FieldInvalid, ModelUnsupported, RunnerLost

TALKS = [
    [{"role": "user", "content": "Where does the water go?"}, {"role": "assistant", "content": "To the wheel."}],
    [],
    [{"role": "system", "content": " short "}, {"role": "user", "content": "ünï 🛞 <b>&</b>"}],
    [{"role": "user", "content": "x", "name": "Ada", "tool_calls": [{"b": 1, "a": "é"}]}],
]
SIMPLE = """{{ bos_token }}{% for message in messages %}
    <|{{ message.role }}|>
    {{- message['content'] | trim }}
{% endfor %}{{ eos_token }}"""
TRICKY = """{%- set ns = namespace(seen=0) -%}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
  {%- set ns.seen = ns.seen + 1 -%}
  {%- generation -%}{{ ns.seen }}:{{ m.content }}{%- endgeneration -%}
  {%- if m.tool_calls -%}{{ m.tool_calls | tojson }}{{ m.tool_calls | tojson(indent=2) }}{%- endif -%}
  {{- unk_token -}}{{- sep_token -}}{{- '!' if add_generation_prompt else '?' -}}{%- if tools %}tools{% endif -%}
{%- endfor -%}
{{- dict(a=1).items() | list }}{{ eos_token }}"""
PARTS = """{%- for m in messages %}
  {%- if m.content is string or m.content is not defined %}<{{ m.content }}>
  {%- else %}{% for part in m.content %}{{ part.text if part.type == 'text' else '[' ~ part.type ~ ']' }}{% endfor %}
  {%- endif %}
  {%- if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}
{%- endfor %}"""
THINKING = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}{% endfor %}"


def make_model(folder, template=None, *, template_in="jinja"):
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the water drives the wheel"], trainer)
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": None}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template_in == "jinja" and template is not None:
        (folder / "chat_template.jinja").write_text(template)
    elif template_in == "config":
        config["chat_template"] = template
    elif template_in == "names":
        config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    elif template_in == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320}))
    return folder


@pytest.fixture(scope="module")
def children():
    confined = Confined(errors=ServiceError, preload=("headrace_extractor.corpora.chat",))
    yield confined
    confined.close()


@pytest.fixture
def store(tmp_path):
    return CorpusStore(tmp_path / "corpora")


def add_talks(store, talks=TALKS, corpus_id="talks"):
    lines = b"".join(json.dumps({"text": talk}).encode() + b"\n" for talk in talks)
    return store.ingest(CorpusSpec(id=corpus_id, format=CorpusFormat.JSONL, chat=True), io.BytesIO(lines))


def own_tokens(store, folder, **recipe):
    with store.open("talks") as reader:
        documents, _ = open_documents(reader, folder, Recipe(chat_template=True, **recipe))
        return [documents[i].tolist() for i in range(len(documents))]


@pytest.mark.parametrize("template", [SIMPLE, TRICKY], ids=["simple", "tricky"])
def test_conversations_become_the_tokens_that_transformers_makes(tmp_path, store, template):
    from transformers import AutoTokenizer  # noqa: PLC0415

    folder = make_model(tmp_path / "model", template)
    add_talks(store)
    theirs = AutoTokenizer.from_pretrained(folder)

    got = own_tokens(store, folder, bos="none")

    assert got == [theirs.apply_chat_template(talk, tokenize=True, return_dict=False) if talk else [] for talk in TALKS]


def test_content_parts_and_null_become_what_transformers_makes_of_them(tmp_path, store):
    from transformers import AutoTokenizer  # noqa: PLC0415

    folder = make_model(tmp_path / "model", PARTS)
    call = {"id": "1", "type": "function", "function": {"name": "look"}}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}], "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    add_talks(store, [talk])
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(talk, tokenize=False)

    assert text.startswith("What is it?[image]<>[{")
    assert own_tokens(store, folder, bos="none") == [theirs.apply_chat_template(talk, return_dict=False)]


def test_reasoning_is_found_under_each_of_its_names(tmp_path):
    from transformers import AutoTokenizer  # noqa: PLC0415

    theirs = AutoTokenizer.from_pretrained(make_model(tmp_path / "model", THINKING))
    ours = ChatRenderer(ChatTemplate(THINKING))

    for name in ("reasoning_content", "thinking", "reasoning"):
        talk = [{"role": "assistant", "content": "yes", name: "hm"}]
        assert ours.render(talk, 0) == theirs.apply_chat_template(talk, tokenize=False)


@pytest.mark.parametrize("place", ["jinja", "config", "names", "json"])
def test_the_template_is_found_wherever_transformers_keeps_it(tmp_path, place):
    template = ChatTemplate.load(make_model(tmp_path / "model", SIMPLE, template_in=place))

    assert template.source == SIMPLE
    assert template.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert template.digest == ChatTemplate(SIMPLE).digest != ChatTemplate(TRICKY).digest


def test_a_model_without_template_says_what_to_do(tmp_path, store):
    folder = make_model(tmp_path / "model")
    add_talks(store)

    with pytest.raises(ModelUnsupported, match="no chat template"):
        own_tokens(store, folder)


def test_template_and_conversations_go_together(tmp_path, store):
    folder = make_model(tmp_path / "model", SIMPLE)
    add_talks(store)
    store.ingest(CorpusSpec(id="text", format=CorpusFormat.TXT), io.BytesIO(b"a"))

    for corpus_id, recipe, message in (
        ("talks", Recipe(), "holds conversations"),
        ("text", Recipe(chat_template=True), "holds no conversations"),
    ):
        with store.open(corpus_id) as reader, pytest.raises(FieldInvalid, match=message) as caught:
            open_documents(reader, folder, recipe)
        assert caught.value.field == "spec.recipe.chat_template"


@pytest.mark.parametrize("starts", ["", "{{ bos_token }}"], ids=["without BOS", "with BOS"])
def test_by_default_a_conversation_has_the_special_tokens_of_its_template_alone(tmp_path, store, starts):
    from transformers import AutoTokenizer  # noqa: PLC0415

    folder = make_model(tmp_path / "model", starts + "{% for m in messages %}{{ m.content }}{% endfor %}")
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inner.save(str(folder / "tokenizer.json"))
    add_talks(store, TALKS[:1])
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALKS[0], tokenize=True, return_dict=False)

    with store.open("talks") as reader:
        documents, special = open_documents(reader, folder, Recipe(chat_template=True, context_size=128))
        whole = next(Packer(documents, Recipe(context_size=128), special).batches()).token_ids[0].tolist()
        pieces = list(Packer(documents, Recipe(context_size=8, batch_size=1), special).batches())

    assert whole == theirs
    assert pieces[0].token_ids[0].tolist() == theirs[:8]
    # A piece that goes on with a conversation begins as every text does.
    assert pieces[1].token_ids[0].tolist() == [0, *theirs[8:15]]


def test_there_is_one_bos_and_one_eos_whoever_writes_them(tmp_path, store):
    folder = make_model(tmp_path / "model", SIMPLE)
    add_talks(store, TALKS[:1])
    with store.open("talks") as reader:
        for bos in ("document", "none"):
            for eos in ("document", "none"):
                recipe = Recipe(chat_template=True, bos=bos, eos=eos, context_size=128)
                documents, special = open_documents(reader, folder, recipe)
                (batch,) = Packer(documents, recipe, special).batches()

                tokens = batch.token_ids.ravel().tolist()
                assert (tokens.count(0), tokens.count(1)) == (1, 1)
                assert (tokens[0], tokens[-1]) == (0, 1)


def test_the_date_in_a_template_is_always_the_same():
    asks = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}none{% endif %}"

    assert ChatRenderer(ChatTemplate(asks)).render([{}], 0) == "none"
    assert ChatRenderer(ChatTemplate("{{ strftime_now('%d %b %Y') }}")).render([{}], 0) == "26 Jul 2024"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ dict.__class__ }}{{ dict.mro() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ 'x'.format.__globals__ }}{{ '{0.__class__}'.format(1).nothing.here }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_is_named_with_the_document(source):
    with pytest.raises(CorpusMalformed, match="document 3") as caught:
        ChatRenderer(ChatTemplate(source)).render([{"role": "user", "content": "x"}], 3)
    assert caught.value.metadata["document"] == "3"


def test_a_template_that_is_none_is_unsupported():
    with pytest.raises(ModelUnsupported, match="compiled"):
        ChatRenderer(ChatTemplate("{% for %}"))


def test_a_template_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(chat, "RENDER_DEADLINE_S", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

    with pytest.raises(ModelUnsupported, match="longer than"):
        ChatRenderer(ChatTemplate(endless)).render([{}], 0)


def test_a_template_that_writes_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(chat.contents, "MAX_DOCUMENT_BYTES", 1000)

    with pytest.raises(CorpusMalformed, match="larger than"):
        ChatRenderer(ChatTemplate("{% for i in range(99999) %}word {% endfor %}")).render([{}], 0)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 1500000000 }}",
        "{% set x = 'a' * 1500000000 %}{{ x }}",
        "{{ '%1500000000d' % 1 }}",
        "{{ 'a' | center(1500000000) }}",
        "{{ ('a' * 1000) * 1000000 ~ 'b' * 900000000 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_that_takes_gigabytes_is_refused_and_the_next_conversation_is_not(children, source):
    template = ChatTemplate("{% if messages[0].content == 'bad' %}" + source + "{% else %}good{% endif %}")
    renderer = ConfinedRenderer(template, children)

    with pytest.raises(CorpusMalformed, match="memory") as caught:
        renderer.render([{"role": "user", "content": "bad"}], 7)
    assert caught.value.metadata == {"document": "7"}
    assert renderer.render([{"role": "user", "content": "well"}], 8) == "good"
    renderer.close()


def kill_child_while_it_renders(confined):
    """Kills the only child of the process that children come from, as the system does for want of memory."""
    zygote = confined._zygote._process.pid
    deadline = time.monotonic() + 10
    while not (pids := Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(int(pids[0]), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_a_conversation_whose_process_is_killed_is_not_skipped(tmp_path, store):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    folder = make_model(tmp_path / "model", endless)
    add_talks(store)
    recipe = Recipe(chat_template=True, skip_bad_documents=True)
    with (
        closing(Confined(errors=ServiceError, preload=("headrace_extractor.corpora.chat",))) as confined,
        store.open("talks") as reader,
    ):
        documents, _ = open_documents(reader, folder, recipe, confined)
        confined.warm()
        killing = threading.Thread(target=kill_child_while_it_renders, args=(confined,))
        killing.start()
        with pytest.raises(RunnerLost, match="for want of memory"):
            documents[0]
        killing.join()

    assert documents.n_skipped_before(1) == 0


def test_a_template_that_can_not_be_compiled_is_unsupported_in_a_child_too(children):
    with pytest.raises(ModelUnsupported, match="can't be compiled"):
        ConfinedRenderer(ChatTemplate("{% for %}"), children).render([{"role": "user", "content": "x"}], 0)


def test_a_template_without_end_is_left_in_a_child_too(children):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelUnsupported, match="longer than 4 s"):
        ConfinedRenderer(ChatTemplate(endless), children).render([{"role": "user", "content": "x"}], 0)


def test_bytes_that_are_no_conversation_any_more_are_damage(store):
    add_talks(store)
    file = store._root / "talks" / "documents.bin"
    file.write_bytes(b"x" + file.read_bytes()[1:])

    with store.open("talks") as reader, pytest.raises(DigestMismatch, match="document 0"):
        reader.messages(0)


def test_rows_of_conversations_are_counted_in_a_process_of_their_own(tmp_path, store, children, monkeypatch):
    folder = make_model(tmp_path / "model", SIMPLE)
    add_talks(store)
    recipe = Recipe(chat_template=True, context_size=32)
    with store.open("talks") as reader:
        documents, special = open_documents(reader, folder, recipe)
        expected = Packer(documents, recipe, special).count()

    counted = counting.count(store.path("talks"), folder, recipe, confinement=children)
    monkeypatch.setattr(counting, "_PAUSE_S", 0.0)
    with_pauses = counting.count(store.path("talks"), folder, recipe)

    assert counted == with_pauses
    assert (counted.n_rows, counted.n_tokens, counted.exact) == (expected.n_rows, expected.n_tokens, True)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(CorpusMalformed, match="document 0"):
        counting.count(store.path("talks"), folder, recipe)
