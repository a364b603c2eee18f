"""ONNX: a materialized model gives a file with ordinary weights and the same numbers; a transformed one says what to do."""

from __future__ import annotations

import logging

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxrpg
from fxrpg import FxrpgError

# the exporter's own: what torch has deprecated of its parts
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EVERY = [fxrpg.Rule("*", "generate")]


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
        *(nn.ConvTranspose2d(8, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CASES = {"cnn": (cnn, (2, 3, 12, 12)), "encoder": (encoder, (2, 5, 32))}
METHODS = {"ring": {"dof": 100}, "pranc": {"dof": 20, "method": "pranc"}, "pemn": {"dof": 0.1, "method": "pemn"}}


@pytest.mark.parametrize(("case", "method"), [("cnn", "ring"), ("cnn", "pemn"), ("encoder", "pranc")])
def test_a_materialized_model(case, method, tmp_path):
    torch.manual_seed(0)
    build, shape = CASES[case]
    small = fxrpg.transform(build(), plan=EVERY, **METHODS[method])
    x = torch.randn(shape)
    small(x)  # running statistics
    dense = fxrpg.materialize(small.eval())
    torch.onnx.export(dense, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    held = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(held)
    assert {node.domain for node in held.graph.node} == {""}, "ONNX's own operators only"
    assert sum(len(onnx.numpy_helper.to_array(w).reshape(-1)) for w in held.graph.initializer) > 0.9 * sum(
        p.numel() for p in dense.parameters() if p.dim() > 1
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for inputs in (x, torch.randn(shape)):
        (out,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), small(inputs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamo", [True, False])
def test_a_transformed_model_says_what_to_do(case, dynamo, tmp_path, caplog):
    build, shape = CASES[case]
    small = fxrpg.transform(build(), dof=100, plan=EVERY).eval()
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(Exception, match=r"Export fxrpg\.materialize\(model\)\.") as caught:
        torch.onnx.export(small, (torch.randn(shape),), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    assert isinstance(caught.value, FxrpgError) or isinstance(caught.value.__cause__, FxrpgError)
    assert not list(tmp_path.iterdir())
    small(torch.randn(shape))  # afterwards it runs, and is exported elsewhere, as ever
    torch.export.export(small, (torch.randn(shape),))


def test_graphs_and_exported_programs_too(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    net = cnn().eval()
    graph = fxrpg.transform(torch.fx.symbolic_trace(net), dof=100, plan=EVERY).eval()
    program = torch.export.export(fxrpg.transform(net, dof=100, plan=EVERY).eval(), (x,))
    for model in (graph, program):
        with pytest.raises(Exception, match=r"Export fxrpg\.materialize\(model\)\."):
            torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_materialized_graph(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    graph = fxrpg.transform(torch.fx.symbolic_trace(cnn().eval()), dof=100, plan=EVERY).eval()
    torch.onnx.export(fxrpg.materialize(graph), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), graph(x).detach(), rtol=1e-4, atol=1e-5)
