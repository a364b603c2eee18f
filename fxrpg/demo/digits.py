"""The main job of `fxrpg demo`: one small ResNet on handwritten digits, dense and as rings of several sizes.

Every ring model is packed into one file, loaded back and compared; a table, a CSV file and a picture say what came out.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fxrpg.api import transform
from fxrpg.checkpoint import load, save, write_tensors
from fxrpg.errors import FxrpgError
from fxrpg.ledger import ledger

DIGITS = 1797
"""Images in scikit-learn's data set."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What to train and where to write.

    Args:
        out: folder for the model files, `results.csv` and `accuracy.png`; made if there is none.
        dofs: ring sizes, two or more, each at most the generated weights.
        seeds: every model is trained with the seeds 0 .. seeds - 1.
        epochs: passes over the training images.
        batch: images a step.
        train: training images.
        test: test images; with `train` at most 1,797.
        threads: CPU threads. The last bits of a sum depend on it, and so can an accuracy.
    """

    out: Path = Path("out")
    dofs: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    seeds: int = 3
    epochs: int = 20
    batch: int = 125
    train: int = 1000
    test: int = 797
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "batch", "train", "test", "threads"):
            if getattr(self, name) < 1:
                raise FxrpgError(f"demo, {name}", "must be 1 or more", repr(getattr(self, name)), "Pass more.")
        if len(set(self.dofs)) < max(2, len(self.dofs)):
            raise FxrpgError("demo, dofs", "must be two or more different ring sizes", repr(self.dofs), "Pass more.")
        if self.batch > self.train or self.train + self.test > DIGITS:
            found = f"batch {self.batch}, train {self.train}, test {self.test}"
            raise FxrpgError("demo", f"must hold batch <= train and train + test <= {DIGITS}", found, "Pass less.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained model, a line of `results.csv`: `dof` is None for the dense one, `errors` counts test images."""

    model: str
    dof: int | None
    seed: int
    generated: int
    trainable: int
    errors: int
    tested: int
    file: str
    bytes: int
    seconds: float = field(compare=False)


class Summary(NamedTuple):
    """One model over its seeds: its first run, mean and deviation of the test error in percent, other means."""

    run: Run
    error: float
    std: float
    bytes: float
    seconds: float


class PowerLaw(NamedTuple):
    """Test error, in percent: a * DoF^-b."""

    a: float
    b: float


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet(seed: int) -> nn.Sequential:
    """A ResNet of 13 convolutions for images of 8x8 pixels; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            Block(16, 16, 1),
            Block(16, 32, 2), Block(32, 32, 1),
            Block(32, 64, 2), Block(64, 64, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def run(settings: Demo) -> list[Run]:
    """Train, pack, load back and compare all models; print the table, write the files.

    Raises:
        FxrpgError: a package is missing, a ring is larger than the weights, a file gives back another model.
        OSError: a file cannot be written.
    """
    figure_module = _extra("matplotlib.figure")
    images, answers = digits()
    for dof in settings.dofs:
        transform(resnet(0), dof=dof)  # a size that cannot be is said before training, not after
    settings.out.mkdir(parents=True, exist_ok=True)
    sizes: list[int | None] = [None, *settings.dofs]
    steps = len(sizes) * settings.seeds * settings.epochs
    print(f"digits: {settings.train:,} training and {settings.test:,} test images, 8x8 pixels")
    print(f"each model: a ResNet of 13 convolutions, {settings.epochs} epochs, seeds 0 to {settings.seeds - 1}")
    with _cpu_threads(settings.threads), tqdm(total=steps, unit="epoch", disable=None) as bar:
        runs = [_run(settings, (images, answers), dof, seed, bar) for dof in sizes for seed in range(settings.seeds)]
    found = summaries(runs)
    law = power_law(settings.dofs, [s.error for s in found[1:]], floor=50 / settings.test)
    _write_csv(runs, settings.out / "results.csv")
    _draw(figure_module, found, law, settings.out / "accuracy.png")
    packed = len(settings.dofs) * settings.seeds
    print(f"\n{table(found)}\n")
    print(f"test error of the rings = {law.a:.3g}% * DoF^{-law.b:.3g} (least squares on logarithms)")
    print(f"{packed} of {packed} packed files loaded back: predictions bitwise identical on {settings.test:,} images")
    print(f"written to {settings.out}: results.csv, accuracy.png, {len(runs)} model files")
    return runs


def digits() -> tuple[Tensor, Tensor]:
    """Images, float32 [1797, 1, 8, 8] from -1 (paper) to 1 (ink), and digits, int64 [1797]; always in one order."""
    data = _extra("sklearn.datasets").load_digits()
    order = torch.randperm(DIGITS, generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(data.target)[order]


def power_law(dofs: Sequence[int], errors: Sequence[float], *, floor: float) -> PowerLaw:
    """The law nearest to `errors` (percent) by least squares on logarithms; less than `floor` counts as `floor`."""
    slope, offset = np.polyfit(np.log(dofs), np.log(np.maximum(errors, floor)), 1)
    return PowerLaw(math.exp(offset), -float(slope))


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """One summary for each model, in the order of the runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    result = []
    for group in groups.values():
        errors = [100 * run.errors / run.tested for run in group]
        std = statistics.stdev(errors) if len(errors) > 1 else 0.0
        means = [statistics.fmean(values) for values in zip(*((r.bytes, r.seconds) for r in group), strict=True)]
        result.append(Summary(group[0], statistics.fmean(errors), std, *means))
    return result


def table(found: Sequence[Summary]) -> str:
    """The printed table."""
    rows = []
    for run, error, std, size, seconds in found:
        dof, ratio = (f"{run.dof:,}", f"{run.generated / run.dof:,.1f}") if run.dof else ("-", "-")
        accuracy = f"{100 - error:.2f} +- {std:.2f}"
        rows.append([run.model, dof, ratio, f"{run.trainable:,}", accuracy, f"{size / 1000:,.1f} KB", f"{seconds:.1f}"])
    headers = ["model", "DoF", "weights / DoF", "trainable in all", "test accuracy, %", "file", "seconds a run"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def _run(settings: Demo, data: tuple[Tensor, Tensor], dof: int | None, seed: int, bar: Any) -> Run:
    """Train, test and pack one model."""
    images, answers = (tensor[settings.train :][: settings.test] for tensor in data)
    model = resnet(seed) if dof is None else transform(resnet(seed), dof=dof, seed=seed)
    name = "dense" if dof is None else f"ring-{dof}"
    bar.set_description(f"{name}, seed {seed}")
    begin = time.perf_counter()
    _train(model, data, settings, seed, bar)
    seconds = time.perf_counter() - begin
    predictions = _predict(model, images)
    path = settings.out / f"{name}-seed{seed}.safetensors"
    if dof is None:
        write_tensors(path, model.state_dict(), {})
    else:
        save(model, path)
        _check_reload(path, images, predictions, other_seed=settings.seeds)
    return Run(
        model=name,
        dof=dof,
        seed=seed,
        generated=0 if dof is None else ledger(model).generated,
        trainable=sum(parameter.numel() for parameter in model.parameters()),
        errors=int((predictions.argmax(1) != answers).sum()),
        tested=settings.test,
        file=path.name,
        bytes=path.stat().st_size,
        seconds=seconds,
    )


def _train(model: nn.Module, data: tuple[Tensor, Tensor], settings: Demo, seed: int, bar: Any) -> None:
    images, answers = data
    draw = torch.Generator().manual_seed(seed)
    steps = settings.train // settings.batch
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=settings.epochs * steps)
    model.train()
    for _ in range(settings.epochs):
        order = torch.randperm(settings.train, generator=draw)[: steps * settings.batch]
        for batch in order.split(settings.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(_shifted(images[batch], draw)), answers[batch]).backward()
            optimizer.step()
            cycle.step()
        bar.update()


def _shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel in each direction, with paper where it came from."""
    count = len(images)
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    rows, columns = torch.arange(8) + torch.randint(0, 3, (2, count, 1), generator=draw)  # [n, 8] each
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def _check_reload(path: Path, images: Tensor, predictions: Tensor, other_seed: int) -> None:
    """The file must give back the model, whatever weights the receiving one was built with."""
    found = _predict(load(resnet(other_seed), path), images)
    if not torch.equal(found.view(torch.int32), predictions.view(torch.int32)):
        wrong = int((found != predictions).any(1).sum())
        raise FxrpgError(
            str(path),
            "the loaded model must predict what the trained one does, bit for bit",
            f"{wrong} of {len(images)} predictions that differ",
            "Run it again on a sound disk; if it stays, report it as an error of fxrpg.",
        )


def _extra(name: str) -> Any:
    """A module of the optional extra `demo`."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        must = f"the module {name!r} must be importable"
        raise FxrpgError(
            "demo", must, str(e), "Install scikit-learn and matplotlib: pip install 'fxrpg[demo]'."
        ) from None


@contextmanager
def _cpu_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_csv(runs: Sequence[Run], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Run)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(run) for run in runs)


def _draw(figure_module: Any, found: Sequence[Summary], law: PowerLaw, path: Path) -> None:
    """Test error against degrees of freedom, both logarithmic: there a power law is a straight line."""
    dense, weights = found[0].run, found[-1].run.generated
    dofs = np.array([summary.run.dof for summary in found[1:]])
    least = 50 / dense.tested  # a logarithmic axis has no zero
    error, up = np.array([(max(summary.error, least), summary.std) for summary in found]).T
    down = np.minimum(up, error - least)
    low, high = error - down, error + up
    figure = figure_module.Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="degrees of freedom of the ring (weights / DoF)")
    axes.set(ylabel="test error", title=f"Handwritten digits: a ResNet with {weights:,} generated weights")
    axes.axhline(error[0], color="gray", label=f"dense, {dense.trainable:,} parameters: {error[0]:.1f}%")
    axes.axhspan(low[0], high[0], color="gray", alpha=0.2, linewidth=0, label="its standard deviation")
    label = "ring, mean and standard deviation over seeds"
    axes.errorbar(dofs, error[1:], [down[1:], up[1:]], fmt="o", capsize=4, label=label)
    label = f"power law, error = {law.a:.0f}% $\\cdot$ DoF$^{{{-law.b:.2f}}}$"
    axes.plot(dofs, law.a * dofs**-law.b, "--", label=label, zorder=1)
    for dof, value, top in zip(dofs, error[1:], high[1:], strict=True):
        axes.annotate(f"{value:.1f}%", (dof, top), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(dofs, [f"{dof:,}\n({weights / dof:,.1f})" for dof in dofs])
    ticks = [0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100]
    axes.set_yticks(ticks, [f"{tick:g}%" for tick in ticks])
    axes.set_ylim(0.8 * low.min(), 1.5 * high.max())
    axes.minorticks_off()
    axes.margins(x=0.07)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path)
