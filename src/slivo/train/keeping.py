"""How a training keeps what it has reached: on the disk to go on from, and to go back to when the loss is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from slivo.errors import SlivoError
from slivo.train import resume
from slivo.train.hooks import Hook, Stopped, TrainState
from slivo.train.inside import Inside, finite


class NotFiniteError(SlivoError):
    """The loss or the weights are NaN or infinite.

    Args:
        what: What is not finite, and where.
        rate: The learning rate by then.
    """

    def __init__(self, what: str, rate: str) -> None:
        super().__init__(
            f"{what}; lower the learning rate (now {rate}), clip gradients (ClipGradients), or look for NaN in the data"
        )
        self.what = what


@dataclass
class Keeping:
    """Checkpoints of a training, and the way back to the last good epoch.

    Args:
        checkpoint: The file, or None.
        settings: What a checkpoint must agree with.
        state: Of the training.
        hooks: Of the training.
        extra: What is trained beside the model.
        rollbacks: How often the training may go back.
    """

    checkpoint: Path | None
    settings: Mapping[str, Any]
    state: TrainState
    hooks: Sequence[Hook]
    extra: Sequence[Parameter]
    rollbacks: int
    _good: dict[str, Any] = field(default_factory=dict)

    def restore(self, stored: Mapping[str, Any] | None) -> Inside | None:
        """Bring the training to where a checkpoint was written; returns how far the epoch is that is under way."""
        if stored is None:
            return None
        place = self.checkpoint or Path("in memory")
        return resume.restore(place, stored, self.settings, self.state, self.hooks, self.extra)

    def begin(self, stored: Mapping[str, Any] | None) -> None:
        """Keep what the training starts from, to which it may have to go back."""
        if stored is None:
            if self.checkpoint is not None:
                resume.forget(self.checkpoint)
            self.save()

    def save(self, inside: Inside | None = None) -> None:
        """Write a checkpoint, and break the training off if a hook wants that."""
        if self.checkpoint is not None:
            resume.save(self.checkpoint, self._tree(inside))
        elif self.rollbacks and inside is None:
            self._good = resume.copied(self._tree())
        self.state.save = False
        if inside is not None and self.state.stop:
            raise Stopped

    def check(self) -> None:
        """Refuse weights that are not finite: with them there would be no good epoch to go back to.

        Raises:
            NotFiniteError: If there are some, and the training may go back.
        """
        trained = [each for group in self.state.optimizer.param_groups for each in group["params"]]
        if self.rollbacks and not finite(trained):
            rate = f"{self.state.scheduler.get_last_lr()[0]:g}"
            what = f"the weights are not finite after epoch {self.state.epoch}, step {self.state.step}"
            raise NotFiniteError(what, rate)

    def retreat(self, error: NotFiniteError) -> None:
        """Go back to the end of the last good epoch, and halve the learning rate.

        Raises:
            SlivoError: If that has been done too often.
        """
        notes = self.state.setbacks
        if not self.rollbacks:
            raise error
        if len(notes) >= self.rollbacks:
            raise SlivoError(
                f"{error}; the training went back {len(notes)} times to its last good epoch and halved the rate each "
                "time, in vain"
            ) from error
        epoch, step, kept = self.state.epoch, self.state.step, list(notes)
        stored = self._good if self.checkpoint is None else resume.load(self.checkpoint, whole=True)
        if stored is None:
            raise error
        self.restore(resume.copied(stored))
        scheduler, optimizer = self.state.scheduler, self.state.optimizer
        # By steps of two, which are exact: what was scheduled is scaled, whatever the schedule.
        scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
        scheduler._last_lr = [float(rate) / 2 for rate in scheduler.get_last_lr()]
        for group in optimizer.param_groups:
            group["lr"], group["initial_lr"] = group["lr"] / 2, group["initial_lr"] / 2
        rate = float(scheduler.base_lrs[0])
        self.state.setbacks = [*kept, {"epoch": epoch, "step": step + 1, "why": error.what, "lr": rate}]
        for hook in self.hooks:
            hook.on_fit_start(self.state)
        self.save()

    def _tree(self, inside: Inside | None = None) -> dict[str, Any]:
        return resume.state_of(self.settings, self.state, self.hooks, self.extra, inside)
