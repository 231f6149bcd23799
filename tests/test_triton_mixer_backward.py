"""The backward kernels of the MLP over the sequence against autograd of the reference, between guard zones of NaN."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F
from trmfast.kernels.mixer_mlp_t_backward import mlp_t_backward, mlp_t_norm_backward, mlp_t_weight_gradient
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection_backward import projection_backward
from trmfast.kernels.swiglu_backward import swiglu_backward
from trmfast.kernels.weight_gradient import sum_splits, weight_gradient

import triton_guard
from triton_bounds import checked_run
from triton_draw import Tensors, buffer, buffers
from triton_formula import DTYPES, EPS, check, gradients, norm_factor
from trmfast.reference import rms_norm, wide_dtype

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN shows what is read outside of a buffer only where it reaches a result; this shows the rest."""
    monkeypatch.setattr(triton_guard, "run", checked_run)


def mixer_formula(t: Tensors) -> Tensors:
    """Gradients of the mixer over the sequence with its residual and norm; ``s`` is what enters the norm."""
    h, gate_up, down = (t[name].requires_grad_() for name in ("h", "gate_up_weight", "down_weight"))
    gate, up = F.linear(h.mT, gate_up).chunk(2, -1)
    s = h.mT + F.linear(F.silu(gate) * up, down)
    found = gradients(rms_norm(s, EPS), t["gradient"].mT, out=h, s=s, gate_up=gate_up, down=down)
    wide = wide_dtype(h.dtype)
    return {
        "out": found["out"],
        "target": found["out"].to(wide),
        "grad_sum": found["s"].mT,
        "sum_gate_up": found["gate_up"].to(wide),
        "sum_down": found["down"].to(wide),
    }


def mixer_inputs(t: Tensors, pad: int) -> Tensors:
    gate, up = F.linear(t["h"].mT, t["gate_up_weight"]).float().chunk(2, -1)
    s = t["h"].mT.float() + F.linear((F.silu(gate) * up).to(t["h"].dtype), t["down_weight"]).float()
    return {
        **t,
        "gate_up_weight": F.pad(t["gate_up_weight"], (0, pad)),
        "h1": (s * norm_factor(s, -1)[..., None]).mT.to(t["h"].dtype).contiguous(),
        "rstd": norm_factor(s, -1),
    }


# The norm of a sequence of one token is its sign: what its gradient is beside rounding errors, only float32 shows.
@pytest.mark.representative(when=lambda length, dtype: length == 21 and dtype == torch.bfloat16)
@pytest.mark.parametrize(
    "length, pad, dtype",
    [
        (21, 0, torch.float32),
        (21, 0, torch.bfloat16),
        pytest.param(21, 0, torch.float16, marks=pytest.mark.grid),
        (13, 3, torch.bfloat16),
        (1, 0, torch.float32),
    ],
    ids=str,
)
def test_mixer_of_short_sequences(length: int, pad: int, dtype: torch.dtype) -> None:
    batch, width, inner, splits = 3, 48, 40, 2

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = mixer_inputs(t, pad)
        inputs.update(
            total_gate_up=torch.zeros(splits, 2 * inner, length), total_down=torch.zeros(splits, length, inner)
        )
        b = buffers(inputs)
        grad_sum, target = buffer("grad_sum", t["h"]), Buffer("target", (batch, length, width), torch.float32)
        tile = Tile.of(BLOCK_N=32, BLOCK_I=16)
        once = Tile.of(BLOCK_N=1024)
        return inputs, [
            mlp_t_backward(
                b["h"], b["gradient"], b["h1"], b["rstd"], b["gate_up_weight"], b["down_weight"], grad_sum,
                buffer("out", t["h"]), targets=[(target, False)], tile=tile,
            ),
            mlp_t_weight_gradient(
                b["h"], grad_sum, b["gate_up_weight"], b["down_weight"], b["total_gate_up"], b["total_down"], tile=tile
            ),
            sum_splits(b["total_gate_up"], Buffer("sum_gate_up", (2 * inner, length), torch.float32), tile=once),
            sum_splits(b["total_down"], Buffer("sum_down", (length, inner), torch.float32), tile=once),
        ]  # fmt: skip

    shapes = {
        "h": (batch, length, width),
        "gradient": (batch, length, width),
        "gate_up_weight": (2 * inner, length),
        "down_weight": (length, inner),
    }
    check(shapes, dtype, mixer_formula, kernel)


@pytest.mark.breadth
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixer_of_long_sequences(dtype: torch.dtype) -> None:
    batch, length, width, inner = 2, 45, 48, 40

    def kernel(t: Tensors) -> tuple[Tensors, Sequence[Launch]]:
        inputs = mixer_inputs(t, 3)
        inputs.update(sum_gate_up=torch.zeros(2 * inner, length), sum_down=torch.zeros(length, inner))
        b = buffers(inputs)
        grad_sum, out = buffer("grad_sum", t["h"]), buffer("out", t["h"])
        target = Buffer("target", (batch, length, width), torch.float32)
        grad_gate_up = Buffer("grad_gate_up", (batch, 2 * inner, width), dtype)
        act = Buffer("activation", (batch, inner, width), dtype)
        tile = Tile.of(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
        return inputs, [
            mlp_t_norm_backward(
                b["gradient"], b["h1"], b["rstd"], grad_sum, tile=Tile.of(BLOCK_M=16, BLOCK_N=32)
            ),
            swiglu_backward(
                b["h"], grad_sum, b["gate_up_weight"], b["down_weight"], grad_gate_up, act, tile=tile, transposed=True
            ),
            projection_backward(
                grad_gate_up, b["gate_up_weight"], out, residual=grad_sum, targets=[(target, False)], tile=tile,
                transposed=True, width=length,
            ),
            weight_gradient(
                [(grad_gate_up, b["h"], b["sum_gate_up"]), (grad_sum, act, b["sum_down"])], tile=tile, transposed=True
            ),
        ]  # fmt: skip

    shapes = {
        "h": (batch, length, width),
        "gradient": (batch, length, width),
        "gate_up_weight": (2 * inner, length),
        "down_weight": (length, inner),
    }
    check(shapes, dtype, mixer_formula, kernel)
