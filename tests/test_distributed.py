"""Several processes: DDP, FSDP2, a PRANC basis split over ranks, and checkpoints that change the number of ranks.

A check runs on every rank; the test below it starts it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fxrpg
from fxrpg.assemble import plan_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import traffic  # noqa: E402

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch built with gloo"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "ring": {"dof": 501},
    "pranc": {"dof": 41, "method": "pranc"},
    "pemn": {"dof": 0.1, "method": "pemn"},
}
EVERY_METHOD = pytest.mark.parametrize("method", SETTINGS)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.stop()


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), block(), block(), nn.Flatten(), nn.Linear(8 * 16, 10))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(10, (8,), generator=generator)


def mine(tensor: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def transformed(name: str, way: str = "modules", **settings: Any) -> nn.Module:
    model = torch.fx.symbolic_trace(net()) if way == "graph" else net()
    examples = {"example_inputs": batch()[:1]} if way == "regions" else {}
    return fxrpg.transform(model, **SETTINGS[name] | examples | settings)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02, eps=1e-3)


def train(
    model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer | None = None, steps: int = 3
) -> None:
    optimizer = optimizer or adam(model)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return fxrpg.materialize(model).state_dict()


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors.values())).hexdigest()


def check_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit alike on all ranks, and what one process trains on the whole batch up to rounding."""
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest(found))
    assert len(set(digests)) == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def whole_of(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict, of whole tensors."""
    options = dcp_state.StateDictOptions(full_state_dict=True)
    return dcp_state.get_model_state_dict(model, options=options)


def refused(run: Any, *args: Any, **kwargs: Any) -> str:
    """The text of the FxrpgError that `run` raises."""
    with pytest.raises(fxrpg.FxrpgError) as caught:
        run(*args, **kwargs)
    return str(caught.value)


# --- DistributedDataParallel


def ddp(method: str, way: str = "modules", **options: bool) -> None:
    x, y = batch()
    single, model = transformed(method), transformed(method, way)
    train(single, x, y)
    train(DistributedDataParallel(model, **options), mine(x), mine(y))
    check_alike(model.state_dict(), single.state_dict())
    check_alike(weights(model), weights(single))


@EVERY_METHOD
@pytest.mark.parametrize("way", ["modules", "regions", "graph"])
def test_ddp_trains_as_one_process_does(ranks, method, way):
    ranks(2, ddp, method, way)


@EVERY_METHOD
def test_ddp_on_four_ranks(ranks, method):
    ranks(4, ddp, method)


@EVERY_METHOD
def test_ddp_of_a_static_graph(ranks, method):
    ranks(2, functools.partial(ddp, static_graph=True), method)


class Forked(nn.Module):
    """One of two branches of generated weights is used, here on every rank the same in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.steps, self.head = nn.ModuleList([block(), block()]), 0, nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.head(self.branches[self.steps % 2](x.repeat(1, 3, 1, 1)[:, :8]).flatten(1))


def ddp_unused(method: str) -> None:
    x, y = batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        single, model = (
            fxrpg.transform(Forked(), **SETTINGS[method], plan=[fxrpg.Rule("*", "generate")]) for _ in "ab"
        )
        model.load_state_dict(single.state_dict())
    train(single, x, y)
    train(DistributedDataParallel(model, find_unused_parameters=True), mine(x), mine(y))
    check_alike(model.state_dict(), single.state_dict())


@EVERY_METHOD
def test_ddp_with_parameters_that_a_step_leaves_unused(ranks, method):
    ranks(2, ddp_unused, method)


def ddp_accumulated(method: str) -> None:
    x, y = batch()
    single, model = transformed(method), transformed(method)
    train(single, x, y)
    wrapped, optimizer = DistributedDataParallel(model, gradient_as_bucket_view=True), adam(model)
    for _ in range(3):
        optimizer.zero_grad()
        first, second = mine(x).chunk(2), mine(y).chunk(2)
        with wrapped.no_sync():
            (nn.functional.cross_entropy(wrapped(first[0]), second[0]) / 2).backward()
        (nn.functional.cross_entropy(wrapped(first[1]), second[1]) / 2).backward()
        optimizer.step()
    check_alike(model.state_dict(), single.state_dict())


@EVERY_METHOD
def test_ddp_accumulates_gradients(ranks, method):
    ranks(2, ddp_accumulated, method)


def ddp_other_seed() -> str | None:
    model = DistributedDataParallel(transformed("ring", seed=dist.get_rank()))
    x, _ = batch()
    if dist.get_rank() == 0:
        return None
    return refused(model.module, x)


def test_a_rank_with_another_seed_is_refused(ranks):
    text = ranks(2, ddp_other_seed)[1]
    assert "seed" in text
    assert "on every rank" in text or "everywhere" in text


def exchanged() -> tuple[int, int]:
    return traffic.traffic("dense"), traffic.traffic("ring, 2,359,296 numbers")


def test_a_ring_exchanges_a_quarter_of_the_bytes(ranks):
    """ResNet-18 with a ring of 2,359,296, the dense parameters and the buffers that DDP broadcasts included."""
    for dense, ring in ranks(2, exchanged):
        assert dense >= 4 * 11_689_512  # every gradient, so that the count is known to see them
        assert 4 * 2_891_304 <= ring <= 0.26 * dense


# --- FSDP2


def shard(model: nn.Module, how: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = {"blocks": ["1", "2"], "nested": ["1", "2", ""], "leaf": ["1.0", ""]}
    for part in parts.get(how, [""]):
        module = model.get_submodule(part)
        fully_shard(module, mesh=mesh, reshard_after_forward=None if how != "reshard" else True)
    return model


def fsdp(method: str, how: str, way: str = "modules") -> None:
    x, y = batch()
    single, model = transformed(method), shard(transformed(method, way), how)
    train(single, x, y)
    train(model, mine(x), mine(y))
    state = next(name for name in plan_of(single).states)
    assert len(model.get_parameter(state).to_local()) == len(mine(single.get_parameter(state)))
    check_alike(whole_of(model), single.state_dict())


@EVERY_METHOD
@pytest.mark.parametrize("how", ["root", "nested", "leaf", "reshard"])
def test_fsdp_trains_as_one_process_does(ranks, method, how):
    ranks(2, fsdp, method, how)


@EVERY_METHOD
@pytest.mark.parametrize("way", ["regions", "graph"])
def test_fsdp_of_regions_and_graphs(ranks, method, way):
    ranks(2, fsdp, method, "root", way)


@EVERY_METHOD
def test_fsdp_on_four_ranks(ranks, method):
    ranks(4, fsdp, method, "nested")


def fsdp_in_few_bits() -> None:
    x, y = batch()
    model, policy = transformed("ring"), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    lowered = transformed("ring").bfloat16()
    torch.testing.assert_close(model(x), lowered(x.bfloat16()))
    before = whole_of(model)["fxrpg_ring"]
    train(model, mine(x), mine(y))
    after = whole_of(model)["fxrpg_ring"]
    assert after.dtype == torch.float32
    assert not torch.equal(after, before)


def test_fsdp_computes_in_few_bits(ranks):
    ranks(2, fsdp_in_few_bits)


def fsdp_of_blocks(method: str) -> str:
    x, y = batch()
    return refused(train, shard(transformed(method), "blocks"), mine(x), mine(y))


@pytest.mark.parametrize(("method", "state"), [("ring", "fxrpg_ring"), ("pranc", "fxrpg_alpha")])
def test_fsdp_of_blocks_alone_is_refused(ranks, method, state):
    text = ranks(2, fsdp_of_blocks, method)[0]
    assert text.startswith("1.0.weight: its state " + state)
    assert "fully_shard to the transformed model itself too" in text


def sharded_by_hand(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for state in plan_of(model).states:
        path, _, attribute = state.rpartition(".")
        part = distribute_tensor(model.get_parameter(state).detach(), mesh, [Shard(0)])
        model.get_submodule(path).register_parameter(attribute, nn.Parameter(part))
    return model


def pieces(method: str) -> list[str]:
    """A part called past the root's hooks, in training and not, and models of which the state alone is sharded."""
    x = torch.ones(2, 8, 6, 6)
    model = shard(transformed(method), "nested")
    texts = [refused(lambda: model[1][0].weight.add(1))]
    with torch.no_grad():
        texts.append(refused(lambda: model[1][0].weight.add(1)))
    for way in ("modules", "regions", "graph"):
        texts.append(refused(sharded_by_hand(transformed(method, way)), batch()[0]))
    if method != "pemn":  # whose blocks gather their own scores
        texts.append(refused(model[1], x))
    else:
        model[1](x)
    texts.append(refused(fxrpg.materialize, model))
    return texts


@EVERY_METHOD
def test_a_piece_of_a_state_generates_nothing(ranks, method):
    for *texts, last in ranks(2, pieces, method):
        assert all("found a piece of it, " in text and "fully_shard" in text for text in texts)
        assert "must be whole" in last


def saved_whole(method: str, folder: str) -> None:
    model = shard(transformed(method), "nested")
    train(model, *map(mine, batch()))
    path = Path(folder) / f"{dist.get_rank()}.safetensors"
    fxrpg.save(model, path)
    again = fxrpg.load(net(), path)
    assert digest(again.state_dict()) == digest(whole_of(model))


@EVERY_METHOD
def test_a_sharded_model_is_saved_whole(ranks, method, tmp_path):
    ranks(2, saved_whole, method, str(tmp_path))


# --- a PRANC basis split over ranks


def basis(law: str, k: int, way: str, **settings: Any) -> nn.Module:
    return transformed("pranc", way, dof=k, method=fxrpg.Pranc(law=law), **settings)


def split(law: str, k: int, way: str) -> None:
    """Weights, gradients and what Adam makes of them are bit for bit those of one process."""
    x, y = batch()
    single = basis(law, k, way)
    model = fxrpg.distribute(single)
    train(single, x, y)
    train(model, x, y)
    assert len(model.fxrpg_alpha.to_local()) <= -(-k // dist.get_world_size())
    assert torch.equal(model.fxrpg_alpha.grad.full_tensor(), single.fxrpg_alpha.grad)
    assert digest(whole_of(model)) == digest(single.state_dict())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x), single(x))
            assert torch.equal(copy.deepcopy(model)(x), single(x))


@pytest.mark.parametrize(
    ("law", "world"), [("rademacher", 2), ("rademacher", 4), ("uniform", 2), ("normal", 4), ("khatri_rao", 2)]
)
def test_a_split_basis_gives_the_bits_of_one_process(ranks, law, world):
    ranks(world, split, law, 71, "modules")


@pytest.mark.parametrize("k", [1, 3])
def test_some_ranks_may_hold_nothing(ranks, k):
    for law in ("rademacher", "khatri_rao"):
        ranks(4, split, law, k, "modules")


@pytest.mark.parametrize("way", ["graph", "regions"])
def test_a_split_basis_in_graphs(ranks, way):
    ranks(2, split, "rademacher", 71, way)


def split_data() -> None:
    x, y = batch()
    single = basis("rademacher", 71, "modules")
    model = fxrpg.distribute(single, data="split")
    train(single, x, y)
    train(DistributedDataParallel(model), mine(x), mine(y))
    check_alike(whole_of(model), single.state_dict())


def test_a_split_basis_with_split_data(ranks):
    ranks(2, split_data)


def split_traffic(k: int) -> tuple[int, int]:
    """(bytes of one step, weights)."""
    x, _ = batch()
    model = fxrpg.distribute(basis("rademacher", k, "modules"))
    x.requires_grad_()
    return traffic.exchanged(lambda: model(x).sum().backward()), fxrpg.ledger(model).generated


def test_a_split_basis_exchanges_two_numbers_a_weight(ranks):
    """2P numbers, float64, whatever k, less the biases in backward; and the largest coefficient for each sum."""
    for k in (10, 100):
        for found, count in ranks(2, split_traffic, k):
            biases, tensors = 8 + 8 + 8 + 10, 8
            assert found == 8 * (count + count - biases) + 8 * (tensors + tensors // 2)


def split_refused() -> list[str]:
    model = basis("rademacher", 10, "modules")
    other = basis("rademacher", 10, "modules", seed=dist.get_rank())
    parted = fxrpg.distribute(model)
    return [
        refused(fxrpg.distribute, transformed("ring")),
        refused(fxrpg.distribute, model, data="mixed"),
        refused(fxrpg.distribute, other),
        refused(fxrpg.distribute, parted),
        refused(fxrpg.truncate, parted, 5),
        refused(fxrpg.PrancTrainer, parted, adam(parted)),
    ]


def test_what_cannot_be_split_is_refused(ranks):
    for texts in ranks(2, split_refused):
        for text, word in zip(
            texts, ["PRANC model", "'same', 'split'", "same seed", "whole", "whole", "whole"], strict=True
        ):
            assert word in text


def test_no_process_group_is_told():
    assert "init_process_group" in refused(fxrpg.distribute, transformed("pranc"))


# --- checkpoints that change the number of ranks


def prepared(method: str, how: str, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, as it is called, and its optimizer."""
    model = transformed(method, **settings)
    if how == "distribute":
        model = fxrpg.distribute(model)
    elif how == "fsdp":
        shard(model, "nested")
    return DistributedDataParallel(model) if how == "ddp" else model, adam(model)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found, moments = dcp_state.get_state_dict(model, optimizer)
    return {"model": found, "optimizer": moments}


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """Of the model and of what the optimizer keeps, whole."""
    options = dcp_state.StateDictOptions(full_state_dict=True)
    found, moments = dcp_state.get_state_dict(model, optimizer, options=options)
    kept = {f"{name} {key}": v for name, kept in moments["state"].items() for key, v in sorted(kept.items())}
    return digest(found), digest(dict(sorted(kept.items())))


def checkpoint(method: str, how: str, folder: str) -> tuple[str, str]:
    model, optimizer = prepared(method, how)
    train(model, *map(mine if how != "distribute" else lambda t: t, batch()), optimizer)
    dcp.save(states(model, optimizer), checkpoint_id=folder)
    return digests(model, optimizer)


def resumed(method: str, how: str, folder: str, seed: int = 0) -> tuple[str, str]:
    model, optimizer = prepared(method, how, seed=seed)
    loaded = states(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    dcp_state.set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    return digests(model, optimizer)


def resumed_with_another_seed(method: str, how: str, folder: str) -> str:
    return refused(resumed, method, how, folder, seed=1)


CASES = [(method, how) for method in SETTINGS for how in ("fsdp", "ddp")] + [("pranc", "distribute")]


@pytest.mark.parametrize(("method", "how"), CASES)
def test_training_resumes_on_another_number_of_ranks(ranks, method, how, tmp_path):
    (expected, *others) = ranks(2, checkpoint, method, how, str(tmp_path))
    assert others == [expected]
    for world in (4, 1):
        assert ranks(world, resumed, method, how, str(tmp_path)) == [expected] * world
    for text in ranks(2, resumed_with_another_seed, method, how, str(tmp_path)):
        assert "seed and plan" in text
