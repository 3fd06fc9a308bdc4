"""What happens beside the training steps: progress is told, and held-out rows are evaluated now and then."""

from __future__ import annotations

from typing import Any

from headrace_client.values import Progress
from headrace_client.waits import Bottleneck
from headrace_train.reporting.progress import Meter, Reporter, Throttle
from headrace_train.rows.provider import MixingProvider
from headrace_train.training.evaluation import HeldOut, Metrics, evaluate
from headrace_train.training.trainer import WatchedTrainer, measure

PHASE = "training"
_N_EVALUATIONS = 10
_MEASURE_EVERY_S = 0.2
_MOSTLY = 0.5


class TrainingWatch:
    """Follows one training. `n_rows` is what it will train on, `held_out` what it is evaluated on."""

    def __init__(self, reporter: Reporter, held_out: HeldOut, *, n_rows: int, batch_size: int) -> None:
        self.provider: MixingProvider | None = None
        self._reporter = reporter
        self._held_out = held_out
        n_steps = -(-n_rows // batch_size)
        self._n_rows = n_steps * batch_size  # The last step is a whole one.
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
        """After each step."""
        self._n_trained, self._n_steps = trainer.n_training_samples, trainer.n_training_steps + 1
        last = self._n_trained >= self._n_rows
        if self._measure_due.due() or last:
            step = measure(output)
            self._figures = {"loss": step.loss, "l0": step.l0, "batch_explained_variance": step.explained_variance}
        self._evaluate(trainer)
        self._tell(last=last)

    def on_progress(self, progress: Progress) -> None:
        """While rows come in, and while they do not."""
        self._n_committed = progress.n_rows_committed
        self._tell(doing=_doing(progress))

    def _evaluate(self, trainer: WatchedTrainer) -> None:
        if self._n_steps - self._evaluated_at < self._evaluate_every:
            return
        rows = self._held_out.sample(self._n_committed)
        if rows is not None:
            self._metrics = evaluate(trainer.sae, rows, scale=trainer.scale)
            self._evaluated_at = self._n_steps

    def _tell(self, *, last: bool = False, doing: str = "") -> None:
        figures = dict(self._figures)
        if self._metrics is not None:
            figures.pop("batch_explained_variance", None)
            figures["explained_variance"] = self._metrics.explained_variance
        wait_s = self.provider.wait_s if self.provider else None
        tick = self._meter.tick(PHASE, self._n_trained, self._n_rows, wait_s=wait_s, doing=doing, **figures)
        self._reporter.tick(tick, last=last)


def _doing(progress: Progress) -> str:
    """What the trainer waits for, if it mostly waits."""
    if progress.state == "RECONNECTING":
        return "reconnecting"
    if progress.stream_wait <= _MOSTLY:
        return ""
    if progress.bottleneck is Bottleneck.EXTRACTOR:
        state = progress.extraction_state
        return f"waiting for the extractor ({state.lower()})" if state else "waiting for the extractor"
    return "waiting for rows on their way"
