"""The trainer does what a loop written by hand does, tells what it did, and refuses what it cannot go on from."""

from __future__ import annotations

import copy
import csv
import logging
import os
import resource
import signal
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from small_runs import STEPS, Noisy, differences, network, small_run
from torch import nn
from torch.utils.data import TensorDataset

import fxrpg
from fxrpg import FxrpgError, PrancTrainer, snapshots
from fxrpg.batches import MODEL, PICTURES, Order, in_order
from fxrpg.hashing import derive_key
from fxrpg.journal import Callback, CsvLog, TensorBoardLog
from fxrpg.snapshots import NAME
from fxrpg.trainer import Trainer, Training

PLAIN = {"accumulate": 1, "clip": None, "ema": None}


def stop_at(examples: Noisy, read: int, act) -> Noisy:
    """The same examples, which call `act` when so many were read."""

    class Acting(Noisy):
        left = read

        def __getitem__(self, index):
            self.left -= 1
            if self.left == 0:
                act()
            return super().__getitem__(index)

    return Acting(len(examples))


# Training.


def test_is_the_loop_written_by_hand():
    trainer = small_run(**PLAIN, epochs=2)
    model, examples = network(), Noisy()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for step, draw in enumerate(Order(count=52, batch=8, epochs=2)):
        torch.manual_seed(derive_key(0, PICTURES, step, 0, 0))
        inputs, labels = (torch.stack(part) for part in zip(*(examples[i] for i in draw.indices), strict=True))
        torch.manual_seed(derive_key(0, MODEL, step, 0, 0))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    rows = trainer.fit()
    for (name, mine), (_, other) in zip(model.state_dict().items(), trainer.model.state_dict().items(), strict=True):
        assert torch.equal(mine, other), name
    assert [row.loss for row in rows] == pytest.approx([sum(losses[:6]) / 6, sum(losses[6:]) / 6])
    with torch.no_grad():
        logits = model.eval()(Noisy(10, noise=0).pictures)
    labels = Noisy(10).labels
    assert rows[-1].accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert rows[-1].test_loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert rows[-1].lr == pytest.approx(0.05 * (1 + torch.cos(torch.tensor(torch.pi * 11 / STEPS)).item()))


def test_parts_of_a_batch_add_up_to_it():
    def linear():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 4))

    examples = Noisy(noise=0)
    whole, parts = (
        small_run(model=linear(), examples=examples, **PLAIN | {"accumulate": parts}, test=None) for parts in (1, 4)
    )
    whole.fit()
    parts.fit()
    for mine, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert [row.loss for row in whole.rows] == pytest.approx([row.loss for row in parts.rows])


def test_gradients_are_clipped():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    Trainer(model, optimizer, Training(epochs=1, batch=52, clip=0.01), Noisy()).fit()
    moved = [a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_the_average_is_what_is_tested():
    trainer = small_run(epochs=1, **PLAIN | {"ema": 0.8})
    kept = []

    class Watch(Callback):
        def write(self, row):
            kept.append(row)

    trainer.callbacks = (Watch(),)
    averages, take = [], trainer._stepper.take

    def watched(batches, step):
        take(batches, step)
        new = trainer.model.fxrpg_ring.detach().clone()
        averages.append(new if not averages else averages[-1] * 0.8 + new * 0.2)

    trainer._stepper.take = watched
    trainer.fit()
    torch.testing.assert_close(trainer.average.fxrpg_ring.detach(), averages[-1])
    with torch.no_grad():
        logits = trainer.average.eval()(Noisy(10, noise=0).pictures)
    assert kept[0].accuracy == (logits.argmax(1) == Noisy(10).labels).double().mean().item()
    assert int(trainer.average.fxrpg_digest.sum()) == int(trainer.model.fxrpg_digest.sum())
    fxrpg.materialize(trainer.average)


def test_coordinate_descent_moves_some_coefficients_an_epoch_and_resumes(tmp_path):
    def run(folder, examples=None):
        torch.manual_seed(0)
        model = fxrpg.transform(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), dof=20, method="pranc")
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        descent = PrancTrainer(model, optimizer, active=5, period=6, seed=3)
        training = Training(epochs=2, batch=8, snapshot_every=1)
        return Trainer(model, optimizer, training, examples or Noisy(), folder=tmp_path / folder, descent=descent)

    whole = run("a")
    first, second = whole._stepper.descent.active("fxrpg_alpha"), None
    start = whole.model.fxrpg_alpha.detach().clone()
    whole.fit()
    whole._stepper.descent.steps = 6
    second = whole._stepper.descent.active("fxrpg_alpha")
    assert torch.equal(whole.model.fxrpg_alpha != start, first | second)
    with pytest.raises(KeyboardInterrupt):
        run("b", stop_at(Noisy(), 8 * 8 + 3, lambda: os.kill(os.getpid(), signal.SIGINT))).fit()
    run("b").fit(resume=True)
    assert differences(*(snapshots.read(tmp_path / name / NAME) for name in "ab")) == []


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision(amp, dtype):
    trainer = small_run(amp=amp, epochs=2)
    seen = set()
    trainer.model.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    rows = trainer.fit()
    assert seen == {dtype}
    assert trainer.model.fxrpg_ring.dtype == torch.float32
    exact = small_run(epochs=2).fit()
    assert rows[-1].loss == pytest.approx(exact[-1].loss, rel=0.1)
    assert rows[-1].loss != exact[-1].loss


def test_a_step_left_out_for_its_infinite_gradients_does_not_count_for_the_schedule():
    trainer = small_run(amp="fp16", **PLAIN, epochs=1)
    trainer._stepper._scaler._init_scale = 2.0**40  # overflows, and is halved
    trainer.fit()
    left_out = 40 - torch.log2(torch.tensor(trainer._stepper._scaler.get_scale())).item()
    assert 0 < left_out <= 6
    assert trainer._stepper.scheduler.last_epoch == 6 - left_out


def test_random_number_generators_and_signals_are_left_as_they_were():
    state, handlers = torch.get_rng_state(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    small_run(epochs=1).fit()
    assert torch.equal(torch.get_rng_state(), state)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_runs_in_a_thread():
    rows = []
    thread = threading.Thread(target=lambda: rows.extend(small_run(epochs=1).fit()))
    thread.start()
    thread.join()
    assert len(rows) == 1


def test_any_data_set_of_torch():
    examples = TensorDataset(Noisy().pictures, Noisy().labels)
    assert small_run(examples=examples, test=examples, epochs=1).fit()[0].accuracy is not None


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["", "bf16", "fp16"])
def test_trains_on_a_gpu_and_goes_on(amp, tmp_path):
    def on_gpu(**changes):
        return small_run(tmp_path, model=network().cuda(), amp=amp, workers=1, **changes)

    examples = stop_at(Noisy(), 8 * 8 + 3, lambda: os.kill(os.getppid(), signal.SIGINT))  # read by a worker
    with pytest.raises(KeyboardInterrupt):
        on_gpu(examples=examples).fit()
    trainer = on_gpu()
    rows = trainer.fit(resume=True)
    assert trainer.step == STEPS
    assert trainer.model.fxrpg_ring.is_cuda
    assert all(torch.isfinite(torch.tensor([row.loss, row.test_loss])).all() for row in rows)


# The order of the data.


def test_an_epoch_takes_every_example_at_most_once_and_another_order_each_time():
    order = Order(count=20, batch=6, epochs=2, seed=3)
    draws = list(order)
    epochs = [[i for draw in draws[start : start + 3] for i in draw.indices] for start in (0, 3)]
    assert [len(set(epoch)) for epoch in epochs] == [18, 18]
    assert epochs[0] != epochs[1]
    assert list(Order(count=20, batch=6, epochs=2, seed=3, first=4)) == draws[4:]
    assert [draw.indices for draw in Order(count=20, batch=6, epochs=2, seed=4)] != [draw.indices for draw in draws]
    assert len({draw.key for draw in draws}) == 6


@pytest.mark.parametrize(("accumulate", "world"), [(1, 2), (3, 2), (2, 1)])
def test_processes_and_parts_share_the_batches_of_one(accumulate, world):
    alone = [draw.indices for draw in Order(count=40, batch=12, epochs=2)]
    shares = [
        list(Order(count=40, batch=12, epochs=2, accumulate=accumulate, rank=r, world=world)) for r in range(world)
    ]
    for step, batch in enumerate(alone):
        parts = [draw.indices for share in shares for draw in share[step * accumulate :][:accumulate]]
        assert sorted(i for part in parts for i in part) == sorted(batch)
        assert {len(part) for part in parts} == {12 // accumulate // world}


def test_tests_are_shared_without_rest():
    loaders = [in_order(Noisy(11), 4, 0, rank=rank, world=2) for rank in range(2)]
    labels = [torch.cat([labels for _, labels in loader]) for loader in loaders]
    assert torch.equal(labels[0], Noisy(11).labels[::2])
    assert torch.equal(labels[1], Noisy(11).labels[1::2])


def test_processes_that_load_data_change_nothing():
    alone, helped = small_run(epochs=2), small_run(epochs=2, workers=2)
    assert [(r.loss, r.test_loss) for r in alone.fit()] == [(r.loss, r.test_loss) for r in helped.fit()]


# What is told.


def test_quiet_by_default_and_on_the_log(capfd, caplog):
    small_run(epochs=1).fit()
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.INFO, "fxrpg"):
        small_run(epochs=1, log_every=4).fit()
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("epoch 1, step 4 of 6: loss 1.")
    assert caplog.messages[1].startswith("epoch 1 of 1: lr 0.0")
    assert "accuracy" in caplog.messages[1]


def interrupted(folder, **changes):
    """A run that was asked to stop in its 9th step, resumed."""
    examples = stop_at(Noisy(), 8 * 8 + 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 9 of 18"):
        small_run(folder, examples=examples, **changes).fit()
    trainer = small_run(folder, **changes)
    trainer.fit(resume=True)
    return trainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_step_and_leaves_a_run_to_go_on_with(number, tmp_path):
    """The snapshot is written there, though none was due."""
    examples = stop_at(Noisy(), 8 * 8 + 3, lambda: os.kill(os.getpid(), number))
    trainer = small_run(tmp_path / "a", examples=examples, snapshot_every=1000)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert snapshots.read(tmp_path / "a" / NAME)["step"] == trainer.step == 9
    small_run(tmp_path / "a", snapshot_every=1000).fit(resume=True)
    small_run(tmp_path / "b").fit()
    assert differences(*(snapshots.read(tmp_path / name / NAME) for name in "ab")) == []


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = small_run(tmp_path, examples=stop_at(Noisy(), 8 * 8 + 3, twice), snapshot_every=1000)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 8
    assert not (tmp_path / NAME).exists()


def test_an_interrupted_run_has_the_csv_file_of_one_that_was_not(tmp_path):
    tables = []
    for name, run in (("a", interrupted), ("b", lambda folder, **changes: small_run(folder, **changes).fit())):
        folder = tmp_path / name
        folder.mkdir()
        run(folder, callbacks=[CsvLog(folder / "log.csv")])
        with open(folder / "log.csv", newline="") as file:
            tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert [row["epoch"] for row in tables[0]] == ["1", "2", "3"]
    assert all(float(row["loss"]) > 0 for row in tables[0])


def test_rows_beyond_the_snapshot_come_again_once(tmp_path):
    """Killed between the end of an epoch, whose row is in the file, and its snapshot."""
    log = CsvLog(tmp_path / "log.csv")

    class Dies(CsvLog):
        def write(self, row):
            super().write(row)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        small_run(tmp_path, callbacks=[Dies(tmp_path / "log.csv")], snapshot_every=4).fit()
    assert (tmp_path / "log.csv").read_text().count("\n") == 2
    rows = small_run(tmp_path, callbacks=[log], snapshot_every=4).fit(resume=True)
    assert (tmp_path / "log.csv").read_text().count("\n") == 1 + len(rows) == 4


def test_tensorboard(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs tensorboard; pip install 'fxrpg[tensorboard]'",
    )
    trainer = interrupted(tmp_path, callbacks=[TensorBoardLog(tmp_path / "curves")])
    found = reader.EventAccumulator(str(tmp_path / "curves"))
    found.Reload()
    for name in ("lr", "loss", "test_loss", "accuracy"):
        assert [event.step for event in found.Scalars(name)] == [6, 12, 18]
        expected = [getattr(row, name) for row in trainer.rows]
        assert [event.value for event in found.Scalars(name)] == pytest.approx(expected)


def test_tensorboard_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FxrpgError, match=r"pip install 'fxrpg\[tensorboard\]'"):
        TensorBoardLog(tmp_path)


# Snapshots.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    small_run(folder, snapshot_every=1000).fit()
    return folder


def copied(finished, tmp_path):
    (tmp_path / NAME).write_bytes((finished / NAME).read_bytes())
    return tmp_path / NAME


def test_a_finished_run_has_nothing_left_to_do(finished, tmp_path):
    copied(finished, tmp_path)
    trainer = small_run(tmp_path, examples=stop_at(Noisy(), 1, lambda: pytest.fail("an example was read")))
    assert len(trainer.fit(resume=True)) == 3
    assert trainer.step == STEPS


def test_a_run_does_not_begin_over_another(finished, tmp_path):
    path = copied(finished, tmp_path)
    before = path.read_bytes()
    with pytest.raises(FxrpgError, match="must hold no earlier run.*Resume it"):
        small_run(tmp_path).fit()
    assert path.read_bytes() == before


def test_resuming_nothing_begins(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fxrpg"):
        small_run(tmp_path / "new", epochs=1).fit(resume=True)
    assert caplog.messages[0] == "going on after step 0 of 6, because there is no snapshot"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 4}, "epochs must be 3, as in the run of .*found 4"),
        ({"seed": 1}, "seed must be 0"),
        ({"ema": None}, "ema must be 0.8"),
        ({"examples": Noisy(50)}, "examples must be 52"),
        ({"settings": {"model": "other"}}, "model must be None"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(108, 4))},
            "must fit the model and the optimizer, found Error",
        ),
    ],
)
def test_another_run_is_refused(changes, message, finished, tmp_path):
    copied(finished, tmp_path)
    with pytest.raises(FxrpgError, match=message):
        small_run(tmp_path, **changes).fit(resume=True)


def test_a_snapshot_with_one_bit_changed_is_refused(finished, tmp_path):
    path = copied(finished, tmp_path)
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    expected = snapshots.read(path)
    refused = 0
    for place in torch.randint(len(whole), (150,), generator=draw).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = snapshots.read(path)
        except FxrpgError as e:
            assert "must be a whole snapshot" in str(e)  # noqa: PT017
            refused += 1
        else:
            assert differences(found, expected) == [], place  # a byte that means nothing, such as padding or a date
    assert refused > 75


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 1000])
def test_another_file_is_refused(content, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(FxrpgError, match="must be a whole snapshot that a training run wrote"):
        small_run(tmp_path).fit(resume=True)


def test_no_code_in_a_snapshot_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    torch.save({"format": 1, "model": Evil()}, tmp_path / NAME)
    with pytest.raises(FxrpgError, match="must be a whole snapshot"):
        small_run(tmp_path).fit(resume=True)
    assert not (tmp_path / "run").exists()
    torch.save([1, 2], tmp_path / NAME)
    with pytest.raises(FxrpgError, match="must be a snapshot of format 1, found list"):
        small_run(tmp_path).fit(resume=True)


def test_a_full_disk_leaves_the_snapshot_before(finished, tmp_path):
    path = copied(finished, tmp_path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(OSError, match=NAME):
            snapshots.write(path, snapshots.read(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_what_could_not_be_read_again_is_found_out_at_the_first_snapshot(tmp_path):
    trainer = small_run(tmp_path, settings={"odd": Noisy})  # a class, which weights_only refuses
    with pytest.raises(FxrpgError, match="must be a whole snapshot"):
        trainer.fit()
    assert trainer.step == 1


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: must be 1 or more"),
        ({"snapshot_every": 0}, "snapshot-every: must be 1 or more"),
        ({"workers": -1}, "workers: must be 0 or more"),
        ({"amp": "fp8"}, "amp: must be one of"),
        ({"clip": 0.0}, "clip: must be above 0"),
        ({"ema": 1.0}, "ema: must lie between 0 and 1"),
        ({"batch": 53, "accumulate": 1}, "at most the number of training examples, 52, found 53"),
        ({"accumulate": 3}, r"multiple of accumulate \* processes, 3 \* 1, found 8. Pass such as 9"),
        ({"test": TensorDataset(torch.empty(0, 3), torch.empty(0))}, "test: must hold one example or more"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(FxrpgError, match=message):
        small_run(**changes)


def test_schedulers_that_need_the_loss_are_refused():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(FxrpgError, match="ReduceLROnPlateau"):
        Trainer(model, optimizer, Training(epochs=1, batch=8), Noisy(), scheduler=scheduler)


def test_evaluate_needs_tests():
    with pytest.raises(FxrpgError, match="needs test examples"):
        small_run(test=None).evaluate()


def test_another_optimizer_is_refused(tmp_path):
    """It would silently take the numbers of the snapshot's."""
    examples = TensorDataset(torch.randn(32, 6), torch.randint(3, (32,)))
    for lr, momentum in ((0.1, 0.9), (0.2, 0.9), (0.1, 0.5)):
        model = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        trainer = Trainer(model, optimizer, Training(epochs=1, batch=8), examples, folder=tmp_path)
        if (lr, momentum) == (0.1, 0.9):
            trainer.fit(resume=True)
        else:
            with pytest.raises(FxrpgError, match=r"optimizer must be 'SGD\(.*lr=0.1, .*momentum=0.9"):
                trainer.fit(resume=True)


def test_coordinate_descent_is_part_of_what_a_run_is(tmp_path):
    examples = TensorDataset(torch.randn(32, 6), torch.randint(3, (32,)))

    def trainer(**options):
        torch.manual_seed(0)
        small = fxrpg.transform(nn.Linear(6, 3), dof=10, method="pranc")
        optimizer = torch.optim.Adam(small.parameters())
        descent = fxrpg.PrancTrainer(small, optimizer, **options)
        return Trainer(small, optimizer, Training(epochs=1, batch=8), examples, folder=tmp_path, descent=descent)

    trainer(active=5).fit(resume=True)
    trainer(active=5).fit(resume=True)
    for other in ({"active": 3}, {"active": 5, "period": 2}, {"active": 5, "seed": 1}, {}):
        with pytest.raises(FxrpgError, match="descent must be .active="):
            trainer(**other).fit(resume=True)
    with pytest.raises(FxrpgError, match="trains no prefixes"):
        trainer(nested=True)
