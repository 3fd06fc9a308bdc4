"""`metadata.json`: the rows, the settings and the results of a training. Written last: it says that all files exist."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headrace_client.values import Model
from headrace_train.arguments import Arguments
from headrace_train.reporting.reporters import duration
from headrace_train.results.analysis import RowCounts
from headrace_train.results.findings import Findings
from headrace_train.results.folder import METADATA_FILE
from headrace_train.rows.source import Source, Traffic
from headrace_train.training.evaluation import Metrics
from headrace_train.training.trainer import Trained

FILE = METADATA_FILE
_PACKAGES = ("headrace", "sae-lens", "torch", "pyarrow")
_SETTINGS = (
    "architecture", "k", "sparsity", "lr", "batch_size", "normalize", "drop_bos", "max_norm_multiple", "buffer_rows",
    "seed",
)  # fmt: skip


def about_sae(source: Source, model: Model | None) -> dict[str, Any]:
    """Returns the metadata that SAELens keeps in the SAE's own configuration."""
    recipe = source.extraction.recipe
    return {
        "model_name": _model_name(source, model),
        "hook_name": source.hookpoint,
        "context_size": recipe.context_size,
        "prepend_bos": source.begins_with_bos(),
        "headrace_set_id": source.extraction.set_id,
        "headrace_commit_sha": model.commit_sha if model else "",
    }


def about_source(source: Source, model: Model | None) -> dict[str, Any]:
    """Returns where the rows come from: model, set, extraction, corpus, hookpoint and recipe."""
    extraction = source.extraction
    return {
        "model": {
            "id": extraction.model_id,
            "name": _model_name(source, model),
            "commit_sha": model.commit_sha if model else "",
            "quantization": str(model.quantization) if model else "",
            "tokenizer_digest": model.tokenizer_digest if model else "",
        },
        "set_id": extraction.set_id,
        "extraction_id": extraction.id,
        "corpus_id": extraction.corpus_id,
        "hookpoint": source.hookpoint,
        "recipe": asdict(extraction.recipe),
    }


def about_traffic(traffic: Traffic) -> dict[str, Any]:
    """Returns the rows and bytes streamed in all passes, at the pace of training and analysis."""
    return {
        "rows": traffic.rows,
        "bytes": traffic.size_bytes,
        "seconds": round(traffic.seconds, 2),
        "rows_per_s": round(traffic.rows / max(traffic.seconds, 1e-9), 1),
    }


def about_counts(counts: RowCounts) -> dict[str, int]:
    """Returns the numbers of rows analysed and left out; training leaves out the same rows."""
    n_left = counts.n_rows - counts.n_sinks - counts.n_outliers
    return {"analysed": n_left, "first_positions_left_out": counts.n_sinks, "outliers_left_out": counts.n_outliers}


def about_training(arguments: Arguments, trained: Trained, *, device: str) -> dict[str, Any]:
    """Returns the settings of the training, its duration and its rates."""
    return {
        **{name: getattr(arguments, name) for name in _SETTINGS},
        "device": device,
        "rows": trained.n_rows,
        "steps": trained.n_steps,
        "scale": trained.scale,
        "seconds": round(trained.seconds, 2),
        "rows_per_s": round(trained.n_rows / trained.seconds, 1),
        "wait_fraction": round(min(1.0, trained.wait_s / trained.seconds), 4),
        "interrupted": trained.interrupted,
    }


def about_metrics(metrics: Metrics | None, findings: Findings | None) -> dict[str, Any]:
    """Returns the final figures, on held-out rows; empty if Ctrl-C came before there were any."""
    facts: dict[str, Any] = {}
    if metrics is not None:
        facts |= asdict(metrics)
    if findings is not None:
        facts |= {"features": findings.n_features, "dead_features": findings.n_dead}
    return facts


def about_time(seconds: float, now: datetime) -> dict[str, Any]:
    """Returns when the whole run ended and how long it took."""
    return {"finished": now.isoformat(timespec="seconds"), "seconds": round(seconds, 2)}


def lines(facts: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Returns the results as lines of text: name to sentence."""
    training, metrics = facts["training"], facts["metrics"]
    found = {
        "model": f"{facts['model']['name']} {facts['model']['commit_sha'].removeprefix('sha256:')[:12]}".rstrip(),
        "hookpoint": facts["hookpoint"],
        "trained on": f"{training['rows']:,} rows in {duration(training['seconds'])}, {training['rows_per_s']:,.0f} "
        f"rows/s, {100 * training['wait_fraction']:.0f}% of it waiting for rows",
        "streamed": f"{facts['stream']['rows']:,} rows, {facts['stream']['bytes'] / 1e6:,.1f} MB in all passes",
    }
    if "explained_variance" in metrics:
        found["explained variance"] = f"{metrics['explained_variance']:.4f} on {metrics['n_rows']:,} held-out rows"
        found["L0"] = f"{metrics['l0']:.1f} active features a row"
    if "dead_features" in metrics:
        found["dead features"] = f"{metrics['dead_features']:,} of {metrics['features']:,}"
    found["files"] = f"{out}: " + ", ".join(facts["files"])
    if training["interrupted"]:
        found["interrupted"] = "the SAE is saved as it was; there are no tables"
    return found


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers; empty for a package without one."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the file; a crash leaves the whole file or none."""
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def _model_name(source: Source, model: Model | None) -> str:
    return model.source.location if model and model.source.kind == "hub" else source.extraction.model_id
