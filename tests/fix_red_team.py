"""Files made to take a server's memory, time or life, each with the way in which it is handed in."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MIB = 1024 * 1024
PATTERN = r"(a+)+$"


def damaged_model(name: str, good: Path, folder: Path) -> Path:
    """A copy of a good model with one file that is not."""
    shutil.copytree(good, folder)
    MODELS[name](folder)
    return folder


def _config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _nested_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a":' * 200_000 + b"1" + b"}" * 200_000)


def _header(raw: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))


def _large_header(folder: Path) -> None:
    entry = b'"%07d":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    _header(b"{" + b",".join(entry % i for i in range(60 * MIB // len(entry % 0))) + b"}", folder)


def _long_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = b",".join(b'"%07d":"model-1.safetensors"' % i for i in range(1_500_000))
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map":{' + names + b"}}")


# Models that their preparation refuses, and a model whose files are only parsed when it is used.
MODELS: dict[str, Callable[[Path], None]] = {
    "a billion layers": _config(num_hidden_layers=10**9),
    "a vocabulary beyond 64 bits": _config(vocab_size=10**30),
    "a nested config": _nested_config,
    "a header of 60 MB": _large_header,
    "a nested header": lambda folder: _header(b'{"a":' * 200_000 + b"1" + b"}" * 200_000, folder),
    "a shape beyond 64 bits": lambda folder: _header(
        b'{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}}', folder
    ),
    "a product beyond 64 bits": lambda folder: _header(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}', folder
    ),
    "an index of 45 MB": _long_index,
}


def greedy_tokenizer(folder: Path) -> None:
    """Gives a model a tokenizer whose pattern takes exponential time."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    path.write_text(json.dumps(document))


def greedy_template(folder: Path) -> None:
    """Gives a model a chat template that takes gigabytes."""
    (folder / "chat_template.jinja").write_text("{{ 'a' * 1500000000 }}")


def _parquet_bomb() -> bytes:
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 600, pa.int32()), pa.array(["a" * (2 * MIB)]))
    table = pa.table({"text": one})
    file = io.BytesIO()
    pq.write_table(table, file, use_dictionary=["text"], compression="zstd", compression_level=19)
    assert file.tell() < 100_000
    return file.getvalue()


def _many_keys() -> bytes:
    pairs = b",".join(b'"%07d":1' % i for i in range(70 * MIB // 11))
    return b'{"text":"x",' + pairs + b"}\n"


def _crooked_npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


# Corpora by file name.
CORPORA: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a dictionary of one long text": ("bomb.parquet", _parquet_bomb),
    "a line of 70 MB with many keys": ("keys.jsonl", _many_keys),
    "a line of nested lists": ("lists.jsonl", lambda: b'{"text":' + b"[" * (40 * MIB) + b"\n"),
    "a line of many lists": ("many.jsonl", lambda: b'{"text":[' + b"[]," * (30 * MIB) + b"[]]}\n"),
    "one array of nested lists": ("array.json", lambda: b"[" * (20 * MIB)),
    "a header that is no Python": (
        "crooked.npy",
        lambda: _crooked_npy(b"{'descr': '<i4', 'shape': (((((" + b"(" * 9000),
    ),
    "a header of negative size": (
        "negative.npy",
        lambda: _crooked_npy(b"{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 4), }\n"),
    ),
    "a header of another type": (
        "type.npy",
        lambda: _crooked_npy(b"{'descr': [('a', '<i4', (1000000000,))], 'fortran_order': False, 'shape': (1,), }\n"),
    ),
}
