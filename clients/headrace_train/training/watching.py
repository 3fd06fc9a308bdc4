"""Runs beside the training steps: reports progress, and evaluates on held-out rows ten times."""

from __future__ import annotations

from typing import Any

from headrace_client.values import Bottleneck, Progress
from headrace_train.reporting.progress import Meter, Reporter, Throttle
from headrace_train.rows.provider import MixingProvider
from headrace_train.training.evaluation import HeldOut, Metrics, evaluate
from headrace_train.training.trainer import WatchedTrainer, measure

PHASE = "training"
_N_EVALUATIONS = 10
_MEASURE_EVERY_S = 0.2  # Measuring each of many short steps would slow the training down.
_MOSTLY = 0.5


class TrainingWatch:
    """Follows one training on `n_rows` rows, evaluated on `held_out`."""

    def __init__(self, reporter: Reporter, held_out: HeldOut, *, n_rows: int, batch_size: int) -> None:
        self.provider: MixingProvider | None = None
        self._reporter = reporter
        self._held_out = held_out
        n_steps = -(-n_rows // batch_size)
        self._n_rows = n_steps * batch_size  # The last step takes a whole batch.
        self._evaluate_every = max(1, n_steps // _N_EVALUATIONS)
        self._meter = Meter()
        self._measure_due = Throttle(_MEASURE_EVERY_S)
        self._n_trained = 0
        self._n_steps = 0
        self._n_committed = 0
        self._figures: dict[str, float] = {}
        self._metrics: Metrics | None = None
        self._evaluated_at = 0

    def on_step(self, trainer: WatchedTrainer, output: Any) -> None:
        """Takes the output of a step, after it: measures, evaluates and reports when it is time."""
        self._n_trained, self._n_steps = trainer.n_training_samples, trainer.n_training_steps + 1
        last = self._n_trained >= self._n_rows
        if self._measure_due.due() or last:
            step = measure(output)
            self._figures = {"loss": step.loss, "l0": step.l0, "batch_explained_variance": step.explained_variance}
        if self._n_steps - self._evaluated_at >= self._evaluate_every:
            rows = self._held_out.sample(self._n_committed)
            if rows is not None:
                self._metrics = evaluate(trainer.sae, rows, scale=trainer.scale)
                self._evaluated_at = self._n_steps
        self._tell(last=last)

    def on_progress(self, progress: Progress) -> None:
        """Takes the progress of the stream, also while no rows arrive; reports the cause if training mostly waits."""
        self._n_committed = progress.n_rows_committed
        doing = ""
        if progress.state == "RECONNECTING":
            doing = "reconnecting"
        elif progress.stream_wait > _MOSTLY and progress.bottleneck is Bottleneck.EXTRACTOR:
            state = progress.extraction_state
            doing = f"waiting for the extractor ({state.lower()})" if state else "waiting for the extractor"
        elif progress.stream_wait > _MOSTLY:
            doing = "waiting for rows on their way"
        self._tell(doing=doing)

    def _tell(self, *, last: bool = False, doing: str = "") -> None:
        figures = dict(self._figures)
        if self._metrics is not None:
            figures.pop("batch_explained_variance", None)
            figures["explained_variance"] = self._metrics.explained_variance
        wait_s = self.provider.wait_s if self.provider else None
        tick = self._meter.tick(PHASE, self._n_trained, self._n_rows, wait_s=wait_s, doing=doing, **figures)
        self._reporter.tick(tick, last=last)
