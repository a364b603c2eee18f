"""A training loop for classifiers that loses nothing when it is interrupted, on one process or on several.

A run that was killed at any moment and resumed ends with the same bits as one that was not: whatever is random follows from
the seed and the step, and a snapshot holds everything else.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fxrpg import snapshots
from fxrpg.atomic import sweep
from fxrpg.batches import Examples, Order, in_order
from fxrpg.errors import FxrpgError
from fxrpg.journal import Callback, Row
from fxrpg.ranks import Ranks
from fxrpg.steps import Stepper, Training
from fxrpg.stopping import asked_to_stop
from fxrpg.training import PrancTrainer

_log = logging.getLogger(__name__)


class Trainer:
    """Trains `model` in place: `fit` begins or goes on, `evaluate` tests.

    Attributes: `model`; `average`, the model with the averaged parameters (or None); `step`; `rows`, one for each epoch.

    Args:
        model: takes a batch of inputs, returns logits [batch, classes]; on the device of `ranks`.
        optimizer: of the model's parameters, in any groups.
        training: how to train.
        examples: any map-style dataset of pairs (input, label). What is random in it must come from torch's CPU generator.
        test: those to evaluate on after each epoch; None evaluates nothing.
        scheduler: a scheduler of torch, which is stepped once a step of the optimizer.
        descent: PRANC's coordinate descent with that optimizer, for a model of which some coefficients move at a time.
        loss: from logits in float32 and labels to the mean over them.
        folder: where the snapshot goes; None makes none.
        callbacks: told of every epoch, in the process of rank 0.
        ranks: the processes that train together (`fxrpg.ranks.joined`).
        settings: whatever else must be the same for a run to go on from a snapshot: names and plain values.

    Raises:
        FxrpgError: a batch that the examples or processes do not fit; a scheduler that needs the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training: Training,
        examples: Examples,
        test: Examples | None = None,
        *,
        scheduler: LRScheduler | None = None,
        descent: PrancTrainer | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        folder: Path | None = None,
        callbacks: Sequence[Callback] = (),
        ranks: Ranks | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.training, self.examples = model, training, examples
        self.ranks = ranks or Ranks(device=next(model.parameters()).device)
        self.snapshot = None if folder is None else folder / snapshots.NAME
        self.callbacks = tuple(callbacks) if self.ranks.writes else ()
        self.step, self.seconds = 0, 0.0
        self.rows: list[Row] = []
        shared = {"rank": self.ranks.rank, "world": self.ranks.world}
        self._pinned = self.ranks.device.type == "cuda"
        self._order = Order(
            count=len(examples),
            batch=training.batch,
            epochs=training.epochs,
            seed=training.seed,
            accumulate=training.accumulate,
            **shared,
        )
        self._stepper = Stepper(model, optimizer, scheduler, loss, training, self.ranks, descent)
        each = training.batch // self.ranks.world
        self._tests: Any = None
        if test is not None:
            self._tests = in_order(test, each, training.workers, pinned=self._pinned, **shared)
        fixed = ("epochs", "batch", "accumulate", "clip", "amp", "ema", "seed")
        self._settings = {name: getattr(training, name) for name in fixed} | {"examples": len(examples)}
        self._settings |= {"optimizer": _described(optimizer), "descent": _told(descent)}
        self._settings |= settings or {}
        self._read_back = False

    @property
    def average(self) -> nn.Module | None:
        average = self._stepper.average
        return None if average is None else average.module

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.training.epochs * self._order.steps

    def fit(self, *, resume: bool = False) -> list[Row]:
        """Train to the end; returns a row for each epoch.

        Ctrl-C and SIGTERM let the step end, write a snapshot and raise KeyboardInterrupt; where one process trains, a second
        Ctrl-C interrupts at once. Torch's random number generators are left as they were.

        Args:
            resume: go on from the snapshot in the folder if there is one. Without, there must be none.

        Raises:
            FxrpgError: the snapshot is damaged or of another run; there is one, and `resume` is False.
            OSError: a file cannot be written.
            KeyboardInterrupt: as above; the snapshot is complete.
        """
        self._find_snapshot(resume)
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with asked_to_stop(patient=self.ranks.world > 1) as asked, torch.random.fork_rng(devices):
            for callback in self.callbacks:
                callback.begin(self.rows)
            if resume:
                found = "" if self.step else ", because there is no snapshot"
                self._tell("going on after step %d of %d%s", self.step, self.steps, found)
            try:
                self._run(asked)
            finally:
                for callback in self.callbacks:
                    callback.end()
        return self.rows

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1) on the test examples, of the averaged parameters where there are any."""
        if self._tests is None:
            raise FxrpgError("evaluate", "needs test examples", "none", "Pass them as test=...")
        return self._stepper.evaluate(self._tests)

    def _run(self, asked: threading.Event) -> None:
        order = dataclasses.replace(self._order, first=self.step)
        batches = iter(order.loader(self.examples, self.training.workers, pinned=self._pinned))
        while self.step < self.steps:
            start, lr = time.perf_counter(), self._stepper.lr
            self._stepper.take(batches, self.step)
            self.step += 1
            self.seconds += time.perf_counter() - start
            if self.step % order.steps == 0:
                self._end_epoch(lr)
            elif self.step % self.training.log_every == 0:
                self._tell_progress()
            stop = any(self.ranks.each(asked.is_set()))  # all processes after the same step
            if stop or self.step % self.training.snapshot_every == 0 or self.step == self.steps:
                self._write_snapshot()
            if stop and self.step < self.steps:
                raise KeyboardInterrupt(f"stopped after step {self.step} of {self.steps}")

    def _end_epoch(self, lr: float) -> None:
        """Test and tell before a snapshot is written: one at the end of an epoch holds the epoch's row."""
        loss = sum(self.ranks.each(self._stepper.loss_sum.item())) / self.ranks.world / self._order.steps
        self._stepper.loss_sum.zero_()
        test_loss, accuracy = (None, None) if self._tests is None else self.evaluate()
        row = Row(
            epoch=self.step // self._order.steps,
            step=self.step,
            lr=lr,
            loss=loss,
            test_loss=test_loss,
            accuracy=accuracy,
            seconds=self.seconds,
        )
        self.rows.append(row)
        tested = "" if accuracy is None else f", test loss {test_loss:.4f}, accuracy {100 * accuracy:.2f}%"
        self._tell("epoch %d of %d: lr %.3g, loss %.4f%s", row.epoch, self.training.epochs, lr, loss, tested)
        for callback in self.callbacks:
            callback.write(row)

    def _tell_progress(self) -> None:
        epoch, place = divmod(self.step, self._order.steps)
        mean, speed = self._stepper.loss_sum.item() / place, self.step * self.training.batch / self.seconds
        text = "epoch %d, step %d of %d: loss %.4f, %.0f examples a second"
        self._tell(text, epoch + 1, place, self._order.steps, mean, speed)

    def _tell(self, text: str, *values: Any) -> None:
        if self.ranks.writes:
            _log.info(text, *values)

    def _write_snapshot(self) -> None:
        losses = self.ranks.each(self._stepper.loss_sum.item())
        if self.snapshot is None or not self.ranks.writes:
            return
        state = {"settings": self._settings, "epoch": self.step // self._order.steps, "step": self.step}
        state |= {"loss": losses, "seconds": self.seconds, "rows": [dataclasses.asdict(row) for row in self.rows]}
        for name, part in self._stepper.parts.items():
            state[name] = None if part is None else part.state_dict()
        snapshots.write(self.snapshot, state)
        if not self._read_back:  # what cannot be read is found out now, not when it is needed
            snapshots.read(self.snapshot)
            self._read_back = True

    def _find_snapshot(self, resume: bool) -> None:
        path = self.snapshot
        if path is None:
            return
        if self.ranks.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path)
        if path.exists() and not resume:
            fix = "Resume it, or choose another folder."
            raise FxrpgError(str(path.parent), "must hold no earlier run when one begins", path.name, fix)
        if path.exists():
            self._load_snapshot(path)
        steps = self.ranks.each(self.step)
        if len(set(steps)) > 1:
            fix = "Put it into a folder that all of them share."
            raise FxrpgError(str(path), "must be the same for all processes", f"the steps {steps}", fix)

    def _load_snapshot(self, path: Path) -> None:
        found = snapshots.read(path)
        snapshots.check_settings(path, self._settings, found["settings"])
        try:
            for name, part in self._stepper.parts.items():
                if part is not None:
                    part.load_state_dict(found[name])
            self.rows = [Row(**row) for row in found["rows"]]
            losses = found["loss"]
            shared = len(losses) != self.ranks.world  # by other processes than then
            self._stepper.loss_sum.fill_(sum(losses) / len(losses) if shared else losses[self.ranks.rank])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            text, fix = " ".join(str(e).split())[:300], "Resume with the model and optimizer that the run began with."
            raise FxrpgError(str(path), "must fit the model and the optimizer", text, fix) from None
        self.step, self.seconds = found["step"], found["seconds"]
        self._read_back = True


def _described(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer as it is before its first step: another one would silently take the numbers of the snapshot's."""
    groups = [
        ", ".join(f"{name}={value}" for name, value in sorted(group.items()) if name != "params")
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({'; '.join(groups)})"


def _told(descent: PrancTrainer | None) -> str | None:
    """Which coefficients move when, of a coordinate descent."""
    if descent is None:
        return None
    return f"active={descent._active}, period={descent.period}, seed={descent.seed}"
