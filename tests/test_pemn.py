"""PEMN: prototypes, masks, what a seed and one bit a weight stand for."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_models import convmixer, resnet20
from torch import Tensor, nn

import fxrpg
from fxrpg import FxrpgError, Pemn
from fxrpg.assemble import plan_of, weight_of
from fxrpg.hashing import PERMUTE, Bijection
from fxrpg.view import View
from fxrpg.weights import scale_of

CPU = torch.device("cpu")
SIZES = {
    1e-1: (6_554, 26_215),
    1e-2: (656, 2_622),
    1e-3: (66, 263),
    1e-4: (7, 27),
    1e-5: (1, 3),
    1.0: (65_536, 262_144),
}
VARIANTS = [
    Pemn(),
    Pemn(values="signed_constant", keep=0.3),
    Pemn(permuted=True, per_layer=True),
    Pemn(threshold="global", keep=0.2),
    Pemn(prototype="one_layer"),
    Pemn(prototype="one_layer", threshold="global", values="signed_constant"),
]
EVERY_VARIANT = pytest.mark.parametrize("method", VARIANTS, ids=repr)


def on_meta(architecture) -> nn.Module:
    with torch.device("meta"):
        return architecture()


def mixer() -> nn.Module:
    torch.manual_seed(0)
    return convmixer(12, 2, 3)


def masked(method: Pemn, dof=20, model: nn.Module | None = None, **settings) -> nn.Module:
    settings |= {"dof": dof} if method.needs_dof else {}
    return fxrpg.transform(mixer() if model is None else model, method=method, **settings)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def view_of(method: Pemn, shape: tuple[int, ...], size: int = 5, tensor: int = 0, offset: int = 0, total=None) -> View:
    total = math.prod(shape) if total is None else total
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    return View(
        generator=method, seed=7, tensor=tensor, shape=shape, order=order, offset=offset, total=total, size=size
    )


def values_of(model: nn.Module, name: str) -> Tensor:
    """The weight's fixed values, unscaled, in logical order."""
    view = plan_of(model).views[name]
    return view.generator.fixed_values(view, CPU)


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's bytes: -0.0 is not 0.0."""
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    for name in plan_of(expected).views:
        assert torch.equal(bits_of(weight_of(found, name)), bits_of(weight_of(expected, name))), name


# Counts: the table in the method's facts.


@pytest.mark.parametrize(
    ("dim", "depth", "bits"), [(256, 6, 437_248), (256, 8, 581_120), (512, 6, 1_660_928), (512, 8, 2_210_816)]
)
def test_t11_t12_masks_and_prototypes_of_convmixer(dim, depth, bits):
    model = on_meta(lambda: convmixer(dim, depth))
    norms = 2 * dim * (2 * depth + 1)
    for ratio, sizes in SIZES.items():
        ledger = fxrpg.ledger(fxrpg.transform(model, dof=ratio, method="pemn"))
        assert (ledger.mask_bits, ledger.generated, ledger.dense) == (bits, bits, norms)
        assert ledger.dof == sizes[dim == 512]
        assert ledger.trainable == bits + norms
    one_layer = fxrpg.ledger(fxrpg.transform(model, method=Pemn(prototype="one_layer")))
    assert one_layer.mask_bits == bits
    assert one_layer.dof == dim * (3 * 4 + 25 + dim + 10)


def test_t11_bytes_of_the_masks():
    model = fxrpg.freeze(fxrpg.transform(convmixer(256, 6), dof=1e-3, method="pemn"))
    assert sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("_mask")) == 54_656


@pytest.mark.parametrize(("ratio", "compression"), [(1.0, 5.52), (1e-1, 21.63), (1e-2, 30.53), (1e-3, 31.85)])
def test_t13_ideal_compression(ratio, compression):
    """32 T / (32 D + T) for T weights of 32 bits and D prototype values."""
    ledger = fxrpg.ledger(fxrpg.transform(on_meta(lambda: convmixer(256, 6)), dof=ratio, method="pemn"))
    found = 32 * ledger.generated / (32 * ledger.dof + ledger.mask_bits)
    assert found == pytest.approx(compression, abs=0.005)


def test_everything_is_masked_but_norms_and_biases():
    model = fxrpg.transform(on_meta(lambda: convmixer(256, 6, bias=True)), dof=66, method="pemn")
    assert fxrpg.ledger(model).mask_bits == 437_248
    assert {name.rpartition(".")[2] for name in plan_of(model).views} == {"weight"}
    assert {"0.weight", "11.weight"} <= set(plan_of(model).views)
    resnet = fxrpg.transform(on_meta(resnet20), dof=66, method="pemn")
    assert fxrpg.ledger(resnet).mask_bits == 267_696 + 640


def test_an_int_is_the_size_itself():
    largest = 12 * 12
    for dof, size in ((1, 1), (1.0, largest), (largest, largest), (7.0, 7), (0.5, largest // 2 + 1)):
        assert plan_of(masked(Pemn(), dof)).size == size


# Prototypes.


def test_golden_values():
    """If one of these changes, files written before do not decode any more."""
    expected = {
        Pemn(): ["0x1.7c96e76ddf9bfp-3", "0x1.2e5e534b7e8e5p+0", "-0x1.40ce7dfaa1dd8p-2"],
        Pemn(permuted=True): ["-0x1.40ce7dfaa1dd8p-2", "-0x1.40ce7dfaa1dd8p-2", "0x1.2e5e534b7e8e5p+0"],
        Pemn(prototype="one_layer"): ["-0x1.49218c55a8e7ep-2", "-0x1.1bf7f4e365489p-1", "0x1.33b8d09c1a7a1p+1"],
    }
    signs = {
        Pemn(values="signed_constant"): "++---++---++",
        Pemn(values="signed_constant", permuted=True): "--+-+-++-+-+",
        Pemn(values="signed_constant", prototype="one_layer"): "+----++-+-+-",
    }
    for method, values in expected.items():
        found = method.fixed_values(view_of(method, (3, 4), tensor=3, offset=12, total=40), CPU)
        assert [x.hex() for x in found[:3].tolist()] == values
    for method, values in signs.items():
        found = method.fixed_values(view_of(method, (3, 4), tensor=3, offset=12, total=40), CPU)
        assert "".join("+-"[int(x < 0)] for x in found) == values
    scores = Pemn().init_state([view_of(Pemn(), (3, 4), tensor=3)], 1.0).flatten()
    assert [x.hex() for x in scores[:2].tolist()] == ["-0x1.70db510000000p-9", "0x1.9862910c00000p-3"]


def test_mp_weights_are_prefixes_of_the_largest():
    model = masked(Pemn(), 1.0)
    whole = values_of(model, "3.1.weight")
    assert len(whole) == plan_of(model).size == 144
    for name in plan_of(model).views:
        found = values_of(model, name)
        assert torch.equal(found, whole[: len(found)]), name


@pytest.mark.parametrize("size", [1, 7, 66, 143])
@pytest.mark.parametrize("values", ["normal", "signed_constant"])
def test_rp_weights_repeat_the_first_values_of_mp(size, values):
    model = masked(Pemn(values=values), size)
    whole = values_of(masked(Pemn(values=values), 1.0), "3.1.weight")
    for name in plan_of(model).views:
        found = values_of(model, name)
        assert torch.equal(found, whole[torch.arange(len(found)) % size]), name


def test_rp_with_one_permutation_for_all():
    model, plain = masked(Pemn(permuted=True), 10), masked(Pemn(), 10)
    total = fxrpg.ledger(model).mask_bits
    order = Bijection.keyed(total, 0, PERMUTE)
    prototype = values_of(plain, "3.1.weight")[:10]
    for name, view in plan_of(model).views.items():
        places = order(torch.arange(view.count)) % 10
        assert torch.equal(values_of(model, name), prototype[places]), name
        assert not torch.equal(values_of(model, name), values_of(plain, name)), name
    uses = torch.bincount(order(torch.arange(total)) % 10, minlength=10)
    assert uses.max() - uses.min() <= 1


def test_one_layer_shares_values_by_shape():
    model = masked(Pemn(prototype="one_layer"))
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for name, view in plan_of(model).views.items():
        by_shape.setdefault(view.shape, []).append(values_of(model, name))
    assert sorted(len(values) for values in by_shape.values()) == [1, 1, 2, 2]
    for values in by_shape.values():
        assert all(torch.equal(values[0], other) for other in values)
    first = [tuple(values[0][:20].tolist()) for values in by_shape.values()]
    assert len(set(first)) == 4
    assert plan_of(model).size == sum(map(math.prod, by_shape))
    # masks differ: scores belong to the weight, not to its shape
    assert not torch.equal(weight_of(model, "3.1.weight"), weight_of(model, "4.1.weight"))


@pytest.mark.parametrize("prototype", ["random_padding", "one_layer"])
def test_signed_constants_have_one_magnitude(prototype):
    model = masked(Pemn(values="signed_constant", prototype=prototype), 100)
    magnitudes = torch.cat([weight_of(model, name).flatten() for name in plan_of(model).views]).abs().unique()
    assert magnitudes.tolist() == [0, pytest.approx(math.sqrt(2 / 12), rel=1e-4)]
    signs = values_of(model, "3.1.weight")
    assert abs(signs[:100].mean().item()) < 0.5
    assert signs.abs().unique().tolist() == [1]


def test_normal_values_have_unit_deviation():
    method = Pemn()
    values = method.fixed_values(view_of(method, (300, 300), 90_000), CPU)
    assert abs(values.mean().item()) < 0.02
    assert values.std().item() == pytest.approx(1, abs=0.01)


def test_weights_of_other_seeds_differ():
    for method in VARIANTS:
        first, second = masked(method), masked(method, seed=1)
        assert not torch.equal(weight_of(first, "3.1.weight"), weight_of(second, "3.1.weight"))


def test_scales():
    """Kaiming's rule: of the largest weight for all, as the authors do, or each weight's own."""
    shared, own = masked(Pemn()), masked(Pemn(per_layer=True))
    for name, view in plan_of(shared).views.items():
        assert scale_of(shared.fxrpg_scale, view).item() == pytest.approx(math.sqrt(2 / 12), rel=2**-16)
        assert scale_of(own.fxrpg_scale, view).item() == pytest.approx(math.sqrt(2 / view.fan_in), rel=2**-16), name
    assert {view.fan_in for view in plan_of(own).views.values()} == {9, 12}


def test_of_equally_large_weights_one_gives_the_scale_whatever_their_order():
    layers = {"a": nn.Linear(4, 9), "b": nn.Linear(9, 4)}
    for names in ("ab", "ba"):
        model = masked(Pemn(), 5, nn.ModuleDict({name: layers[name] for name in names}))
        assert scale_of(model.fxrpg_scale, plan_of(model).views["b.weight"]).item() == pytest.approx(2**-0.5, rel=1e-4)


def test_first_scores_are_pytorchs_uniform():
    model = masked(Pemn(), model=nn.Sequential(nn.Conv2d(8, 64, 5), nn.Linear(64, 100)))
    for name, fan_in in (("0.weight", 200), ("1.weight", 64)):
        scores = model.get_parameter(f"{name}_score")
        assert scores.shape == plan_of(model).views[name].shape
        assert scores.abs().max() <= fan_in**-0.5
        assert scores.abs().max() > 0.99 * fan_in**-0.5
        assert abs(scores.mean().item()) < 5 * (3 * fan_in * scores.numel()) ** -0.5
        assert scores.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
    first, second = (model.get_parameter(f"{n}.weight_score").flatten()[:6400] for n in (0, 1))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.06


# Masks.


@settings(max_examples=150)
@given(data=st.data())
def test_exactly_so_many_are_kept(data):
    """Of the largest magnitude, of equal ones the first in logical order; halves round up, one is kept at least."""
    shape = data.draw(st.sampled_from([(1,), (2, 3), (7, 1), (5, 4, 3, 2), (20, 9)]))
    keep = data.draw(
        st.sampled_from([0.5, 0.25, 0.1, 1e-9, 1 - 1e-9]) | st.floats(0, 1, exclude_min=True, exclude_max=True)
    )
    method = Pemn(keep=keep)
    view = view_of(method, shape)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    numbers = data.draw(
        st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, math.inf, -math.inf]), min_size=1)  # ties
        | st.lists(st.floats(-100, 100), min_size=1)
    )
    flat = torch.tensor([*numbers, *[numbers[0]] * view.count][: view.count], dtype=dtype)
    scores = view.from_logical(flat)
    kept = method.mask(scores, view)
    count = max(1, math.floor(keep * view.count + 0.5))
    assert kept.sum() == count
    order = sorted(range(view.count), key=lambda i: (-abs(flat[i].item()), i))
    assert set(kept.nonzero().flatten().tolist()) == set(order[:count])
    packed = method.freeze(scores, view)
    assert len(packed) == -(-view.count // 8)
    assert torch.equal(method.mask(packed, view), kept)


@pytest.mark.parametrize("value", [0.0, 0.25, math.inf, math.nan])
def test_equal_scores_keep_the_first(value):
    method = Pemn(keep=0.3)
    view = view_of(method, (4, 5))
    assert method.mask(torch.full((4, 5), value), view).tolist() == [True] * 6 + [False] * 14


def test_broken_scores_are_the_largest():
    """Training that diverged keeps the count."""
    method = Pemn(keep=0.5)
    scores = torch.tensor([[1.0, 2.0, math.nan, 3.0]])
    assert method.mask(scores, view_of(method, (1, 4))).tolist() == [False, False, True, True]


@pytest.mark.parametrize("threshold", ["layer", "global"])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_three_numbers_stand_for_a_mask(threshold, levels):
    """What kernels are given: they find the mask of any entry alone."""
    method = Pemn(threshold=threshold, keep=0.3)
    view = view_of(method, (4, 3, 2, 2), total=48)
    scores = torch.randn(method.state_shape(view), generator=torch.Generator().manual_seed(2))
    scores = (scores * levels).round() if levels else scores
    entries = view.to_logical(scores) if method.local else scores
    least, last, rest = method.bounds(scores, view).tolist()
    sizes = entries.abs().tolist()
    kept = [size > least or (size == least and i <= last) for i, size in enumerate(sizes)]
    assert method.mask(scores, view).tolist() == kept
    assert sum(kept) == math.floor(0.3 * 48 + 0.5)
    assert rest == 0
    scores.view(-1)[5] = math.nan
    assert math.isnan(method.bounds(scores, view)[2])


@EVERY_VARIANT
def test_weights_are_values_or_zero(method):
    model = masked(method)
    for name, view in plan_of(model).views.items():
        weight = view.to_logical(weight_of(model, name))
        state = model.get_parameter(plan_of(model).state_of(name)).detach()
        kept = method.mask(state, view)
        expected = values_of(model, name).float() * scale_of(model.fxrpg_scale, view)
        assert torch.equal(bits_of(weight), bits_of(torch.where(kept, expected, 0.0)))
        if method.local:
            assert kept.sum() == max(1, math.floor(method.keep * view.count + 0.5))


def test_a_global_threshold_keeps_the_largest_of_all():
    model = masked(Pemn(threshold="global", keep=0.2))
    scores = model.fxrpg_score
    total = fxrpg.ledger(model).mask_bits
    assert scores.shape == (total,)
    kept = {name: view.generator.mask(scores, view) for name, view in plan_of(model).views.items()}
    assert sum(int(mask.sum()) for mask in kept.values()) == math.floor(0.2 * total + 0.5)
    taken = torch.cat([scores[v.offset : v.offset + v.count][kept[name]] for name, v in plan_of(model).views.items()])
    dropped = torch.cat(
        [scores[v.offset : v.offset + v.count][~kept[name]] for name, v in plan_of(model).views.items()]
    )
    assert taken.abs().min() > dropped.abs().max()
    shares = {round(float(mask.float().mean()), 2) for mask in kept.values()}
    assert len(shares) > 1, "layers differ in how much they keep"


def test_scores_lie_beside_their_weights():
    model = masked(Pemn())
    scores = {name for name, _ in model.named_parameters() if name.endswith("_score")}
    assert scores == {f"{name}_score" for name in plan_of(model).views}
    for name, view in plan_of(model).views.items():
        assert model.get_parameter(f"{name}_score").shape == view.shape
    assert fxrpg.explain(model(images()).sum().backward() or model).fraction("staged") == 1
    assert all(model.get_parameter(name).grad.count_nonzero() > 0 for name in scores)


@EVERY_VARIANT
def test_training_learns_the_masks(method):
    model = masked(method, 144)
    torch.manual_seed(3)
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    before = {name: weight_of(model, name) for name in plan_of(model).views}
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(weight_of(model, name), old) for name, old in before.items())


# Frozen.


def test_a_network_of_a_single_value():
    model = fxrpg.transform(convmixer(256, 6), dof=1e-5, method="pemn")
    assert plan_of(model).size == 1
    values = torch.cat([weight_of(model, name).flatten() for name in plan_of(model).views]).unique()
    assert len(values) == 2
    assert 0 in values
    kept = sum(weight_of(model, name).count_nonzero() for name in plan_of(model).views)
    assert kept == 437_248 // 2


def test_size_of_a_frozen_file(tmp_path):
    model = fxrpg.freeze(fxrpg.transform(convmixer(256, 6), dof=1e-3, method="pemn"))
    fxrpg.save(model, tmp_path / "frozen.safetensors")
    size = (tmp_path / "frozen.safetensors").stat().st_size
    norms = sum(t.nbytes for m in model.modules() if isinstance(m, nn.BatchNorm2d) for t in m.state_dict().values())
    print(f"frozen ConvMixer-256/6, RP 1e-3: {size:,} bytes, {norms:,} of them batch norms, 54,656 masks")
    assert size == fxrpg.ledger(model).bytes_stored
    assert size - norms < 70_000
    again = fxrpg.load(convmixer(256, 6), tmp_path / "frozen.safetensors").eval()
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(again(x), model.eval()(x))


def trained(method: Pemn) -> nn.Module:
    """A model whose scores and batch statistics are not those of the start."""
    model = masked(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    return model


@EVERY_VARIANT
@pytest.mark.parametrize("training", [True, False])
def test_frozen_models_compute_the_same(method, training, tmp_path):
    model = trained(method).train(training)
    frozen, x = fxrpg.freeze(model), images()
    assert frozen.training == training
    fxrpg.save(frozen, tmp_path / "frozen.safetensors")
    unfrozen_again = fxrpg.freeze(masked(method))
    unfrozen_again.load_state_dict(frozen.state_dict())
    copies = {
        "frozen": frozen,
        "copied": copy.deepcopy(frozen),
        "pickled": pickle.loads(pickle.dumps(frozen)),
        "loaded": fxrpg.load(mixer(), tmp_path / "frozen.safetensors").train(training),
        "state_dict": unfrozen_again.train(training),
    }
    expected = copy.deepcopy(model)(x)
    assert not any(name.endswith("_score") for name in frozen.state_dict())
    assert sum(b.numel() for n, b in frozen.named_buffers() if n.endswith("_mask")) <= 768 // 8 + 14
    for how, found in copies.items():
        assert_same_weights(found, model)
        assert plan_of(found).digest() == plan_of(frozen).digest(), how
        assert torch.equal(copy.deepcopy(found)(x), expected), how
    copied = copy.deepcopy(frozen)
    copied(x).sum().backward()
    reference = copy.deepcopy(model)
    reference.zero_grad()
    reference(x).sum().backward()
    for name, parameter in copied.named_parameters():
        assert torch.equal(parameter.grad, reference.get_parameter(name).grad), name


@EVERY_VARIANT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_frozen_models_of_other_types(method, dtype):
    model, x = trained(method).eval(), images(dtype)
    cast = copy.deepcopy(model).to(dtype)
    assert torch.equal(fxrpg.freeze(cast)(x), cast(x))
    assert_same_weights(fxrpg.freeze(cast), cast)
    frozen = fxrpg.freeze(model).to(dtype)
    masks = {name: buffer for name, buffer in frozen.named_buffers() if name.endswith("_mask")}
    assert all(mask.dtype == torch.uint8 for mask in masks.values())
    assert frozen(x).dtype == dtype
    for name in plan_of(model).views:
        found, wide = weight_of(frozen, name), weight_of(model, name)
        assert found.dtype == dtype
        assert torch.equal(found != 0, wide != 0), "casting moves no mask"
        torch.testing.assert_close(found.float(), wide, rtol=0.02, atol=1e-6)
    if dtype == torch.float64:  # wider scores select the same entries
        assert torch.equal(frozen(x), cast(x))
        assert_same_weights(frozen, cast)
        assert torch.equal(fxrpg.freeze(cast).float()(images()), model(images()))


@pytest.mark.parametrize("method", [VARIANTS[0], VARIANTS[3]], ids=repr)
def test_frozen_graphs(method):
    x = images()
    graph = masked(method, model=fx.symbolic_trace(mixer().eval()))
    frozen = fxrpg.freeze(graph)
    assert isinstance(frozen, fx.GraphModule)
    assert torch.equal(frozen(x), graph(x))
    torch.testing.assert_close(fxrpg.materialize(frozen)(x), graph(x))


# Fitting.


def error(method: Pemn, kept: Tensor, values: Tensor, target: Tensor) -> float:
    return (torch.where(kept, values, 0.0) - target).square().sum().item()


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("scores", ["random", "equal", "few"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fitted_masks_are_the_best_of_all(keep, scores, dtype):
    torch.manual_seed(2)
    method = Pemn(keep=keep, permuted=True)
    target = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)).to(dtype)
    model = masked(method, 8, target)
    for name in plan_of(model).views:
        score = model.get_parameter(f"{name}_score")
        with torch.no_grad():
            if scores == "equal":
                score.fill_(0.5)
            if scores == "few":
                score.copy_((score * 4 / score.abs().max()).round() / 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fitted = fxrpg.fit(model, target)
    total = wanted_energy = 0.0
    for name, view in plan_of(model).views.items():
        wanted = view.to_logical(target.get_parameter(name).detach()).double()
        values = values_of(model, name) * scale_of(model.fxrpg_scale, view).double()
        count = max(1, math.floor(keep * view.count + 0.5))
        best = min(
            error(
                method,
                torch.zeros(view.count, dtype=torch.bool).index_fill(0, torch.tensor(kept), True),
                values,
                wanted,
            )
            for kept in itertools.combinations(range(view.count), count)
        )
        score = fitted.model.get_parameter(f"{name}_score").detach()
        found = error(method, method.mask(score, view), values, wanted)
        assert found == pytest.approx(best, abs=1e-9)
        if scores == "random" and dtype == torch.float64:
            assert torch.equal(
                score.abs().flatten().sort().values, before[f"{name}_score"].abs().flatten().sort().values
            )
        assert bool((score != 0).all()) or scores == "few"
        total, wanted_energy = total + best, wanted_energy + wanted.square().sum().item()
    assert fitted.residual == pytest.approx(total / wanted_energy, rel=1e-6 if dtype == torch.float64 else 0.02)
    assert "train before use" in str(fitted)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the argument stays untouched"


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_fitted_global_masks_are_the_best_of_all(keep):
    torch.manual_seed(2)
    method = Pemn(keep=keep, threshold="global")
    target = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    model = masked(method, 6, target)
    fitted = fxrpg.fit(model, target)
    views = plan_of(model).views
    wanted = torch.cat([view.to_logical(target.get_parameter(name).detach()) for name, view in views.items()])
    values = torch.cat([values_of(model, n) * scale_of(model.fxrpg_scale, v).double() for n, v in views.items()])
    count = math.floor(keep * 12 + 0.5)
    best = min(
        error(method, torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(kept), True), values, wanted)
        for kept in itertools.combinations(range(12), count)
    )
    assert fitted.residual == pytest.approx(best / wanted.square().sum().item(), rel=1e-12)
    scores = [m.fxrpg_score.detach().abs().sort().values for m in (model, fitted.model)]
    assert torch.equal(*scores)


def test_a_model_is_fitted_to_itself_exactly():
    model = trained(Pemn(values="signed_constant"))
    again = fxrpg.fit(masked(Pemn(values="signed_constant")), fxrpg.materialize(model))
    assert again.residual == 0
    assert_same_weights(again.model, model)
    assert torch.equal(again.model.eval()(images()), model.eval()(images()))


# Mistakes.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda keep=keep: Pemn(keep=keep), r"Pemn\(keep=...\): must be a float in \(0, 1\), found")
            for keep in (0, 1, 0.0, 1.0, -0.5, 1.5, True, "0.5", None, math.nan)
        ),
        (
            lambda: Pemn(prototype="two_layer"),
            r"Pemn\(prototype=...\): must be one of \('random_padding', 'one_layer'\)",
        ),
        (lambda: Pemn(values="uniform"), r"Pemn\(values=...\): must be one of \('normal', 'signed_constant'\)"),
        (lambda: Pemn(threshold="model"), r"Pemn\(threshold=...\): must be one of \('layer', 'global'\)"),
        (lambda: masked(Pemn(), 145), r"dof: must be an int in \[1, 144\] \(the largest weight\) .* found 145"),
        (lambda: masked(Pemn(), 0), r"dof: must be an int in \[1, 144\]"),
        (lambda: masked(Pemn(), -1), r"dof: must be an int in \[1, 144\]"),
        (lambda: masked(Pemn(), True), r"dof: must be an int in \[1, 144\]"),
        (lambda: masked(Pemn(), 7.5), r"dof: must be an int in \[1, 144\]"),
        (lambda: masked(Pemn(), None), r"dof: must be an int in \[1, 144\] .* found none"),
        (lambda: fxrpg.transform(mixer(), dof=9, method=Pemn(prototype="one_layer")), "dof: .* follows from .*shapes"),
        (lambda: fxrpg.quantize(masked(Pemn())), "quantize: needs a ring, found the method 'pemn'. .*freeze"),
        (lambda: fxrpg.prune(masked(Pemn()), 0.5), "prune: needs a ring or a PRANC basis, found the method 'pemn'"),
        (
            lambda: fxrpg.freeze(fxrpg.freeze(masked(Pemn()))),
            "freeze: needs a mask or a quantised ring, found a frozen",
        ),
        (lambda: fxrpg.fit(fxrpg.freeze(masked(Pemn())), mixer()), "fit: must be a model that can be trained"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(FxrpgError, match=message):
        call()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sequence", [True, False])
def test_a_module_of_two_names_is_saved_with_one_mask(sequence, frozen, tmp_path):
    def build():
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.ReLU(), layer) if sequence else nn.ModuleDict({"z": layer, "a": layer})

    small = fxrpg.transform(build(), dof=0.5, method="pemn")
    small = fxrpg.freeze(small) if frozen else small
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(build(), tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size == fxrpg.ledger(small).bytes_stored
    run = (lambda model: model) if sequence else (lambda model: model["a"])
    x = torch.randn(3, 6)
    assert torch.equal(run(loaded)(x), run(small)(x))
    if not frozen:
        run(loaded)(x).sum().backward()
        scores = [p for name, p in loaded.named_parameters() if name.endswith("_score")]
        assert len(scores) == 1
        assert scores[0].grad is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", ["layer", "global"])
def test_scores_that_are_not_finite_are_not_hidden(threshold, bad):
    small = fxrpg.transform(nn.Linear(6, 6), dof=0.5, method=fxrpg.Pemn(threshold=threshold))
    state = next(p for name, p in small.named_parameters() if "_score" in name)
    state.detach().view(-1)[3] = bad
    assert bool(small(torch.randn(2, 6)).isnan().all())
    with pytest.raises(fxrpg.FxrpgError, match="needs finite numbers"):
        fxrpg.freeze(small)
