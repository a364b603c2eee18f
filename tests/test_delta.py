"""Deltas: the receiver's model comes out bit for bit, what is equal costs nothing, what does not fit is one clear error."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxrpg
from fxrpg import FxrpgError
from fxrpg.delta import PAYLOAD


class Net(nn.Module):
    """What a delta may meet: tied weights, a norm's counter in int64, a buffer of truth values, an empty one, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.middle = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16, bias=False)
        self.again.weight = self.middle.weight
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 3)
        self.register_buffer("mask", torch.arange(16) % 3 == 0)
        self.register_buffer("none", torch.empty(0, 4))
        self.register_buffer("number", torch.tensor(1.5, dtype=torch.float16))

    def forward(self, x):
        return self.last(self.again(self.norm(self.middle(self.first(x)))) * self.mask)


METHODS = {
    "ring": {"dof": 100},
    "pranc": {"dof": 20, "method": "pranc"},
    "pemn": {"dof": 0.1, "method": "pemn"},
    "scopes": {"dof": 0.3, "scope": "layer", "plan": [fxrpg.Rule("*", "generate")]},
    "ordinary": None,
}


def build(method: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    arguments = METHODS[method]
    return Net() if arguments is None else fxrpg.transform(Net(), seed=seed, **arguments)


def trained(model: nn.Module, steps: int = 2) -> nn.Module:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=random)).square().mean().backward()
        optimizer.step()
    return model


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().cpu().contiguous().numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_both_ends_have_the_same_bits(method):
    start = build(method)
    end = trained(start)
    before = bits(start)
    update = fxrpg.delta(start, end)
    made = fxrpg.apply_delta(start, update)
    assert bits(made) == bits(end) != before
    assert bits(start) == before, "the receiver's model stays as it was"
    x = torch.randn(4, 6)
    assert torch.equal(made.eval()(x), end.eval()(x))
    assert made.again.weight is made.middle.weight or method != "ordinary"
    assert bits(trained(made)) == bits(trained(end)), "it trains on as the sender's"


@pytest.mark.parametrize("method", METHODS)
def test_a_receiver_with_other_weights(method):
    """With the architecture, the plan and the seed alone: its own weights, and so its scales, are others."""
    end = trained(build(method))
    torch.manual_seed(1)
    mine = Net() if METHODS[method] is None else fxrpg.transform(Net(), **METHODS[method])
    assert bits(mine) != bits(build(method))
    assert bits(fxrpg.apply_delta(mine, fxrpg.delta(None, end))) == bits(end)


def test_what_is_equal_is_not_sent():
    start = build("ring")
    same = fxrpg.delta(start, copy.deepcopy(start))
    assert len(safetensors.torch.load(same)[PAYLOAD]) <= 16
    assert bits(fxrpg.apply_delta(start, same)) == bits(start)
    end = copy.deepcopy(start)
    with torch.no_grad():
        end.fxrpg_ring[7] += 1.0
    assert len(fxrpg.delta(start, end)) < len(same) + 80, "one number of a hundred"
    assert len(fxrpg.delta(start, trained(start))) > len(same) + 400


def test_the_shorter_form_is_sent():
    """Of numbers that changed a little the bits that differ; of zeros the new values, whatever was there before."""
    start = build("ring")
    near, zero = copy.deepcopy(start), copy.deepcopy(start)
    with torch.no_grad():
        near.fxrpg_ring.mul_(1 + 2**-20)
        zero.fxrpg_ring.zero_()
    assert fields_of(fxrpg.delta(start, near))["how"] == "xor"
    assert fields_of(fxrpg.delta(start, zero))["how"] == "new"
    for end in (near, zero):
        assert bits(fxrpg.apply_delta(start, fxrpg.delta(start, end))) == bits(end)


def test_every_bit_pattern():
    """NaN with a payload, infinities, both zeros, subnormal numbers, in states of all types; a difference would lose them."""
    for dtype, word in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        start = build("ring").to(dtype)
        end = copy.deepcopy(start)
        patterns = torch.tensor([-1, 1, 0, 2**14 + 3, -(2**14)], dtype=word).view(dtype)
        special = torch.tensor([float("inf"), -float("inf"), -0.0, float("nan")], dtype=dtype)
        end.fxrpg_ring.data[:9] = torch.cat([patterns, special])
        for old in (start, None):
            made = fxrpg.apply_delta(start, fxrpg.delta(old, end))
            assert torch.equal(made.fxrpg_ring.data.view(word), end.fxrpg_ring.data.view(word))


def test_frozen_masks_are_bits():
    start, end = (fxrpg.freeze(model) for model in (build("pemn"), trained(build("pemn"), 5)))
    update = fxrpg.delta(start, end)
    assert len(update) < len(fxrpg.delta(build("pemn"), trained(build("pemn"), 5)))
    assert bits(fxrpg.apply_delta(start, update)) == bits(end)


def test_graphs_and_quantised_and_pruned_states():
    start = fxrpg.prune(build("ring"), 0.5)
    end = trained(start)
    assert bits(fxrpg.apply_delta(start, fxrpg.delta(start, end))) == bits(end)
    start = fxrpg.freeze(fxrpg.quantize(build("ring"), bits=8))
    end = fxrpg.freeze(fxrpg.quantize(trained(build("ring")), bits=8))
    assert bits(fxrpg.apply_delta(start, fxrpg.delta(start, end))) == bits(end)
    graph = fxrpg.transform(torch.fx.symbolic_trace(Net()), dof=100)
    end = trained(graph)
    assert bits(fxrpg.apply_delta(graph, fxrpg.delta(graph, end))) == bits(end)


def test_the_seed_is_not_sent():
    seed = 0x1234567890ABCDEF
    update = fxrpg.delta(None, build("ring", seed))
    assert not any(form in update for form in (str(seed).encode(), f"{seed:x}".encode(), seed.to_bytes(8, "little")))


def error(call, *args):
    with pytest.raises(FxrpgError) as caught:
        call(*args)
    return str(caught.value)


def test_another_receiver_is_told():
    start = build("ring")
    middle = trained(start)
    update = fxrpg.delta(start, middle)
    assert "must be the model that the delta was made from" in error(fxrpg.apply_delta, middle, update)
    assert "seed, plan" in error(fxrpg.apply_delta, build("ring", seed=1), update)
    assert "seed, plan" in error(fxrpg.apply_delta, build("pranc"), update)
    assert "seed, plan" in error(fxrpg.apply_delta, Net(), update)
    assert "seed, plan" in error(fxrpg.apply_delta, copy.deepcopy(start).half(), update)
    assert "seed, plan" in error(fxrpg.apply_delta, build("ring", seed=1), fxrpg.delta(None, middle))
    back = fxrpg.delta(middle, start)
    assert bits(fxrpg.apply_delta(fxrpg.apply_delta(start, update), back)) == bits(start)


def test_models_that_have_no_delta():
    start = build("ring")
    assert "two models that differ" in error(fxrpg.delta, start, build("ring", seed=1))
    assert "two models that differ" in error(fxrpg.delta, Net(), start)
    assert "must be a torch.nn.Module" in error(fxrpg.delta, start, start.state_dict())
    assert "with values" in error(fxrpg.delta, None, copy.deepcopy(start).to("meta"))
    assert "must be bytes" in error(fxrpg.apply_delta, start, "update.safetensors")


def fields_of(update: bytes) -> dict[str, str]:
    return json.loads(update[8 : 8 + int.from_bytes(update[:8], "little")])["__metadata__"]


def forged(update: bytes, payload: bytes | None = None, **changes: str) -> bytes:
    """The delta with other fields, or another payload, in a file that is whole."""
    held = safetensors.torch.load(update)[PAYLOAD]
    held = held if payload is None else torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    fields = {name: value for name, value in (fields_of(update) | changes).items() if value is not None}
    return safetensors.torch.save({PAYLOAD: held}, fields)


def test_forged_deltas():
    start = build("ring")
    update = fxrpg.delta(start, trained(start))
    bomb = __import__("zlib").compress(bytes(1 << 24))
    wrong = [
        forged(update, format="2"), forged(update, how="sum"), forged(update, changed=None), forged(update, more=""),
        forged(update, changed="zz"), forged(update, changed=fields_of(update)["changed"] + "00"),
        forged(update, changed="ff" * 2), forged(update, to="0" * 32), forged(update, **{"from": ""}, how="new"),
        forged(update, payload=bomb), forged(update, payload=b"\0"),
        safetensors.torch.save({"other": torch.zeros(3)}), safetensors.torch.save({PAYLOAD: torch.zeros(3)}, fields_of(update)),
        b"", update[:-1], update + b"\0", update[:8],
    ]  # fmt: skip
    before = bits(start)
    for delta in wrong:
        assert error(fxrpg.apply_delta, start, delta)
    assert bits(start) == before


@given(st.data())
def test_damage_is_found(data):
    """One changed byte, wherever it is: an error, or in a place that says nothing, the right model."""
    place = data.draw(st.integers(0, len(UPDATE) - 1))
    damaged = bytearray(UPDATE)
    damaged[place] ^= data.draw(st.integers(1, 255))
    try:
        made = fxrpg.apply_delta(START, damaged)
    except FxrpgError:
        return
    assert bits(made) == bits(END)


START = build("ring")
END = trained(START)
UPDATE = fxrpg.delta(START, END)


def test_channels_last_and_inference_mode():
    """Memory formats are the receiver's own; tensors made in inference mode are compared as any others."""
    start = fxrpg.transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 3)), dof=64)
    end = copy.deepcopy(start)
    with torch.no_grad():
        for p in end.parameters():
            p.add_(1.0)
    update = fxrpg.delta(start, end)
    made = fxrpg.apply_delta(copy.deepcopy(start).to(memory_format=torch.channels_last), update)
    assert made.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    assert bits(made) == bits(end)
    with torch.inference_mode():
        made = fxrpg.apply_delta(start, update)
        assert all(np.array_equal(a, b) for a, b in zip(bits(made).values(), bits(end).values(), strict=True))
