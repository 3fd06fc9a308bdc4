"""The whole job: train an SAE, save it, evaluate and analyse the saved SAE, write the results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from headrace_client import HeadraceClient
from headrace_client.values import Extraction
from headrace_train.arguments import Arguments
from headrace_train.reporting.progress import Meter, Reporter
from headrace_train.results import metadata
from headrace_train.results.findings import FILES, Findings, analyse
from headrace_train.results.folder import SAE_FOLDER, new_result
from headrace_train.rows.blocks import RowBlock, RowFilter, read_blocks
from headrace_train.rows.provider import MixingProvider
from headrace_train.rows.source import Source, locate
from headrace_train.training.evaluation import HeldOut, evaluate, held_out_rows
from headrace_train.training.trainer import Trained, choose_device, d_sae_of, fit, new_trainer
from headrace_train.training.watching import TrainingWatch

_READ_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Decisions taken before training begins. Rows before `n_train` are for training, the rest is held out."""

    arguments: Arguments
    source: Source
    device: str
    d_in: int
    d_sae: int
    n_train: int
    row_filter: RowFilter
    held_out: HeldOut


def run(client: HeadraceClient, arguments: Arguments, reporter: Reporter) -> bool:
    """Runs the whole job; returns False if Ctrl-C cut the training short."""
    started = time.monotonic()
    device = choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with new_result(arguments.out, overwrite=arguments.overwrite) as folder:
        facts = _run(client, arguments, reporter, device=device, folder=folder, started=started)
    reporter.finished(metadata.lines(facts, arguments.out), facts)
    return not facts["training"]["interrupted"]


def _run(
    client: HeadraceClient, arguments: Arguments, reporter: Reporter, *, device: str, folder: Path, started: float
) -> Mapping[str, Any]:
    """Trains, analyses, and writes all files into `folder`; returns the metadata."""
    meter = Meter()

    def waiting(extraction: Extraction) -> None:
        total, doing = extraction.n_rows_expected or 0, f"extraction {extraction.state.lower()}"
        reporter.tick(meter.tick("waiting", extraction.n_rows, total, doing=doing))

    plan = _plan(arguments, locate(client, arguments, waiting), device)
    _announce(plan, reporter)
    trained = _train(plan, reporter)
    trained.sae.save_inference_model(folder / SAE_FOLDER)
    sae = SAE.load_from_disk(folder / SAE_FOLDER, device=device)  # The SAE as its users will load it.
    findings = None
    if not trained.interrupted:
        findings = analyse(
            sae,
            plan.source,
            plan.row_filter,
            reporter,
            out=folder,
            n_top=arguments.top_rows,
            n_context_tokens=arguments.context_tokens,
        )
    facts = _facts(plan, trained, findings, sae, seconds=time.monotonic() - started)
    metadata.write(folder, facts)
    return facts


def _plan(arguments: Arguments, source: Source, device: str) -> Plan:
    d_in = source.width()
    n_held_out = held_out_rows(source.n_rows, d_in)
    n_train = source.n_rows - n_held_out
    row_filter = RowFilter(
        source.extraction.recipe, drop_bos=arguments.drop_bos, max_norm_multiple=arguments.max_norm_multiple
    )

    def held_out_blocks() -> Iterator[RowBlock]:
        with source.stream(batch_size=min(_READ_ROWS, n_held_out), start_row=n_train) as stream:
            yield from read_blocks(stream, source.hookpoint)

    return Plan(
        arguments=arguments,
        source=source,
        device=device,
        d_in=d_in,
        d_sae=d_sae_of(arguments, d_in),
        n_train=n_train,
        row_filter=row_filter,
        held_out=HeldOut(held_out_blocks, row_filter, n_rows=source.n_rows, n_held_out=n_held_out),
    )


def _announce(plan: Plan, reporter: Reporter) -> None:
    arguments, extraction = plan.arguments, plan.source.extraction
    n_held_out = plan.source.n_rows - plan.n_train
    reporter.note(
        f"{extraction.model_id} {plan.source.hookpoint}: {plan.n_train:,} rows of {plan.d_in} values, {n_held_out:,} "
        f"more held out; {arguments.architecture} SAE with {plan.d_sae:,} features on {plan.device}",
        set_id=extraction.set_id,
        extraction_id=extraction.id,
        n_train_rows=plan.n_train,
        n_held_out_rows=n_held_out,
    )
    left_out = ["first positions (BOS)"] if plan.row_filter.drop_bos else []
    if arguments.max_norm_multiple:
        left_out.append(f"rows longer than {arguments.max_norm_multiple:g} times the median")
    if left_out:
        reporter.note(f"left out: {', '.join(left_out)}")


def _train(plan: Plan, reporter: Reporter) -> Trained:
    arguments, source = plan.arguments, plan.source
    watch = TrainingWatch(reporter, plan.held_out, n_rows=arguments.rows, batch_size=arguments.batch_size)
    with source.stream(
        batch_size=_READ_ROWS, end_row=plan.n_train, epochs=None, on_progress=watch.on_progress
    ) as stream:
        provider = watch.provider = MixingProvider(
            read_blocks(stream, source.hookpoint),
            plan.row_filter,
            n_rows=plan.n_train,
            batch_size=arguments.batch_size,
            buffer_rows=arguments.buffer_rows,
            seed=arguments.seed,
            device=plan.device,
        )
        about = metadata.about_sae(source, source.model())
        trainer = new_trainer(arguments, provider, metadata=about, device=plan.device, on_step=watch.on_step)
        return fit(trainer, provider)


def _facts(plan: Plan, trained: Trained, findings: Findings | None, sae: Any, *, seconds: float) -> Mapping[str, Any]:
    source, arguments = plan.source, plan.arguments
    rows = plan.held_out.rows() if findings else plan.held_out.rows(0)
    return {
        **metadata.about_source(source, source.model()),
        "rows": {
            "total": source.n_rows,
            "training": plan.n_train,
            "held_out": source.n_rows - plan.n_train,
            **(metadata.about_counts(findings.counts) if findings else {}),
        },
        "training": metadata.about_training(arguments, trained, device=plan.device),
        "sae": sae.cfg.to_dict(),
        "metrics": metadata.about_metrics(evaluate(sae, rows) if rows is not None else None, findings),
        "stream": metadata.about_traffic(source.traffic),
        "files": [SAE_FOLDER, *(FILES if findings else ()), metadata.FILE],
        "versions": metadata.versions(),
        **metadata.about_time(seconds, datetime.now(UTC)),
    }
