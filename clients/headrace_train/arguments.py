"""The command line of `headrace-train`: checked values, no work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_REGISTRY = "127.0.0.1:7470"
ARCHITECTURES = ("topk", "batchtopk", "standard", "jumprelu", "gated")
NORMALIZATIONS = ("expected_average_only_in", "none")
USES_K = ("topk", "batchtopk")

_DESCRIPTION = """\
Trains a sparse autoencoder (SAE) with SAELens from the rows of an extraction,
while they are computed or afterwards. Writes OUT/sae (SAELens format),
OUT/features.parquet, OUT/top_rows.parquet and, last, OUT/metadata.json.
Ctrl-C during training saves the SAE as it is, without the tables, and exits
with 130."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The checked options of one run. `d_sae` None: `expansion` times the width of the rows."""

    registry: str
    extraction: str
    model: str
    corpus: str
    max_rows: int
    hookpoint: str
    token_file: Path | None
    ca_file: Path | None
    architecture: str
    d_sae: int | None
    expansion: int
    k: int
    sparsity: float | None
    lr: float
    batch_size: int
    rows: int
    normalize: str
    drop_bos: bool
    max_norm_multiple: float
    buffer_rows: int
    seed: int
    device: str
    threads: int
    top_rows: int
    context_tokens: int
    out: Path
    overwrite: bool
    json: bool
    debug: bool


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default only if it is a value; keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, "", False) else action.help


def parse(argv: Sequence[str] | None = None, *, registry: str = DEFAULT_REGISTRY) -> Arguments:
    """Reads the command line; ends the process with 2 and a message on bad use. `registry` stands in for --registry."""
    parser = argparse.ArgumentParser(
        prog="headrace-train", description=_DESCRIPTION, formatter_class=_Formatter, allow_abbrev=False
    )
    _add_source(parser.add_argument_group("rows"), registry)
    _add_training(parser.add_argument_group("training"))
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results; made if missing"
    )
    results.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result in --out, once the new one is complete"
    )
    results.add_argument("--top-rows", type=positive, default=10, metavar="N", help="strongest rows kept per feature")
    results.add_argument(
        "--context-tokens", type=whole_number, default=12, metavar="N", help="tokens of text on each side of a top row"
    )
    results.add_argument("--json", action="store_true", help="print progress and results as JSON lines")
    results.add_argument("--debug", action="store_true", help="print the stack trace of an error")

    arguments = Arguments(**vars(parser.parse_args(argv)))
    if bool(arguments.extraction) == bool(arguments.model or arguments.corpus):
        parser.error("give either --extraction, or --model and --corpus to start an extraction")
    if not arguments.extraction and not (arguments.model and arguments.corpus and arguments.hookpoint):
        parser.error("starting an extraction takes --model, --corpus and --hookpoint")
    return arguments


def _add_source(group: argparse._ArgumentGroup, registry: str) -> None:
    group.add_argument(
        "--registry",
        default=registry,
        metavar="HOST:PORT[,...]",
        help="address of the registry, or of its replicas, or unix:PATH; env: HEADRACE_REGISTRY",
    )
    group.add_argument("--extraction", default="", metavar="ID", help="extraction to read; it must keep all its rows")
    group.add_argument(
        "--model", default="", metavar="ID", help="instead of --extraction: start an extraction of this model"
    )
    group.add_argument("--corpus", default="", metavar="ID", help="with --model: corpus of the new extraction")
    group.add_argument(
        "--max-rows", type=whole_number, default=0, metavar="N", help="with --model: rows to extract; 0: all"
    )
    group.add_argument(
        "--hookpoint",
        default="",
        metavar="NAME",
        help="hookpoint to train on; may be left out if the extraction has one",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the bearer token; env: HEADRACE_TOKEN, the token"
    )
    group.add_argument(
        "--ca-file",
        type=Path,
        metavar="FILE",
        help="root certificates (PEM), or `system` for this machine's; turns TLS on; env: HEADRACE_CA_FILE",
    )
    group.add_argument(
        "--drop-bos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out first positions (BOS): attention sinks, often a hundred times longer than other rows",
    )
    group.add_argument(
        "--max-norm-multiple",
        type=number,
        default=10.0,
        metavar="X",
        help="leave out rows whose norm exceeds X times the median; 0: keep all",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--architecture", choices=ARCHITECTURES, default="topk", help="architecture, as SAELens names it"
    )
    group.add_argument("--d-sae", type=positive, metavar="N", help="number of features; overrides --expansion")
    group.add_argument(
        "--expansion", type=positive, default=8, metavar="N", help="features, as a multiple of the width of a row"
    )
    group.add_argument(
        "--k", type=positive, default=32, metavar="N", help="active features per row, for topk and batchtopk"
    )
    group.add_argument(
        "--sparsity",
        type=number,
        metavar="X",
        help="coefficient of the sparsity loss (standard, gated: L1; jumprelu: L0); SAELens' default if left out",
    )
    group.add_argument(
        "--lr", type=positive_number, default=3e-3, metavar="X", help="learning rate (Adam); take less for long runs"
    )
    group.add_argument("--batch-size", type=positive, default=1024, metavar="ROWS", help="rows per step")
    group.add_argument(
        "--rows", type=positive, default=100_000, metavar="N", help="rows to train on, in several epochs if need be"
    )
    group.add_argument(
        "--normalize", choices=NORMALIZATIONS, default=NORMALIZATIONS[0], help="scaling of rows, folded into the SAE"
    )
    group.add_argument("--buffer-rows", type=positive, default=32_768, metavar="N", help="rows mixed in memory")
    group.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="seed of the initial weights and of the mixing"
    )
    group.add_argument("--device", default="auto", help="torch device; auto: CUDA, then MPS, then CPU")
    group.add_argument(
        "--threads",
        type=whole_number,
        default=0,
        metavar="N",
        help="CPU threads; 0: torch's choice, which is too many if an extractor computes on the same cores",
    )


def whole_number(text: str) -> int:
    """Reads 0, 1, 2, …; `100_000` too."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive(text: str) -> int:
    """Reads 1, 2, 3, …."""
    value = whole_number(text)
    if not value:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def number(text: str) -> float:
    """Reads a finite number from 0 up."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return value


def positive_number(text: str) -> float:
    """Reads a finite number above 0."""
    value = number(text)
    if not value:
        raise argparse.ArgumentTypeError("must be above 0")
    return value
