"""Inspects a folder in transformers' layout without loading it.

Parameter counts and bytes are exact: they come from the headers of the safetensors files. Config, index and headers are
parsed under confinement. Everything here blocks; callers run it in a thread and stop it through `ReadProgress.stop`.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace_chassis.confined.in_process import IN_PROCESS
from headrace_chassis.confined.limits import Limits
from headrace_chassis.confined.ports import Confinement, Refuse
from headrace_models.config import Network
from headrace_models.errors import ConfigInvalid, HeaderInvalid, JsonInvalid, TooManyTensors, WeightsAbsent
from headrace_models.folder import CONFIG, TOKENIZER, FileStamp, files_beside, files_read, sha256_of, weight_files
from headrace_models.gguf import parts_of
from headrace_models.json_files import read_config
from headrace_models.quantized import problem_of
from headrace_models.safetensors import MAX_TENSORS, read_header
from headrace_models.unsupported import why_unsupported
from headrace_registry.errors import DigestMismatch, ModelUnsupported
from headrace_registry.inputs import clean_text
from headrace_registry.models.cards import card_of
from headrace_registry.models.models import Architecture, ModelCard

# The largest models have some hundred files; a folder with more is a collection, registered by mistake.
_MAX_FILES = 10_000
# The format has some twenty; each is an entry of the model in answers.
_MAX_DTYPES = 64
_ADAPTER = "adapter_model.safetensors"
_MERGE = "it holds an adapter: merge it into its base model, and register the folder of the merged model"
# Files that make up a model. Caches, notes and weights in other formats beside them do not change its identity.
_MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")

# The parts of the largest published models parse in two seconds and 200 MB.
PARSE_LIMITS = Limits(memory_bytes=512 * 1024 * 1024, cpu_s=10, wall_s=60.0)


class Stopped(Exception):
    """`ReadProgress.stop` was set."""


@dataclass(slots=True)
class ReadProgress:
    """How far a thread has read a folder, shared with the loop that watches it."""

    total_bytes: int = 0
    done_bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def add(self, n_bytes: int) -> None:
        """Counts bytes; raises Stopped once `stop` is set."""
        self.done_bytes += n_bytes
        if self.stop.is_set():
            raise Stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Sums over the headers of all weight files."""

    n_parameters: int
    weight_bytes: int
    parameters_by_dtype: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The figures of a model's folder; `digest` covers every model file, `files` are stamps of those a load reads."""

    architecture: Architecture
    weights: Weights
    tokenizer_digest: str
    digest: str
    files: tuple[FileStamp, ...] = ()
    card: ModelCard = field(default_factory=ModelCard)


def inspect_folder(
    folder: Path,
    *,
    reading: ReadProgress,
    check_path: Callable[[Path], None] | None = None,
    confinement: Confinement = IN_PROCESS,
    full: bool = False,
) -> Inspection:
    """Reads the whole folder once. Raises ModelUnsupported, DigestMismatch, Stopped, and errors of `check_path`.

    The weights counted are those that a load reads; with `full` they must not be quantized.
    """
    if not folder.is_dir():
        raise ModelUnsupported(f"{folder} is no folder any more; restore it or register another path")
    paths = sorted(
        p for p in folder.iterdir() if p.suffix in _MODEL_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    if len(paths) > _MAX_FILES:
        raise ModelUnsupported(f"{folder} holds more than {_MAX_FILES} files; give the folder of one model")
    if odd := [path.name for path in paths if clean_text(path.name, len(path.name)) != path.name]:
        raise ModelUnsupported(f"the name of the file {odd[0]!r} is no UTF-8; rename or remove it")
    if check_path is not None:
        for path in paths:
            check_path(path)
    reading.total_bytes = sum(path.stat().st_size for path in paths)
    layout = confinement.run(
        read_layout, {"folder": str(folder), "full": full}, refuse=unreadable(folder.name), limits=PARSE_LIMITS
    )
    stamps = [FileStamp.of(folder / name) for name in layout["read"]]
    digests = {path.name: sha256_of(path, on_bytes=reading.add) for path in paths}
    if any(not FileStamp.of(folder / stamp.name).same_as(stamp) for stamp in stamps):
        raise ModelUnsupported("the folder's files changed while they were read; prepare the model when they are whole")
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return Inspection(
        architecture=Architecture(**layout["architecture"]),
        weights=Weights(**layout["weights"]),
        tokenizer_digest=digests.get(TOKENIZER, ""),
        digest="sha256:" + hashlib.sha256(lines.encode()).hexdigest(),  # The commit of local files.
        files=tuple(replace(stamp, sha256=digests.get(stamp.name, "")) for stamp in stamps),
        card=ModelCard(**layout["card"]),
    )


def unreadable(name: str) -> Refuse:
    """Returns the error for a model whose config, index or headers are beyond the limits of their parser."""
    return lambda why: ModelUnsupported(
        f"the config, the index or a header of {name} {why}; files of a model do not, so fetch or save them again"
    )


def read_layout(folder: str, full: bool) -> dict[str, Any]:
    """Parses config, index and headers; returns JSON of an Architecture, of Weights, and the names of the files read.

    Raises ModelUnsupported and DigestMismatch.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        remedy = _MERGE if (path / _ADAPTER).is_file() else "give a folder in transformers' layout"
        raise ModelUnsupported(f"the folder has no {CONFIG}; {remedy}")
    try:
        config = read_config(path)
    except JsonInvalid as exc:
        raise ModelUnsupported(str(exc)) from exc
    architecture = architecture_from(config)
    if why := why_unsupported(config):
        raise ModelUnsupported(f"a model of type {architecture.model_type!r} can't be captured: {why}")
    if full and (problem := problem_of(config)):
        raise ModelUnsupported(f"the model can't be loaded: {problem}")
    try:
        weights, read = read_weights(weight_files(path)), files_read(path)
    except (WeightsAbsent, JsonInvalid) as exc:
        raise ModelUnsupported(f"the folder can't be loaded: {words_of(exc)}") from exc
    return {
        "architecture": asdict(architecture),
        "weights": asdict(weights),
        "read": [each.name for each in read],
        "card": asdict(card_of(path, config)),
    }


def words_of(exc: WeightsAbsent | JsonInvalid) -> str:
    """Says what a folder lacks, and what to do."""
    if isinstance(exc, JsonInvalid):
        return f"{exc}; fetch it again"
    if _ADAPTER in exc.others:
        return f"it lacks {exc.problem}; {_MERGE}"
    if exc.others:
        return f"it lacks {exc.problem}, and no load reads {exc.others[0][:80]}; save it with save_pretrained()"
    return f"it lacks {exc.problem}; fetch the files that are missing, or convert the model with save_pretrained()"


def read_source(
    source: Path, reading: ReadProgress, check_path: Callable[[Path], None]
) -> tuple[tuple[FileStamp, ...], str]:
    """Reads a GGUF file, or all its parts; returns their stamps and a digest over all.

    Raises ModelUnsupported, Stopped, and errors of `check_path`.
    """
    try:
        parts = parts_of(source)
    except ValueError as exc:
        raise ModelUnsupported(str(exc)) from exc
    if absent := [part.name for part in parts if not part.is_file()]:
        raise ModelUnsupported(f"{source.name} lacks {', '.join(absent[:3])}; put all its parts beside it")
    for part in parts:
        check_path(part)
        with part.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelUnsupported(f"{part.name} is no GGUF file; give a file that starts with `GGUF`")
    stamps = [FileStamp.of(part) for part in parts]
    reading.total_bytes = sum(stamp.size_bytes for stamp in stamps)
    digested = [
        replace(stamp, sha256=sha256_of(part, on_bytes=reading.add)) for part, stamp in zip(parts, stamps, strict=True)
    ]
    if len(parts) == 1:
        return tuple(digested), digested[0].sha256
    lines = "".join(f"{stamp.sha256}  {stamp.name}\n" for stamp in digested)
    return tuple(digested), hashlib.sha256(lines.encode()).hexdigest()


def with_tokenizer(inspection: Inspection, folder: Path) -> Inspection:
    """Returns the inspection of the same files beside a tokenizer that was made since. Reads the files that are new.

    The commit stays that of the files from which the tokenizer was made.
    """
    known = {stamp.name: stamp for stamp in inspection.files}
    stamps = []
    for path in sorted({*(folder / name for name in known), *files_beside(folder)}):
        stamp, before = FileStamp.of(path), known.get(path.name)
        same = before is not None and stamp.same_as(before)
        stamps.append(before if before is not None and same else replace(stamp, sha256=sha256_of(path)))
    digest = next((stamp.sha256 for stamp in stamps if stamp.name == TOKENIZER), "")
    return replace(inspection, files=tuple(stamps), tokenizer_digest=digest)


def adopt_tokenizer(made: Path, folder: Path) -> None:
    """Copies the files that a node made into the folder of the model that lacks them, the tokenizer last."""
    for path in sorted(made.iterdir(), key=lambda each: each.name == TOKENIZER):
        target = folder / path.name
        if not path.is_symlink() and not target.exists():
            partial = folder / f".{path.name}.part"
            shutil.copyfile(path, partial)
            partial.replace(target)


def architecture_from(config: Mapping[str, Any]) -> Architecture:
    """Returns the numbers of a `config.json` that the registry keeps. Raises ModelUnsupported beyond their bounds."""
    try:
        network = Network.of_config(config)
    except ConfigInvalid as exc:
        raise ModelUnsupported(f"config.json: {exc}; mend the config") from exc
    return Architecture(
        model_type=network.model_type,
        class_name=network.class_name,
        n_layers=network.n_layers,
        d_model=network.d_model,
        n_heads=network.n_heads,
        n_kv_heads=network.n_kv_heads,
        d_head=network.d_head,
        d_mlp=network.d_mlp,
        vocab_size=network.vocab_size,
        context_window=network.context_window,
        tied_embeddings=network.tied_embeddings,
    )


def read_weights(paths: Iterable[Path]) -> Weights:
    """Sums the headers of safetensors files.

    Raises DigestMismatch for a damaged file, ModelUnsupported for no tensor at all or a name that occurs twice.
    """
    by_dtype: dict[str, int] = {}
    seen: set[str] = set()
    weight_bytes = 0
    for path in paths:
        try:
            header = read_header(path)
        except HeaderInvalid as exc:
            raise DigestMismatch(f"{exc}; fetch it again", metadata={"file": path.name}) from exc
        except TooManyTensors as exc:
            raise ModelUnsupported(f"{exc}; merge or split its tensors", metadata={"file": path.name}) from exc
        size = path.stat().st_size
        if header.file_bytes != size:
            raise DigestMismatch(
                f"{path.name} has {size} bytes, its header says {header.file_bytes}; fetch it again",
                metadata={"file": path.name},
            )
        for name, tensor in header.tensors.items():
            if name in seen:
                raise ModelUnsupported(f"tensor {name!r} is in two files of the folder; keep one copy of the weights")
            seen.add(name)
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.n_elements
            weight_bytes += tensor.n_bytes
        if len(seen) > MAX_TENSORS:
            raise ModelUnsupported(f"the files list more than {MAX_TENSORS} tensors, the most Headrace reads")
    if len(by_dtype) > _MAX_DTYPES:
        raise ModelUnsupported(f"the files list tensors of {len(by_dtype)} dtypes; fetch them again")
    if not seen:
        raise ModelUnsupported("the weight files hold no tensor; convert the model with save_pretrained() first")
    return Weights(n_parameters=sum(by_dtype.values()), weight_bytes=weight_bytes, parameters_by_dtype=by_dtype)
