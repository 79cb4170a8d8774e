"""Progress of a training, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from slivo.train.hooks import Hook, TrainState

Report = Callable[[str, int, int, Mapping[str, float]], None]
"""``report(label, done, total, fields)``: steps done, steps in all, and figures worth showing."""


class Progress(Hook):
    """Report after every few steps and after every epoch.

    Args:
        report: What is told; called at most once a step, so it should be quick.
        label: Name of the training.
        every: Steps between reports. An epoch's last step is reported with the epoch's validation.
    """

    def __init__(self, report: Report, label: str, *, every: int = 1) -> None:
        self.report = report
        self.label = label
        self.every = max(1, every)

    def on_fit_start(self, state: TrainState) -> None:
        """Report where the training starts: at 0, or where it resumes."""
        self.report(self.label, state.step, state.total_steps, {"epoch": float(state.epoch)})

    def on_step_end(self, state: TrainState) -> None:
        """Report the loss."""
        if state.step % self.every == 0:
            fields = {"epoch": float(state.epoch), "loss": sum(state.terms.values())}
            self.report(self.label, state.step, state.total_steps, fields)

    def on_epoch_end(self, state: TrainState) -> None:
        """Report the epoch's mean loss and validation."""
        row = state.history[-1]
        fields = {"epoch": float(row["epoch"]), "loss": row["loss"], "lr": row["lr"], **row["val"]}
        self.report(self.label, state.step, state.total_steps, fields)
