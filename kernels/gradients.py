"""Arithmetic that backward kernels share, and the order in which they differentiate a block.

Widths: D = hidden_size, I = intermediate_size, Q = (num_heads + 2 num_kv_heads) * head_dim, A = num_heads * head_dim,
T = B * L tokens.  ``grad h`` is the gradient of the loss with respect to h.  A norm ``y = r * s``, with r the
reciprocal root of the mean square of s (plus eps), is differentiated from its own output:

    grad s = r * (grad y - y * mean(grad y * y))

so that backward reads no s, except of norms whose outputs it does not need otherwise (norm_backward.py).  Gradients
between kernels have the compute dtype, sums inside a kernel are float32, and gradients of weights and of states are
float32 in memory.  No kernel uses atomics: every element of every result belongs to one program, and results do not
depend on the order in which programs run.

The kernels of one block, last to first; s1 and s2 are what its two norms take, h1 what lies between the mixers, y the
output of the block, h its input, ds = grad s:

    attention and SwiGLU                             reads                          writes            elements / D
    (norm_backward        a net's last block only    grad y (f32), y, rstd2         ds2               4
    swiglu_backward                                  h1, ds2                        grad gu, act      2 + 3 I/D
    projection_backward   gate_up; + ds2; norm       grad gu, ds2, h1, rstd1        ds1               3 + 2 I/D
    projection_backward   o_proj                     ds1                            grad mixed        1 + A/D
    attention_backward_*  L <= 128: one launch       qkv, grad mixed                grad qkv          (2 Q + A)/D
                          longer: queries, keys      qkv, mixed, lse, grad mixed    grad qkv, delta   (3 Q + 3 A)/D
    projection_backward   qkv_proj; + ds1; norm of   grad qkv, ds1, h, rstd2 of     ds2 of the        3 + Q/D
                          the block below            the block below                block below
    weight_gradient       all four in one launch     ds2, act, grad gu, h1,         four gradients    3+(3 I+A+Q)/D
                                                     ds1, mixed, grad qkv, h

The first block of a net ends with ``projection_backward(..., targets=...)`` instead: it adds the gradient of the sum
that entered the net to the float32 gradient of every state in that sum.  At D = A = 512 and I = Q = 1536 these are 47
elements / D a token for a short sequence.

    mlp_t instead of attention, after ds2 and grad gu as above
    projection_backward   gate_up; + ds2             grad gu, ds2                   grad h1           2 + 2 I/D
    mlp_t_backward        norm and mixer, L <= 128   h, h1, rstd1 [B, D], grad h1   ds1, grad h       5
    mlp_t_weight_gradient recomputes gate and up     h, ds1                         two gradients     2
    norm_backward         of the block below         grad h, h, rstd2 of it         ds2 of it         3

    mlp_t with L > 128: the intermediates [B, It, D], It = seq_intermediate_size, go through memory
    mlp_t_norm_backward                              grad h1, h1, rstd1 [B, D]      ds1               3
    swiglu_backward       transposed                 h, ds1                         grad gu, act      2 + 3 It/L
    projection_backward   transposed; + ds1          grad gu, ds1                   grad h            2 + 2 It/L
    weight_gradient       transposed                 grad gu, h, ds1, act           two gradients     2 + 3 It/L

    conv_swiglu instead of SwiGLU; act as the forward kernel wrote it, before the convolution
    conv_swiglu_backward  down, SiLU, convolution    ds2, act                       grad conv, z      1 + 3 I/D
    gate_up_backward      recomputes gate and up     h1, grad conv                  grad gu           1 + 3 I/D
    conv_gradient         sums partials              partials                       two gradients     small

then as with SwiGLU, except that weight_gradient takes (ds2, z) for the down projection.

    norms ahead of mixers, behind branches, or with weights (backward_block.py); s is the sum that enters a mixer, x its
    norm, dy the gradient of what leaves it with its residual, dm that of what the mixer makes
    column_sums           weight of the norm behind      dy, y                          a gradient        2
    norm_backward         the norm behind                dy, y, rstd                    dm                3
    ...                   the mixer as above, from dm    x and its values
    projection_backward   its first product              grad of it                     dx                1 + 2 I/D
    norm_backward         the norm ahead; + dy or dm     dx, x, rstd, dy or dm          ds                4
    gate_backward         after o_proj                   grad a, a, gate                grad o, grad gate 5 A/D
    head_norm_backward    queries, then keys             grad q, normed q               grad q            3 A/D

    simple_gla instead of attention, behind grad mixed; its sums of decays are made again
    sum_decays            from the logits                logits                         c (f64)           small
    simple_gla_backward_* queries, then keys             qkv, c, grad mixed             grad qkv, grad c  (3 Q + 2 A)/D
    decays_backward       from grad c                    logits, grad c                 grad logits       small
"""

import triton
import triton.language as tl
from trmfast.kernels.dot import narrow

__all__ = ["activation_gradient", "norm_gradient", "store_targets", "swiglu_gradient"]

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_TAU_INVERSE = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def norm_gradient(gradient, output, rstd, WIDTH: tl.constexpr, AXIS: tl.constexpr):
    """Gradient of a norm's input; all float32, zero outside the WIDTH elements along AXIS; rstd broadcasts."""
    mean = tl.expand_dims(tl.sum(gradient * output, AXIS), AXIS) / WIDTH
    return rstd * (gradient - output * mean)


@triton.jit
def swiglu_gradient(gate, up, gradient):
    """Gradients of gate and up, and the activation ``silu(gate) * up``, from the activation's gradient; all float32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    grad_gate = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
    return grad_gate, gradient * silu, silu * up


@triton.jit
def activation_gradient(up, gradient, ACTIVATION: tl.constexpr):
    """Gradient of what a square of a ReLU or an exact GELU takes, and the activation; all float32."""
    if ACTIVATION == "relu2":
        positive = tl.maximum(up, 0.0)
        grad_up = 2.0 * positive * gradient
        activation = positive * positive
    else:
        below = 0.5 * (1.0 + tl.erf(up * SQRT_HALF))  # of the normal distribution
        density = SQRT_TAU_INVERSE * tl.exp(-0.5 * up * up)
        grad_up = gradient * (below + up * density)
        activation = up * below
    return grad_up, activation


@triton.jit
def store_targets(added, overwritten, offsets, mask, value):
    """Adds a value to every tensor of one tuple, and stores it in every tensor of the other."""
    for i in tl.static_range(len(overwritten)):
        tl.store(overwritten[i] + offsets, narrow(value, overwritten[i].dtype.element_ty), mask)
    for i in tl.static_range(len(added)):
        target = added[i] + offsets
        total = value + tl.load(target, mask, 0.0).to(tl.float32)
        tl.store(target, narrow(total, added[i].dtype.element_ty), mask)
