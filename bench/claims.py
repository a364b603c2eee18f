"""What the papers claim, tried on two small tasks: `python bench/claims.py digits`, `scenes` or `draws`.

Each run trains one model with one seed on one thread and appends its lines to bench/results/claims.csv; what is there
already is not run again. `python bench/claims.py report` prints the table and which claims hold; `readme` writes both
between the markers in README.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import tasks  # noqa: E402

import fxrpg  # noqa: E402
from fxrpg import Pemn, Pranc, Ring, Rule  # noqa: E402
from fxrpg.basis import LAWS  # noqa: E402
from fxrpg.fixed_point import fixed_point  # noqa: E402
from fxrpg.generator import View  # noqa: E402

CSV = ROOT / "bench" / "results" / "claims.csv"
COLUMNS = ("task", "model", "seed", "metric", "value", "dof", "bytes", "seconds", "commit", "torch", "date")
SEEDS = 5
RINGS = {"digits": 256, "scenes": 16_384}
ALPHAS = {"digits": 512, "scenes": 1024}
Build = Callable[[tasks.Task, int], nn.Module]
Row = dict[str, object]


def _resnet(task: tasks.Task, seed: int, width: int = 16) -> nn.Module:
    return tasks.resnet(width=width, channels_in=task.channels, classes=10, stem=task.stem, seed=seed)


def _mixer(task: tasks.Task, seed: int) -> nn.Module:
    return tasks.mixer(dim=128, depth=2, channels_in=task.channels, classes=10, patch=task.patch, seed=seed)


def _ring(task: tasks.Task, seed: int, **settings: object) -> nn.Module:
    scope = settings.pop("scope", "model")
    method = Ring(**settings)  # type: ignore[arg-type]
    return fxrpg.transform(_resnet(task, seed), dof=RINGS[task.name], method=method, scope=scope, seed=seed)  # type: ignore[arg-type]


def _narrow(task: tasks.Task, seed: int) -> nn.Module:
    """The dense ResNet whose parameters are as many as the ring model's, as nearly as its width allows."""
    wanted = _trainable(_ring(task, seed))
    return min((_resnet(task, seed, width) for width in range(1, 17)), key=lambda m: abs(_trainable(m) - wanted))


def _recurrent(task: tasks.Task, seed: int, *, views: bool, norms: bool, times: int = 4) -> nn.Module:
    """A ResNet whose one block recurs, with views of one ring or the same weights, with norms of its own each time or not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = 32
        core = tasks.Block(width, width, 1)
        stem = [nn.Conv2d(task.channels, width, 3, 2 * task.stem, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        steps = fxrpg.unroll(core, times, own_norm=norms)
        if not views:
            for step in list(steps)[1:]:
                step.conv1.weight, step.conv2.weight = steps[0].conv1.weight, steps[0].conv2.weight
        model = nn.Sequential(*stem, steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    if not views:
        return model
    rules = [Rule("3.*", "generate"), Rule("*", "dense")]
    return fxrpg.transform(model, dof=1 / times, method=Ring(block=1), plan=rules, seed=seed)


def _pranc(task: tasks.Task, seed: int, law: str = "rademacher") -> nn.Module:
    return fxrpg.transform(_resnet(task, seed), dof=ALPHAS[task.name], method=Pranc(law=law), seed=seed)


def _pemn(task: tasks.Task, seed: int, dof: float | None, **settings: str) -> nn.Module:
    return fxrpg.transform(_mixer(task, seed), dof=dof, method=Pemn(**settings), seed=seed)  # type: ignore[arg-type]


MODELS: dict[str, Build] = {
    "dense ResNet": _resnet,
    "dense ResNet, as many parameters": _narrow,
    "ring": _ring,
    "ring, element-wise": partial(_ring, block=1),
    "ring, permutation only": partial(_ring, block=1, reflect=False),
    "ring, reflection only": partial(_ring, block=1, permute=False),
    "ring, neither": partial(_ring, block=1, permute=False, reflect=False),
    "ring, hashed": partial(_ring, block=1, layout="hash"),
    "ring, block-diagonal": partial(_ring, block=1, layout="block_diagonal"),
    "ring, one a stage": partial(_ring, scope="stage"),
    "recurrence, own views, own norms": partial(_recurrent, views=True, norms=True),
    "recurrence, own views, shared norms": partial(_recurrent, views=True, norms=False),
    "recurrence, same weights, own norms": partial(_recurrent, views=False, norms=True),
    "recurrence, same weights, shared norms": partial(_recurrent, views=False, norms=False),
    "PRANC": _pranc,
    "PRANC, Khatri-Rao": partial(_pranc, law="khatri_rao"),
    "dense mixer": _mixer,
    "PEMN, MP": partial(_pemn, dof=1.0),
    "PEMN, RP 1e-1": partial(_pemn, dof=1e-1),
    "PEMN, RP 1e-3": partial(_pemn, dof=1e-3),
    "PEMN, RP 1e-5": partial(_pemn, dof=1e-5),
}
PRANC_RECIPE = {"optimizer": "adam", "lr": 0.1, "weight_decay": 0.0}
PEMN_RECIPE = {"optimizer": "adam", "lr": 0.05, "weight_decay": 0.005}


@cache
def _task(name: str) -> tasks.Task:
    return tasks.digits() if name == "digits" else tasks.scenes()


def run(task_name: str, name: str, seed: int) -> list[Row]:
    """Train one model, test it, and test what is made of it without more training."""
    torch.set_num_threads(1)
    task = _task(task_name)
    model = MODELS[name](task, seed)
    recipe = PRANC_RECIPE if name.startswith("PRANC") else PEMN_RECIPE if name.startswith("PEMN") else {}
    begin = time.perf_counter()
    tasks.train(model, task, epochs=task.epochs, seed=seed, **recipe)  # type: ignore[arg-type]
    seconds = round(time.perf_counter() - begin, 1)
    found = [(name, model), *derived(task, name, model, seed)]
    return [
        {"task": task_name, "model": label, "seed": seed, "metric": "test accuracy, %"}
        | {"value": round(tasks.accuracy(m, task), 3), "dof": _dof(m), "bytes": _bytes(m), "seconds": seconds}
        for label, m in found
    ]


def derived(task: tasks.Task, name: str, model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """(name, model) for the models that a trained one gives without training."""
    if name == "ring":
        for bits in (8, 4):
            yield f"ring, {bits} bits", fxrpg.freeze(fxrpg.quantize(model, bits, block=0 if bits == 8 else 32))
    if name == "dense ResNet":
        yield "PRANC, regressed", fxrpg.fit(_pranc(task, seed), model).model
    if name == "PRANC":
        size = ALPHAS[task.name]
        for part in (4, 2):
            yield f"PRANC, largest 1/{part}", fxrpg.truncate(model, size // part)
            yield f"PRANC, random 1/{part}", _random_part(model, size // part, seed)
        other = fxrpg.transform(_resnet(task, seed), dof=size, method=Pranc(), seed=seed + 1)
        taken = {key: value for key, value in model.state_dict().items() if key not in ("fxrpg_digest", "fxrpg_scale")}
        other.load_state_dict(taken, strict=False)
        yield "PRANC, seed + 1", other


def _random_part(model: nn.Module, count: int, seed: int) -> nn.Module:
    """The model with only `count` coefficients, chosen at random."""
    result = copy.deepcopy(model)
    alpha = result.get_parameter("fxrpg_alpha").detach()
    alpha[torch.randperm(len(alpha), generator=torch.Generator().manual_seed(seed))[count:]] = 0
    return result


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _dof(model: nn.Module) -> int | str:
    return fxrpg.ledger(model).dof if hasattr(model, "fxrpg_scale") else ""


def _bytes(model: nn.Module) -> int:
    """The model's file, of masks without their scores; the tensors of a dense model."""
    if not hasattr(model, "fxrpg_scale"):
        return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    masks = any("_score" in name for name, _ in model.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        fxrpg.save(fxrpg.freeze(model) if masks else model, path := Path(folder) / "model.safetensors")
        return path.stat().st_size


def draw_rate(seed: int) -> Row:
    """Signs that a warm Rademacher basis draws and sums a second, forward and adjoint, on all threads."""
    view = View(
        generator=Pranc(),
        seed=seed,
        tensor=0,
        shape=(64, 64, 3, 3),
        order=(0, 2, 3, 1),
        offset=0,
        total=36864,
        size=10_000,
    )
    limbs, _ = fixed_point(torch.linspace(-1, 1, view.size), 0)
    grad = torch.linspace(-1, 1, view.count, dtype=torch.float64)
    law = LAWS["rademacher"]
    passes: list[Callable[[], Tensor]] = [
        lambda: torch.cat([*law.combine(limbs, view)], 1),
        lambda: law.project(grad, view, view.size),
    ]
    for call in passes:
        call()
    begin = time.perf_counter()
    for call in passes:
        call()
    seconds = time.perf_counter() - begin
    rate = 2 * view.count * view.size / seconds
    row: Row = {
        "task": "draws",
        "model": f"Rademacher, {torch.get_num_threads()} threads",
        "seed": seed,
        "dof": view.size,
    }
    return row | {"metric": "signs a second", "value": round(rate), "bytes": 0, "seconds": round(seconds, 3)}


@dataclass(frozen=True)
class Claim:
    """That `better` is at least as accurate as `worse`; `by`, with a margin, in percentage points."""

    text: str
    better: str
    worse: str
    by: float = 0.0


CLAIMS = (
    Claim("permutation and reflection >= permutation only", "ring, element-wise", "ring, permutation only"),
    Claim("permutation only > reflection only", "ring, permutation only", "ring, reflection only"),
    Claim("reflection only > neither", "ring, reflection only", "ring, neither"),
    Claim("blocks of 32 cost nothing", "ring", "ring, element-wise"),
    Claim("one ring >= one a stage, at the same DoF", "ring", "ring, one a stage"),
    Claim("ring >= hashing, both element-wise", "ring, element-wise", "ring, hashed"),
    Claim("ring > dense with as many parameters", "ring", "dense ResNet, as many parameters"),
    Claim("recurrence: own norms > shared", "recurrence, same weights, own norms", "recurrence, same weights, shared norms"),
    Claim("recurrence: own views > same weights", "recurrence, own views, own norms", "recurrence, same weights, own norms"),
    Claim("8 bits lose less than 0.5 points", "ring, 8 bits", "ring", -0.5),
    Claim("PRANC: trained > regressed by 20 points", "PRANC", "PRANC, regressed", 20),
    Claim("PRANC: largest half > random by 10 points", "PRANC, largest 1/2", "PRANC, random 1/2", 10),
    Claim("PEMN: RP 1e-3 within 1 point of RP 1e-1", "PEMN, RP 1e-3", "PEMN, RP 1e-1", -1),
    Claim("PEMN: RP 1e-3 > RP 1e-5", "PEMN, RP 1e-3", "PEMN, RP 1e-5"),
)  # fmt: skip


def report(rows: list[dict[str, str]]) -> str:
    """The table of means, and for each claim whether it holds: the mean difference over seeds, with its standard error."""
    names = list(dict.fromkeys(row["model"] for row in rows if row["task"] != "draws"))
    body = []
    for name in sorted(names, key=_place):
        some = {t: [row for row in rows if (row["task"], row["model"]) == (t, name)] for t in ("digits", "scenes")}
        accuracy = [_spread([float(row["value"]) for row in some[t]]) for t in some]
        sizes = [some[t][0]["dof"] if some[t] else "" for t in some]
        kilobytes = [
            f"{statistics.fmean(float(r['bytes']) for r in some[t]) / 1000:.1f}" if some[t] else "" for t in some
        ]
        body.append([name, *(x for three in zip(sizes, accuracy, kilobytes, strict=True) for x in three)])
    headers = ["model", "DoF", "digits, %", "KB", "DoF", "scenes, %", "KB"]
    table = tabulate(body, headers, disable_numparse=True, colalign=("left", *["right"] * 6))
    verdicts = tabulate(
        [_verdict(claim, rows) for claim in CLAIMS], ["claim", "digits", "scenes"], disable_numparse=True
    )
    chance = [row for row in rows if row["model"] == "PRANC, seed + 1"]
    seeds = (
        f"PRANC with seed + 1: {_spread([float(row['value']) for row in chance])} % over both tasks (chance is 10 %)."
    )
    draws = [float(row["value"]) for row in rows if row["task"] == "draws"]
    rate = (
        f"Rademacher signs drawn and summed on two CPU cores: {statistics.median(draws) / 1e9:.1f}e9 a second."
        if draws
        else ""
    )
    return "\n\n".join(part for part in (table, verdicts, seeds, rate) if part)


def _place(name: str) -> int:
    """Derived models stand after the one that they were made of."""
    order = list(MODELS)
    return max(
        (i for i, known in enumerate(order) if name == known or name.startswith(f"{known},")), default=len(order)
    )


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f} +- {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def _verdict(claim: Claim, rows: list[dict[str, str]]) -> list[str]:
    line = [claim.text]
    for task in ("digits", "scenes"):
        by_seed = {
            name: {r["seed"]: float(r["value"]) for r in rows if (r["task"], r["model"]) == (task, name)}
            for name in (claim.better, claim.worse)
        }
        common = by_seed[claim.better].keys() & by_seed[claim.worse].keys()
        differences = [by_seed[claim.better][seed] - by_seed[claim.worse][seed] for seed in sorted(common)]
        if len(differences) < 2:
            line.append("")
            continue
        mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
        clear = (
            "holds"
            if mean - claim.by > 2 * error
            else "does not hold"
            if mean - claim.by < -2 * error
            else "within noise"
        )
        line.append(f"{mean:+.1f} +- {error:.1f}, {clear}")
    return line


def read() -> list[dict[str, str]]:
    """All lines of the CSV file, of several seeds in the order of the seeds."""
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return sorted(
            csv.DictReader(file), key=lambda row: (row["task"], _place(row["model"]), row["model"], int(row["seed"]))
        )


def _append(rows: list[Row], commit: str) -> None:
    CSV.parent.mkdir(exist_ok=True)
    stamp = {"commit": commit, "torch": torch.__version__.partition("+")[0], "date": datetime.date.today().isoformat()}
    before = read()
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(before)
        writer.writerows(row | stamp for row in rows)


def measure(task: str, jobs: int, only: str) -> None:
    """Run what is missing of a task, `jobs` models at a time."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    done = {(row["task"], row["model"], int(row["seed"])) for row in read()}
    wanted = [(task, name, seed) for seed in range(SEEDS) for name in MODELS if only in name]
    missing = [job for job in wanted if job not in done]
    if task == "draws":
        _append([draw_rate(seed) for seed in range(SEEDS) if not any(job[0] == "draws" for job in done)], commit)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for i, future in enumerate(as_completed(pool.submit(run, *job) for job in missing)):
            rows = future.result()
            _append(rows, commit)
            print(f"{i + 1}/{len(missing)}: {rows[0]['model']}, seed {rows[0]['seed']}: {rows[0]['value']}", flush=True)


def write_readme() -> None:
    """Put the report between the markers of README.md."""
    path = ROOT / "README.md"
    head, begin, rest = path.read_text().partition("<!-- claims -->\n")
    _old, end, tail = rest.partition("<!-- end of claims -->")
    path.write_text(f"{head}{begin}```text\n{report(read())}\n```\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python bench/claims.py digits --jobs 2"
    )
    parser.add_argument("what", choices=["digits", "scenes", "draws", "report", "readme"])
    parser.add_argument(
        "--jobs", type=int, default=2, help="models trained at a time, one thread each (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="only models whose name holds this text")
    arguments = parser.parse_args()
    if arguments.what == "report":
        print(report(read()))
    elif arguments.what == "readme":
        write_readme()
    else:
        measure(arguments.what, arguments.jobs, arguments.only)


if __name__ == "__main__":
    main()
