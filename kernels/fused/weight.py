"""A generated weight as an argument of fused ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxrpg.view import Form, View


class Weight(NamedTuple):
    """What a fused op is given of a weight.

    Args:
        view: where it lies in the state.
        state: as `Generator.kernel_state` returns it.
        scale: the table of scales, in which the view has a row.
        tables: whether its addresses may be read from a cached table.
    """

    view: View
    state: Tensor
    scale: Tensor
    tables: bool = False

    @staticmethod
    def of(view: View, state: Tensor, scale: Tensor, tables: bool = False) -> Weight:
        """The weight of `view` read from a state as it is stored."""
        return Weight(view, view.generator.kernel_state(state, view), scale, tables)

    def form(self, step: int, dtype: torch.dtype) -> Form:
        """Its device functions, for columns that begin at multiples of `step` and products in `dtype`."""
        form = self.view.generator.form(self.state, self.view, step, dtype, self.tables)
        assert form is not None
        return form

    def gradient(self, step: int, dtype: torch.dtype) -> tuple[Form, Tensor]:
        """(device functions whose `accumulate` adds into it, the state's gradient so far: zeros, float32)."""
        found = torch.zeros(self.state.shape, dtype=torch.float32, device=self.state.device)
        return self.form(step, dtype).into(found), found


def precision(dtype: torch.dtype, convolution: bool = False) -> str:
    """How float32 products are made, as torch's own settings say: "tf32" or "ieee"."""
    backend: Any = torch.backends.cudnn if convolution else torch.backends.cuda
    backend = backend.conv if convolution else backend.matmul
    return "tf32" if dtype == torch.float32 and backend.fp32_precision == "tf32" else "ieee"
