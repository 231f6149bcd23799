"""Near misses that only the numbers show, and differences that do not matter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trmfast
from dropin_cases import blocks, make, make_batch, refused, same, step
from dropin_models import HRM, recursive
from dropin_models.layers import Attention, CastedLinear, SwiGLU, Tables, rms_norm

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[Any], None]


def becomes(module: nn.Module, **methods: Any) -> None:
    """Gives a module a class of its own with other methods, as a fork's class would have."""
    module.__class__ = type(type(module).__name__, (type(module),), methods)


def activation(model: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)

    becomes(blocks(model)[1].mlp, forward=forward)


def gate_last(model: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)

    becomes(blocks(model)[0].mlp, forward=forward)


def functional_dropout(model: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.dropout(SwiGLU.forward(self, x), 0.1, self.training)

    becomes(blocks(model)[0].mlp, forward=forward)
    model.eval()


def normalised_query(model: Any) -> None:
    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        return attend(self, hidden_states, cos_sin, norm=True)

    becomes(blocks(model)[0].self_attn, forward=forward)


def other_scale(model: Any) -> None:
    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        return attend(self, hidden_states, cos_sin, scale=1 / self.head_dim)

    becomes(blocks(model)[0].self_attn, forward=forward)


def window(model: Any) -> None:
    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        return attend(self, hidden_states, cos_sin, window=10)

    becomes(blocks(model)[0].self_attn, forward=forward)


def interleaved_rope(model: Any) -> None:
    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        return attend(self, hidden_states, cos_sin, interleaved=True)

    for block in blocks(model):
        becomes(block.self_attn, forward=forward)


def attend(
    self: Any,
    h: Tensor,
    cos_sin: Tables,
    norm: bool = False,
    scale: float | None = None,
    window: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Attention with one thing changed."""
    rows, length, _ = h.shape
    q, k, v = self.qkv_proj(h).view(rows, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    if norm:
        q, k = rms_norm(q, 1e-5), rms_norm(k, 1e-5)
    cos, sin = cos_sin

    def turn(t: Tensor) -> Tensor:
        if interleaved:
            turned = torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2)
        else:
            turned = torch.cat((-t[..., self.head_dim // 2 :], t[..., : self.head_dim // 2]), -1)
        return t * cos + turned * sin

    mask = None
    if window is not None:
        positions = torch.arange(length)
        mask = (positions[:, None] - positions).abs() < window
    mixed = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=mask, scale=scale)
    return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


def pre_norm(model: Any) -> None:
    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        h = hidden_states + self.self_attn(cos_sin=cos_sin, hidden_states=rms_norm(hidden_states, self.norm_eps))
        return h + self.mlp(rms_norm(h, self.norm_eps))

    for block in blocks(model):
        becomes(block, forward=forward)


def fixed_eps(model: Any) -> None:
    """The second norm does not follow norm_eps."""

    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        mixed = self.self_attn(cos_sin=cos_sin, hidden_states=hidden_states)
        h = rms_norm(hidden_states + mixed, self.norm_eps)
        return rms_norm(h + self.mlp(h), 1e-6)

    becomes(blocks(model)[1], forward=forward)


def layer_norm(model: Any) -> None:
    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        mixed = self.self_attn(cos_sin=cos_sin, hidden_states=hidden_states)
        h = F.layer_norm(hidden_states + mixed, (32,), eps=self.norm_eps)
        return F.layer_norm(h + self.mlp(h), (32,), eps=self.norm_eps)

    becomes(blocks(model)[0], forward=forward)


def other_arguments(model: Any) -> None:
    def attention(self: Any, h: Tensor, rope: Tables) -> Tensor:
        return Attention.forward(self, rope, h)

    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        h = rms_norm(hidden_states + self.self_attn(hidden_states, cos_sin), self.norm_eps)
        return rms_norm(h + self.mlp(h), self.norm_eps)

    becomes(blocks(model)[0].self_attn, forward=attention)
    becomes(blocks(model)[0], forward=forward)


def skip_around_the_network(model: Any) -> None:
    def forward(self: Any, hidden_states: Tensor, input_injection: Tensor, **info: Any) -> Tensor:
        return hidden_states + recursive.Level.forward(self, hidden_states, input_injection, **info)

    becomes(model.inner.L_level, forward=forward)


def loop(
    inner: Any, carry: Any, batch: dict[str, Tensor], order: str = "LH", grads: bool = False, scale: float = 1.0
) -> Any:
    """TRM's step with something changed: the order of updates, the gradient window, the input's scale."""
    x, info = inner._start(batch)
    z_H, z_L = carry.z_H, carry.z_L
    for cycle in range(inner.config.H_cycles):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (grads or cycle == inner.config.H_cycles - 1)):
            for letter in order:
                if letter == "L":
                    for _ in range(inner.config.L_cycles):
                        z_L = inner.L_level(z_L, z_H + x * scale, **info)
                else:
                    z_H = inner.L_level(z_H, z_L, **info)
    return z_H, z_L


def other_loop(model: Any, evaluation: dict[str, Any] | None = None, **changes: Any) -> None:
    """Gives the model the changed loop, in evaluation another one if asked for."""

    def forward(self: Any, carry: Any, batch: dict[str, Tensor]) -> Any:
        z_H, z_L = loop(self, carry, batch, **(changes if self.training or evaluation is None else evaluation))
        return recursive.InnerCarry(z_H.detach(), z_L.detach()), *self._finish(z_H)

    becomes(model.inner, forward=forward)


def other_order(model: Any) -> None:
    other_loop(model, order="HL")


def extra_update(model: Any) -> None:
    other_loop(model, order="LHH")


def extra_update_in_evaluation(model: Any) -> None:
    other_loop(model, evaluation={"order": "LHH"})


def gradients_everywhere(model: Any) -> None:
    other_loop(model, grads=True)


def scaled_input(model: Any) -> None:
    other_loop(model, scale=0.9)


def attached_carry(model: Any) -> None:
    def forward(self: Any, carry: Any, batch: dict[str, Tensor]) -> Any:
        z_H, z_L = loop(self, carry, batch)
        return recursive.InnerCarry(z_H, z_L), *self._finish(z_H)

    becomes(model.inner, forward=forward)


def other_head(model: Any) -> None:
    def _finish(self: Any, z: Tensor) -> Any:
        q = self.q_head(z.mean(1)).to(torch.float32)
        return self.lm_head(z)[:, self.puzzle_emb_len :], (q[..., 0], q[..., 1])

    becomes(model.inner, _finish=_finish)


def wider_head(model: Any) -> None:
    """A head that reads more than the state."""

    def _finish(self: Any, z: Tensor) -> Any:
        q = self.q_head(torch.cat((z[:, 0], z[:, :1, 0]), -1)).to(torch.float32)
        return self.lm_head(z)[:, self.puzzle_emb_len :], (q[..., 0], q[..., 1])

    model.inner.q_head = CastedLinear(33, 2, bias=True)
    becomes(model.inner, _finish=_finish)


def failing_code(model: Any) -> None:
    def forward(*_: Any) -> Tensor:
        raise RuntimeError("no kernel for this machine\nand so on")

    becomes(blocks(model)[0].mlp, forward=forward)


ATTENTION = "accepted is softmax attention over sqrt(head_dim) with rotate-half RoPE and nothing normalised"
MLP = r"accepted is down(silu(gate) * up)"
BLOCK = "accepted is h = norm(h + mixer(h)) twice, with RMSNorm without weight and norm_eps"
LOOP = "accepted is the TRM loop, here 2 cycles of 2 updates"

NUMBERS: list[tuple[Change, str, str]] = [
    (activation, "L_level.layers.1.mlp: off by", MLP),
    (gate_last, "L_level.layers.0.mlp: off by", MLP),
    (functional_dropout, "L_level.layers.0.mlp: off by", MLP),
    (normalised_query, "L_level.layers.0.self_attn: off by", ATTENTION),
    (other_scale, "L_level.layers.0.self_attn: off by", ATTENTION),
    (window, "L_level.layers.0.self_attn: off by", ATTENTION),
    (interleaved_rope, "L_level.layers.0.self_attn: off by", ATTENTION),
    (pre_norm, "L_level.layers.0: off by", BLOCK),
    (fixed_eps, "L_level.layers.1: off by", BLOCK),
    (layer_norm, "L_level.layers.0: off by", BLOCK),
    (other_arguments, "L_level.layers.0.self_attn: raised TypeError", ""),
    (skip_around_the_network, "forward: new z_H: off by", LOOP),
    (other_order, "forward: new z_H: off by", LOOP),
    (extra_update, "forward: new z_H: off by", LOOP),
    (extra_update_in_evaluation, "forward: new z_H: off by", LOOP),
    (gradients_everywhere, "forward: gradient of", LOOP),
    (scaled_input, "forward: new z_H: off by", LOOP),
    (attached_carry, "forward: gradient through the carry: off by 1", LOOP),
    (other_head, "forward: q: off by", LOOP),
    (wider_head, "forward: RuntimeError in the TRM loop", ""),
    (failing_code, "L_level.layers.0.mlp: raised RuntimeError: no kernel for this machine", ""),
]


@pytest.mark.parametrize("change, start, end", NUMBERS, ids=[change.__name__ for change, *_ in NUMBERS])
def test_numbers(change: Change, start: str, end: str) -> None:
    model, batch = make("trm", pos_encodings="rope"), make_batch("trm")
    change(model)
    before = None if change is failing_code or change is wider_head else step(model, batch)
    state = torch.get_rng_state()
    differences = refused(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert differences[0].startswith(start), differences
    assert differences[0].endswith(end), differences
    if before is not None:
        assert same(step(model, batch), before)


@pytest.mark.parametrize("accepted", [(torch.float32,), (torch.bfloat16, torch.float16)])
def test_kernels_that_do_not_take_float64_are_compared_in_what_they_take(accepted: tuple[torch.dtype, ...]) -> None:
    """flash-attn takes neither float64 nor float32."""

    def forward(self: Any, cos_sin: Tables, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype not in accepted:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return attend(self, hidden_states, cos_sin, norm=self.normed)

    for normed in (False, True):
        model = make("trm", forward_dtype="bfloat16")
        for block in blocks(model):
            block.self_attn.normed = normed
            becomes(block.self_attn, forward=forward)
        if normed:
            assert refused(model)[0].startswith("L_level.layers.0.self_attn: off by")
        else:
            trmfast.accelerate(model)


def test_harmless_differences_are_taken() -> None:
    """What does nothing does not matter: idle modules, causal attention, which the recursion has too."""
    model = make("trm")
    for block in blocks(model):
        block.mlp.dropout = nn.Dropout(0.0)
        block.attention_dropout = nn.Identity()
        block.self_attn.causal = True
    batch = make_batch("trm")
    expected = step(model, batch)
    trmfast.accelerate(model)
    torch.testing.assert_close(step(model, batch)["heads"], expected["heads"], rtol=1e-3, atol=1e-4)


def test_a_refused_model_can_be_repaired() -> None:
    model = HRM({**vars(make("hrm").config)})
    shared = model.inner.H_level
    model.inner.H_level = model.inner.L_level
    refused(model)
    model.inner.H_level = copy.deepcopy(shared)
    trmfast.accelerate(model)
