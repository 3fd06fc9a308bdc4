"""The messages between the extractor server and a runner process: one JSON object a line.

Commands go to the runner's standard input, events come from its standard output; all other output of the runner goes to
standard error. Activations never travel here, only row numbers: the log is the channel. End of input means that the
server is gone, and the runner exits at once.

    server → runner   prepare · load · extract · grant · stop · convert · quantize · validate
    runner → server   prepared · loading · loaded · committed · blocked · finished · failed · converting · converted
                      · quantized · step · validated
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from headrace_models.folder import FileStamp

# The longest line is an `extract` of all hookpoints of a large model: a few thousand names.
MAX_LINE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Base of all commands and events; `KIND` is the value of the JSON key `kind`."""

    KIND: ClassVar[str] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare(Message):
    """Import what a load needs. Answered by `prepared`, at once if that is done, or by `failed`."""

    KIND: ClassVar[str] = "prepare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Message):
    """Load the model in `files_path` onto `device`. Answered by `loading` events, then `loaded` or `failed`."""

    KIND: ClassVar[str] = "load"
    files_path: str
    device: str  # `cpu`, `cuda:0`, `mps`
    dtype: str  # compute dtype: `float32`, `bfloat16`, `float16`
    quantization: str = "none"
    load_options: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[FileStamp] = ()  # The files as they were when the model was prepared; empty: not known.


@dataclass(frozen=True, slots=True, kw_only=True)
class Extract(Message):
    """Append rows to the set in `set_path` until the corpus ends, `max_rows` exist, or `stop`.

    Recipe and column layout come from the set's manifest. The run goes on behind the last row that is sealed in all of
    `columns`. Rows from `grant_row` on wait for a `grant` (None: no limit). Answered by `committed` and `blocked`, then
    `finished` or `failed`.
    """

    KIND: ClassVar[str] = "extract"
    set_id: str  # The name of the run: its events carry it, and so do `grant` and `stop` for it.
    set_path: str  # The folder with its manifest, made by the server: the runner never computes a set's identity.
    corpus_path: str  # The documents are read from disk: no text crosses the pipe.
    # Empty: all columns of the set. The server names those that lack rows, so that no column is computed twice.
    columns: Sequence[str] = ()
    # Row at which the run ends; 0: at the end of the corpus. Extractions of one set want different numbers of rows, so
    # the manifest can't hold it.
    max_rows: int = 0
    # A set of retention WINDOW may not overwrite rows that readers still need, and only the server knows its readers.
    grant_row: int | None = None
    allow_non_finite: bool = False  # Count NaN and infinite values instead of failing: the client's choice, per run.


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant(Message):
    """Rows before `row` may be written."""

    KIND: ClassVar[str] = "grant"
    set_id: str
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Message):
    """Seal the rows written so far and finish."""

    KIND: ClassVar[str] = "stop"
    set_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert(Message):
    """Convert `source_path`, a GGUF file or a folder with pickled weights, to a folder with safetensors.

    With `tokenizer`, make a folder of links to the files in `source_path`, and a tokenizer.json from its tokenizer.
    """

    KIND: ClassVar[str] = "convert"
    source_path: str
    target_path: str
    tokenizer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(Message):
    """Quantize the model in `source_path` into a folder at `target_path`, and compare the two in `dtype`.

    Answered by `converting` events, then `quantized` or `failed`.
    """

    KIND: ClassVar[str] = "quantize"
    source_path: str
    target_path: str
    quantization: str
    dtype: str
    load_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validate(Message):
    """Try a model with these options and unload it again. Answered by `step` events, then `validated`."""

    KIND: ClassVar[str] = "validate"
    files_path: str
    device: str
    dtype: str
    quantization: str = "none"
    load_options: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[FileStamp] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Message):
    """What a load needs is imported."""

    KIND: ClassVar[str] = "prepared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading(Message):
    """Bytes of weights read so far."""

    KIND: ClassVar[str] = "loading"
    done_bytes: int
    total_bytes: int


# Under this key, a set's resume points have the number of documents that were skipped up to there.
N_SKIPPED = "n_skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Message):
    """The model is on its device."""

    KIND: ClassVar[str] = "loaded"
    measured_bytes: int
    runtime_bytes: int = 0  # memory of the process before the load, with its libraries; 0 if not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Message):
    """Rows before `n_rows` are readable."""

    KIND: ClassVar[str] = "committed"
    set_id: str
    n_rows: int  # The watermark, counted from the set's first row: the server serves rows before it to readers.
    n_tokens: int = 0  # Tokens through the model in this run, dropped ones included: the work done, also without rows.
    n_non_finite: int = 0  # NaN and infinite values in the columns of this run so far, for the extractions' state.
    n_skipped: int = 0  # Documents from the corpus's first on that gave no rows since they can't be tokenized.


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked(Message):
    """The run waits: its next row is not granted yet."""

    KIND: ClassVar[str] = "blocked"
    set_id: str
    n_rows: int  # The first row that waits: shows in a trace of the pipe which `grant` is missing.


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Message):
    """The run is over and all its rows are sealed; `complete` when the corpus is exhausted."""

    KIND: ClassVar[str] = "finished"
    set_id: str
    n_rows: int  # Fewer than the last `committed` if a segment of added columns stayed partial, which is not sealed.
    complete: bool  # False after `stop` and at `max_rows`: the corpus may have more rows.
    n_non_finite: int = 0  # As in `committed`, which a run over a complete set never sends.
    n_skipped: int = 0  # As in `committed`.


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """A command failed. `reason` is an ErrorReason without prefix; `set_id` is empty for all but extract."""

    KIND: ClassVar[str] = "failed"
    reason: str
    message: str
    set_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Converting(Message):
    """Bytes of the source handled so far."""

    KIND: ClassVar[str] = "converting"
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted(Message):
    """The target folder is complete."""

    KIND: ClassVar[str] = "converted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized(Message):
    """The target folder is complete; `fidelity` is `reference_dtype`, `n_tokens` and `layers`."""

    KIND: ClassVar[str] = "quantized"
    fidelity: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Message):
    """A step of a validation has begun (RUNNING) or ended (PASSED, FAILED, SKIPPED)."""

    KIND: ClassVar[str] = "step"
    name: str
    state: str
    message: str = ""
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""  # an ErrorReason without prefix, if the step broke off; empty for a check that did not pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Message):
    """All steps of the runner are over."""

    KIND: ClassVar[str] = "validated"
    versions: Mapping[str, str]


_COMMANDS = (Prepare, Load, Extract, Grant, Stop, Convert, Quantize, Validate)
_EVENTS = (
    *(Prepared, Loading, Loaded, Committed, Blocked, Finished, Failed),
    *(Converting, Converted, Quantized, Step, Validated),
)
_KINDS: dict[str, type[Message]] = {kind.KIND: kind for kind in (*_COMMANDS, *_EVENTS)}


def encode(message: Message) -> bytes:
    """Encodes a message as one line."""
    return json.dumps({"kind": message.KIND, **asdict(message)}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Decodes one line; raises ValueError if it is not a known message."""
    fields = json.loads(line)
    try:
        if "files" in fields:
            fields["files"] = tuple(FileStamp(**each) for each in fields["files"])
        return _KINDS[fields.pop("kind")](**fields)
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"not a runner message: {line[:200]!r}") from exc
