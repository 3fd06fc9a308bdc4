"""The files of a model's folder that a load reads: names of the weights, and stamps by which a change is noticed.

A stamp is cheap to compare: size, time and inode. Where it differs, the file's digest decides: a copied or touched file
has the same content.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from headrace_models.errors import WeightsAbsent
from headrace_models.json_files import read_config, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
_INDEX_ENDING = ".safetensors.index.json"
# All that a load or a tokenizer looks for beside the weights, also to find that there is none.
_LOOKED_FOR = (
    CONFIG,
    "generation_config.json",
    SINGLE,
    INDEX,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# A tokenizer in a form that transformers converts: words with merges, one word a line, a model of sentencepiece.
_OLDER_TOKENIZERS = (
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
)
# Large enough for a disk's sequential speed, small enough for smooth progress and a prompt stop.
_READ_BYTES = 4 * 1024 * 1024
# Several calls about one model at once read its files once.
_DIGESTING = threading.Lock()


def index_name(present: Collection[str], config: Mapping[str, Any]) -> str | None:
    """Returns the name of the index by which the weights are found; None where a single file holds them.

    `present` are the names beside `config.json`. A config may name its weights or its index. Raises WeightsAbsent.
    """
    name = _first_read(present, config)
    return name if name.endswith(_INDEX_ENDING) else None


def weight_names(present: Collection[str], config: Mapping[str, Any], index: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the files that hold a model's weights: a single file, or all that the index names.

    `index` is the content of the file that `index_name` names, empty without one. Raises WeightsAbsent.
    """
    first = _first_read(present, config)
    if not first.endswith(_INDEX_ENDING):
        return (first,)
    table = index.get("weight_map")
    named = list(table.values()) if isinstance(table, Mapping) else []
    if not named or not all(isinstance(name, str) and name.endswith(".safetensors") for name in named):
        raise WeightsAbsent(f"safetensors files that {first} names")
    names = set(named)
    if absent := sorted(names - set(present)):
        raise WeightsAbsent(f"{', '.join(name[:80] for name in absent[:5])}, which {first} names")
    return tuple(sorted(names))


def _first_read(present: Collection[str], config: Mapping[str, Any]) -> str:
    """Returns the name of the file that a load opens first: the weights, or their index. Raises WeightsAbsent."""
    named = config.get("transformers_weights")
    name = named if named is not None else SINGLE if SINGLE in present else INDEX
    if isinstance(name, str) and name in present:
        return name
    what = f"{SINGLE} and {INDEX}"
    if named is not None:
        what = repr(named[:80]) if isinstance(named, str) else f"a file name as transformers_weights of {CONFIG}"
    raise WeightsAbsent(what, others=sorted(other for other in present if other.endswith(".safetensors")))


def has_older_tokenizer(present: Collection[str]) -> bool:
    """True if the names beside `config.json` are those of a tokenizer without a TOKENIZER."""
    return TOKENIZER not in present and any(set(names) <= set(present) for names in _OLDER_TOKENIZERS)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files in a folder that hold its model's weights. Raises WeightsAbsent, JsonInvalid and OSError."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    config = read_config(folder)
    indexed = index_name(present, config)
    index = read_object(folder / indexed) if indexed else {}
    return [folder / name for name in weight_names(present, config, index)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """One file as it was; an empty digest is not known."""

    name: str
    size_bytes: int
    mtime_ns: int
    inode: int
    sha256: str = ""

    @classmethod
    def of(cls, path: Path, *, sha256: str = "") -> FileStamp:
        """Stamps a file, or the file that a link leads to. Raises OSError."""
        found = path.stat()
        return cls(
            name=path.name,
            size_bytes=found.st_size,
            mtime_ns=found.st_mtime_ns,
            inode=found.st_ino,
            sha256=sha256,
        )

    def same_as(self, other: FileStamp) -> bool:
        """True if both are stamps of one file between whose dates nothing was written."""
        return replace(self, sha256="") == replace(other, sha256="")


def files_read(folder: Path) -> list[Path]:
    """Returns the files that a load of the folder reads. Raises WeightsAbsent, JsonInvalid and OSError."""
    return sorted({*weight_files(folder), *files_beside(folder)})


def files_beside(folder: Path) -> list[Path]:
    """Returns the files that a load or a tokenizer looks for beside the weights. Parses nothing."""
    return [folder / name for name in _LOOKED_FOR if (folder / name).is_file()]


def changed_files(
    folder: Path,
    stamps: Iterable[FileStamp],
    *,
    beside: bool = True,
    digest_all: bool = False,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Returns the names of files that are not as they were stamped: of other content, gone, or with `beside` new.

    A file is read only if its stamp differs and its size does not, or with `digest_all`; `on_bytes` gets the bytes of
    each piece read. A file that can't be read counts as changed.
    """
    known = {stamp.name: stamp for stamp in stamps}
    changed = []
    for stamp in known.values():
        path = folder / stamp.name
        try:
            now = FileStamp.of(path)
            same = now.same_as(stamp) and not (digest_all and stamp.sha256)
            if not same and now.size_bytes == stamp.size_bytes and stamp.sha256:
                digest = sha256_of(path, on_bytes=on_bytes) if digest_all else _digest_at(path, now)
                same = digest == stamp.sha256
        except OSError:
            same = False
        if not same:
            changed.append(stamp.name)
    # `Path.exists` raises in a folder that may not be entered.
    new = [name for name in _LOOKED_FOR if name not in known and os.path.exists(folder / name)]  # noqa: PTH110
    return sorted([*changed, *(new if beside else ())])


def _digest_at(path: Path, stamp: FileStamp) -> str:
    """Returns the digest of a file, which is read once for each of its stamps, also by several threads at once."""
    with _DIGESTING:
        return _remembered_digest(path, stamp)


@lru_cache(maxsize=4096)
def _remembered_digest(path: Path, _stamp: FileStamp) -> str:
    return sha256_of(path)


def sha256_of(path: Path, *, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Returns the SHA-256 of a file, hex; `on_bytes` gets the bytes of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()
