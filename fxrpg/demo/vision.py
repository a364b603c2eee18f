"""The job of `fxrpg demo --data`: one model, one method, the user's pictures, the recipe of the method's paper."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxrpg.checkpoint import save, write_tensors
from fxrpg.compact import freeze
from fxrpg.demo.models import build_network
from fxrpg.errors import FxrpgError
from fxrpg.journal import Callback, CsvLog, Row, TensorBoardLog
from fxrpg.ledger import ledger
from fxrpg.parameter_groups import parameter_groups
from fxrpg.pictures import Pictures, load_pictures
from fxrpg.ranks import Ranks, joined
from fxrpg.schedules import Schedule, known, schedule_for
from fxrpg.steps import Training
from fxrpg.trainer import Trainer
from fxrpg.training import PrancTrainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what, and how.

    Args:
        transform: makes a model one of `method`; None leaves it dense.
        how: the settings of `transform`, which must be the same when a run is resumed.
        recipe: a name in `SCHEDULES`; "" is the one for method, data and model.
        training: fields of `Training`; the recipe's where they are absent.
        lr: None is the recipe's.
        active: coefficients of PRANC that move in an epoch; 0 is all of them, None what the recipe says, or all if fewer.
        again: the command that goes on after an interruption.
    """

    data: str
    root: Path
    out: Path
    model: str
    method: str
    transform: Callable[[nn.Module], nn.Module] | None
    how: Mapping[str, str]
    recipe: str = ""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lr: float | None = None
    active: int | None = None
    decay_norms: bool = True
    side: int = 224
    download: bool = False
    device: str = ""
    tensorboard: bool = False
    resume: bool = False
    again: str = ""


def run(job: Job) -> Trainer:
    """Train, write the model's file, say what came out.

    Raises:
        FxrpgError: as the parts do; before anything is written, but for a damaged snapshot.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: the run can be resumed; how was said.
    """
    with joined(job.device) as ranks, _spoken(ranks):
        pictures = _pictures(job, ranks)
        trainer = _trainer(job, pictures, ranks)
        try:
            rows = trainer.fit(resume=job.resume)
        except KeyboardInterrupt:
            if trainer.snapshot and trainer.snapshot.exists():
                _tell(ranks, "interrupted after step %d of %d; to go on:\n  %s", trainer.step, trainer.steps, job.again)
            raise
        if ranks.writes:
            _write(job, trainer)
            best = max(rows, key=lambda row: row.accuracy or 0)
            accuracies = [100 * (row.accuracy or 0) for row in (rows[-1], best)]
            of = "" if trainer.average is None else " of the average"
            _log.info("test accuracy%s %.2f%%, at best %.2f%% (epoch %d)", of, *accuracies, best.epoch)
    return trainer


def _trainer(job: Job, pictures: Pictures, ranks: Ranks) -> Trainer:
    name = job.recipe or schedule_for(job.method, job.data, job.model)
    schedule = known(name)
    training = Training(**({"epochs": schedule.epochs, "batch": schedule.batch} | dict(job.training)))
    lr = schedule.lr if job.lr is None else job.lr
    model = build_network(job.model, pictures.classes, pictures.side, training.seed)
    if job.transform is not None:
        model = job.transform(model)
    model.to(ranks.device)
    steps = len(pictures.train) // training.batch
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if not job.decay_norms:
        groups = parameter_groups(model, lr=lr, weight_decay=schedule.weight_decay)
    optimizer, scheduler = schedule.build(groups, lr, training.epochs * steps)
    active = _active(job, schedule, model)
    descent = None
    if active is not None:
        descent = PrancTrainer(model, optimizer, active=active, period=max(steps, 1), seed=training.seed)
    fixed = {"data": job.data, "model": job.model, "method": job.method, "recipe": name, "lr": lr, "active": active}
    told = f"{job.data}: {len(pictures.train)} training and {len(pictures.test)} test pictures, {pictures.classes} classes\n"
    told += f"{job.model}, {job.method}; recipe {name}, batch {training.batch}, lr {lr:g}, on {_where(ranks)}"
    told += "" if active is None else f", {active} coefficients an epoch"
    told += "" if job.transform is None else f"\n{ledger(model)}"
    logs: list[Callback] = [_Opening(told), CsvLog(job.out / "log.csv")]
    logs += [TensorBoardLog(job.out / "tensorboard")] if job.tensorboard else []
    return Trainer(
        model,
        optimizer,
        training,
        pictures.train,
        pictures.test,
        scheduler=scheduler,
        descent=descent,
        folder=job.out,
        callbacks=logs,
        ranks=ranks,
        settings={**fixed, **job.how, "decay_norms": job.decay_norms, "side": pictures.side},
    )


def _active(job: Job, schedule: Schedule, model: nn.Module) -> int | None:
    """How many coefficients move at a time, if not all."""
    if job.active is not None and job.method != "pranc":
        raise FxrpgError("--active", "is for pranc", f"--method {job.method}", "Leave it out.")
    if job.method != "pranc":
        return None
    count = schedule.active if job.active is None else job.active
    return count if job.active or (count and count < ledger(model).dof) else None


class _Opening(Callback):
    """Says what is about to be trained, once nothing stands in its way."""

    def __init__(self, text: str) -> None:
        self.text = text

    def begin(self, rows: Sequence[Row]) -> None:
        _log.info("%s", self.text)


def _where(ranks: Ranks) -> str:
    return str(ranks.device) if ranks.world == 1 else f"{ranks.world} processes ({ranks.device.type})"


def _pictures(job: Job, ranks: Ranks) -> Pictures:
    """One process of several downloads, the others find what it fetched."""
    if job.download and not ranks.writes:
        ranks.each(0)
    pictures = load_pictures(job.data, job.root, side=job.side, download=job.download)
    if job.download and ranks.writes:
        ranks.each(0)
    return pictures


def _write(job: Job, trainer: Trainer) -> None:
    """The trained model, masks as bits; beside it the average, if there is one."""
    models = {"model": trainer.model, "average": trainer.average}
    for name, model in models.items():
        if model is None:
            continue
        path = job.out / f"{name}.safetensors"
        if job.transform is None:
            write_tensors(path, model.state_dict(), {"format": "pt"})
        else:
            save(freeze(model) if job.method == "pemn" else model, path)
        _log.info("wrote %s, %s bytes", path, f"{path.stat().st_size:,}")


def _tell(ranks: Ranks, text: str, *values: Any) -> None:
    if ranks.writes:
        _log.info(text, *values)


@contextlib.contextmanager
def _spoken(ranks: Ranks) -> Iterator[None]:
    """Have the package's log on stdout, of rank 0."""
    log = logging.getLogger("fxrpg")
    handler, level = logging.StreamHandler(sys.stdout), log.level
    if ranks.writes:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
