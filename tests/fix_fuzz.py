"""Fuzzing of every parser of bytes from outside: good files, changed at random, and given to what servers run.

`run_inputs` runs under confinement, so that an input which ends its process ends a child. An input that a parser takes,
or refuses with an error of ours, is as it should be; anything else is a finding.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fix_registry import LLAMA
from headrace_chassis.errors import ServiceError
from headrace_extractor.corpora.chat import ChatRenderer
from headrace_extractor.corpora.chat_template import ChatTemplate
from headrace_extractor.corpora.files.parsers import parse
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec
from headrace_extractor.corpora.tokenizer import Tokenizer
from headrace_extractor.hookpoints.catalogues import tell_network, tell_shapes
from headrace_models.errors import ModelFilesError
from headrace_models.folder import INDEX
from headrace_models.safetensors import read_header
from headrace_registry.models.files import read_layout
from headrace_registry.models.registration import problem_in
from headrace_registry.sizing.headers import told_profile

PART = "model-00001-of-00001.safetensors"
TALK = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": None}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m['content'] | default('') | tojson }}{{ '%5s' % m.role }}{% endfor %}"
    "{{ eos_token }}"
)
FALCON = {"model_type": "falcon", "n_layer": 2, "hidden_size": 64, "num_attention_heads": 4, "multi_query": True}
MOE = LLAMA | {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": [0], "rope_parameters": {}}
BLOOM = {
    "model_type": "bloom",
    "n_layer": 2,
    "hidden_size": 64,
    "n_head": 4,
    "slow_but_exact": True,
    "pretraining_tp": 2,
}
GRANITE = LLAMA | {"model_type": "granite", "residual_multiplier": 0.2, "layer_types": ["full_attention"]}


# Targets: a name, its good files, and the parser. A parser takes bytes.


def _config(data: bytes) -> None:
    with _folder({"config.json": data}) as folder:
        tell_network({**_MODEL, "files_path": folder})


def _header(data: bytes) -> None:
    with _folder({"model.safetensors": data}) as folder:
        read_header(Path(folder) / "model.safetensors")


def _model(data: bytes) -> None:
    """Config, index and header in one file of blocks, each with its size before it."""
    refusals: list[Exception] = []
    with _folder(dict(zip(("config.json", INDEX, PART), _blocks(data), strict=False))) as folder:
        for read in (
            lambda: read_layout(folder, True),
            lambda: told_profile(folder, None),
            lambda: problem_in(folder),
            lambda: _ask(tell_shapes({**_MODEL, "files_path": folder}), ["layers.0.mlp", "out"]),
        ):
            try:
                read()
            except (ServiceError, ModelFilesError) as exc:
                refusals.append(exc)
    for refusal in refusals:
        raise refusal


def _tokenizer(data: bytes) -> None:
    tokenizer_json, tokenizer_config, config = [*_blocks(data), b"{}", b"{}", b"{}"][:3]
    files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config, "config.json": config}
    with _folder(files) as folder:
        tokenizer = Tokenizer.load(folder)
        tokenizer.encode_batch(["the water drives ä the wheel", "aaaaaaaaaa!"])
        tokenizer.decode_each([0, 1, 5])


def _template(data: bytes) -> None:
    with _folder({"chat_template.jinja": data}) as folder:
        ChatRenderer(ChatTemplate.load(folder)).render(TALK, 0)


def _corpus(format_: CorpusFormat, name: str, **spec: object) -> Callable[[bytes], None]:
    checked = CorpusSpec(id="c", format=format_, **spec)

    def run(data: bytes) -> None:
        for document in parse(io.BytesIO(data), checked, name):
            assert isinstance(document, bytes)

    return run


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": _config,
    "header": _header,
    "model": _model,
    "tokenizer": _tokenizer,
    "template": _template,
    "txt": _corpus(CorpusFormat.TXT, "a.txt"),
    "jsonl": _corpus(CorpusFormat.JSONL, "a.jsonl"),
    "json": _corpus(CorpusFormat.JSONL, "a.json", text_column="a.b"),
    "chat": _corpus(CorpusFormat.JSONL, "a.jsonl", chat=True),
    "csv": _corpus(CorpusFormat.CSV, "a.csv"),
    "parquet": _corpus(CorpusFormat.PARQUET, "a.parquet"),
    "parquet chat": _corpus(CorpusFormat.PARQUET, "a.parquet", chat=True),
    "npy": _corpus(CorpusFormat.TOKEN_IDS, "a.npy"),
    "token ids": _corpus(CorpusFormat.TOKEN_IDS, "a.parquet"),
}


@cache
def seeds(target: str) -> list[bytes]:
    """Good files for a target."""
    header = json.dumps({"layers.0.mlp.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(24)
    index = json.dumps({"weight_map": {"layers.0.mlp.weight": PART}}).encode()
    configs = [json.dumps(each).encode() for each in (LLAMA, FALCON, MOE, BLOOM, GRANITE, {"text_config": LLAMA})]
    lines = [b'{"text": "one"}\n{"text": "tw\\u00f6"}\r\n\n{"text": "\xc3\xa4", "n": [1, {}]}\n']
    talks = json.dumps({"text": TALK}).encode() + b"\n"
    return {
        "config": lambda: configs,
        "header": lambda: [weights],
        "model": lambda: [_joined(config, index, weights) for config in configs],
        "tokenizer": lambda: [_joined(_good_tokenizer(), b'{"bos_token": "<s>"}', b'{"vocab_size": 260}')],
        "template": lambda: [TEMPLATE.encode(), b"{% set x = namespace(a=1) %}{{ x.a ~ messages | length }}"],
        "txt": lambda: [b"one\ntwo\n\nthree\r\n\r\nfour\five", b"a\rb\r\rc"],
        "jsonl": lambda: lines,
        "json": lambda: [b'[{"a": {"b": "x"}}, "text", {"a": {"b": "y"}, "n": [[[]]]}]', b'{"a.b": "x"}\n'],
        "chat": lambda: [talks * 2, json.dumps([TALK, TALK]).encode()],
        "csv": lambda: [b'id,text\n1,"a ""b""\nc"\n2,plain\n'],
        "parquet": lambda: [
            _parquet({"text": ["one", "two"] * 20}),
            _parquet({"text": [b"x", b"y"]}, compression="none"),
        ],
        "parquet chat": lambda: [_parquet({"text": [[{"role": "user", "content": "a"}]] * 5})],
        "npy": lambda: [_npy(np.arange(12, dtype="<i4").reshape(3, 4)), _npy(np.arange(4, dtype=">u8"))],
        "token ids": lambda: [_parquet({"text": [[1, 2], [3]]}), b'{"text": [1, 2]}\n'],
    }[target]()


def changed(data: bytes, rng: random.Random) -> bytes:  # noqa: C901 -- one case a kind of change
    """A good file with a few changes: bytes, numbers, nesting, parts left out, doubled or taken from elsewhere."""
    raw = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(9):
            case 0 if at < len(raw):
                raw[at] = rng.randrange(256)
            case 1 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 2:
                del raw[at : at + rng.randrange(1, 40)]
            case 3:
                raw[at:at] = rng.choice(_PIECES)
            case 4:
                start = rng.randrange(len(raw) + 1)
                raw[at:at] = raw[start : start + rng.randrange(1, 60)]
            case 5:
                raw = raw[:at]
            case 6:
                digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
                if digits:
                    where = rng.choice(digits)
                    raw[where : where + 1] = rng.choice(_NUMBERS)
            case 7:
                raw[at:at] = rng.choice((b"[", b"{", b"(", b'{"a":')) * rng.choice((3, 1000, 100_000))
            case 8:
                raw[at : at + 8] = struct.pack("<q", rng.choice((-1, 0, 2**31, 2**62, rng.randrange(2**63))))
    return bytes(raw)


_NUMBERS = [
    b"-1",
    b"0",
    b"1e999",
    b"1.5",
    b"NaN",
    b"9" * 30,
    b"9" * 5000,
    b"null",
    b"true",
    b'"x"',
    b"[]",
    b"{}",
    b"1000000000",
]
_PIECES = [
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b'"',
        b"\\",
        b"\\ud800",
        b",",
        b":",
        b"}",
        b"]",
        b"\xf0\x9f",
    ),
    *(
        b"null",
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b" * 999999999",
        b"|tojson",
        b"|center(99999999)",
        b"range(10**9)",
        b"(a+)+$",
    ),
    *(b'"num_hidden_layers": 1000000000,', b'"shape": [9999999999],', b'"layer_types": 3,', b'"text": [1, 2],'),
]


def run_inputs(target: str, seed: int, seconds: float) -> dict[str, object]:
    """Runs changed files for so long; returns the number of inputs, how many were refused, and a finding if any."""
    rng, parser, end = random.Random(seed), TARGETS[target], time.monotonic() + seconds
    n_inputs = n_refused = 0
    while time.monotonic() < end:
        data = changed(rng.choice(seeds(target)), rng)
        n_inputs += 1
        try:
            parser(data)
        except (ServiceError, ModelFilesError):
            n_refused += 1
        except MemoryError:
            raise
        except BaseException as exc:  # noqa: BLE001 -- panics of libraries are no Exception
            finding = f"{type(exc).__name__}: {exc}"[:300]
            return {"n_inputs": n_inputs, "n_refused": n_refused, "finding": finding, "input": data[:4000].hex()}
    return {"n_inputs": n_inputs, "n_refused": n_refused, "finding": "", "input": ""}


_MODEL = {
    "id": "m",
    "source": "folder",
    "commit_sha": "c",
    "quantization": "none",
    "load_options": {},
    "ready": True,
    "model_type": "llama",
    "n_layers": 2,
    "d_model": 8,
    "context_window": 64,
    "weight_bytes": 1,
    "tokenizer_digest": "",
}


class _folder:  # noqa: N801 -- a context manager like a function
    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._made = tempfile.TemporaryDirectory()

    def __enter__(self) -> str:
        for name, data in self._files.items():
            (Path(self._made.name) / name).write_bytes(data)
        return self._made.name

    def __exit__(self, *_: object) -> None:
        self._made.cleanup()


def _ask(steps, question):
    next(steps)
    return steps.send(question)


def _joined(*blocks: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def _blocks(data: bytes) -> list[bytes]:
    """The blocks of a file that was changed: sizes may be anything."""
    blocks, at = [], 0
    while at + 4 <= len(data) and len(blocks) < 3:
        size = min(struct.unpack_from("<I", data, at)[0], len(data) - at - 4)
        blocks.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return blocks


def _good_tokenizer() -> bytes:
    alphabet = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\s+"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "<extra>"])
    return inner.to_str().encode()


def _parquet(columns: dict[str, list[object]], **options: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
