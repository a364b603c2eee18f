"""ONNX has no op that generates weights: an export of a model that does is refused in the words of what to do instead."""

from __future__ import annotations

import sys

import torch

from fxrpg.errors import FxrpgError


def refuse_onnx_export() -> None:
    """Raise FxrpgError if `torch.onnx.export` is at work: it traces with fake tensors, on which every op asks here."""
    onnx = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        raise FxrpgError(
            "torch.onnx.export",
            "the model must have ordinary weights, because ONNX has no op that generates them",
            "a transformed model",
            "Export fxrpg.materialize(model).",
        )


def refuse_onnx_tracing() -> None:
    """`refuse_onnx_export` for the older exporter (`dynamo=False`), which runs the model under TorchScript's tracer.

    The tracer is this thread's own, while the exporter's flag holds for all.
    """
    if torch._C._get_tracing_state() is not None:
        refuse_onnx_export()
