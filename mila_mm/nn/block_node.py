"""A block of MILA as one node of autograd, with a backward written by hand.

Step by step a block is some forty nodes, each with its own way through autocast and the dispatcher; on a GPU that takes
the host longer than the device needs. Here autograd sees x and the parameters go in and one tensor come out. With c for
a depthwise convolution, n for a LayerNorm and the block's names for the rest::

    x1 = x + c1(x),  y1 = n1(x1)                      (cpe_norm)      [u0, gate] = [in_proj, act_proj](y1)
    u  = silu(dwc(u0))                                (dwc_silu)      a = attention(qk(u), u, gate)
    x2 = x1 + s1 out_proj(a)                                          s1, s2 of stochastic depth
    x3 = x2 + c2(x2), y2 = n2(x3)                     (cpe_norm)      out = x3 + s2 fc2(gelu(fc1(y2)))

Kept for the backward is what these lines name; the MLP's hidden map is computed again. Weights are cast once for all
blocks (:mod:`mila_mm.nn.step_weights`); their gradients leave each block by themselves, so that distributed training
sends them while the backward goes on.

Where Triton kernels serve all of it, a block is one op each way (:mod:`mila_mm.ops.block`), which launches them from a
plan kept for the shape; elsewhere the parts above are an op each.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.nn.nodes import FirstOrderOnly, direct_ops
from mila_mm.ops.block import op as whole
from mila_mm.ops.block.gradients import in_order
from mila_mm.ops.block.op import EPS, ROPE_BASE
from mila_mm.ops.common import as_written
from mila_mm.ops.linear.op import add_branch
from mila_mm.ops.triton.configs import KernelFailed

PARAMETERS = (
    *('cpe1.weight', 'cpe1.bias', 'norm1.weight', 'norm1.bias'),
    *('in_proj.weight', 'act_proj.weight', 'in_proj.bias', 'act_proj.bias', 'dwc.weight', 'dwc.bias'),
    *('attn.qk.weight', 'attn.qk.bias', 'attn.lepe.weight', 'attn.lepe.bias', 'out_proj.weight', 'out_proj.bias'),
    *('cpe2.weight', 'cpe2.bias', 'norm2.weight', 'norm2.bias'),
    *('mlp.fc1.weight', 'mlp.fc1.bias', 'mlp.fc2.weight', 'mlp.fc2.bias'),
)
"""What a node takes behind its first two arguments, and the order of its gradients."""

_STENCILS = (*range(4), 8, 9, 12, 13, *range(16, 20))  # of PARAMETERS: convolutions and norms, read as they are


class Products(NamedTuple):
    """Weights and biases of a block's matrix products in the dtype that it computes in; ``joint`` is in_proj and
    act_proj, one below the other."""

    joint_weight: Tensor
    joint_bias: Tensor
    qk_weight: Tensor
    qk_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class Setting(NamedTuple):
    """What a call of a block has beside tensors.

    Attributes:
        height: Of the map.
        width: Of the map.
        num_heads: Of the attention.
        eps1: Of the first norm.
        eps2: Of the second.
        dtype: That products and convolutions are computed in: autocast's, or x's.
    """

    height: int
    width: int
    num_heads: int
    eps1: float
    eps2: float
    dtype: torch.dtype


def mix(
    x: Tensor, weights: Products, params: tuple[Tensor, ...], scale: Tensor | None, setting: Setting
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first half: x2, and what its backward needs."""
    ops, size = direct_ops(), setting[:2]
    x1, y1, mean, rstd = ops.cpe_norm_forward(x, *params[:4], *size, setting.eps1, setting.dtype)
    joint = F.linear(y1, weights.joint_weight, weights.joint_bias)
    u0, gate = joint.chunk(2, dim=-1)
    u = ops.dwc_silu_forward(u0, *params[8:10], *size)
    qk = F.linear(u, weights.qk_weight, weights.qk_bias)
    lepe = params[12:14]
    a, state, key_mean = ops.attention_forward(qk, u, *lepe, gate, *size, setting.num_heads, EPS, ROPE_BASE)
    x2 = add_branch(F.linear(a, weights.out_weight, weights.out_bias), x1, scale)
    return x2, (x, x1, mean, rstd, y1, joint, u, qk, a, state, key_mean)


def feed_forward(
    x: Tensor, weights: Products, params: tuple[Tensor, ...], scale: Tensor | None, setting: Setting
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The second half: the block's result, and what its backward needs."""
    ops = direct_ops()
    x3, y2, mean, rstd = ops.cpe_norm_forward(x, *params[16:20], *setting[:2], setting.eps2, setting.dtype)
    return ops.mlp_forward(y2, *weights[6:10], x3, scale), (x, x3, mean, rstd, y2)


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch from that of its sum with the shortcut."""
    grad = grad if grad.dtype == dtype else grad.to(dtype)
    return grad if scale is None else grad * scale[:, None, None]


def _mix_backward(
    grad: Tensor,
    saved: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    params: tuple[Tensor, ...],
    scale: Tensor | None,
    setting: Setting,
    master: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of x, of the stencils and norm before the attention and in it, and of the first products: from x2's.

    Those of weights are in the dtype of the products, for the caller to cast, those of biases in ``master``, that of
    the parameters. ``weights`` are those of joint, qk and out, ``params`` of cpe1, norm1, dwc and lepe.
    """
    ops, size = direct_ops(), setting[:2]
    x, x1, mean, rstd, y1, joint, u, qk, a, state, key_mean = saved
    u0, gate = joint.chunk(2, dim=-1)
    channels = u.shape[-1]
    joint_weight, qk_weight, out_weight = weights

    grad_a, *grads_out = ops.linear_backward(_scaled(grad, scale, setting.dtype), a, out_weight, master)
    grad_qk, grad_u, *grads_lepe, grad_gate = ops.attention_backward(
        grad_a, qk, u, *params[6:8], gate, state, key_mean, *size, setting.num_heads, EPS, ROPE_BASE
    )
    grad_u.view(-1, channels).addmm_(grad_qk.view(-1, 2 * channels), qk_weight)
    _, *grads_qk = ops.linear_backward(grad_qk, u, None, master)
    grad_u0, *grads_dwc = ops.dwc_silu_backward(grad_u, u0, *params[4:6], *size)
    grad_joint = torch.cat((grad_u0, grad_gate), dim=-1)
    grad_y1, *grads_joint = ops.linear_backward(grad_joint, y1, joint_weight, master)
    grad_x, *grads_cpe = ops.cpe_norm_backward(grad, grad_y1, x, *params[:4], x1, mean, rstd, *size)
    return grad_x, *grads_cpe, *grads_joint, *grads_dwc, *grads_qk, *grads_lepe, *grads_out


def _feed_forward_backward(
    grad: Tensor,
    saved: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    params: tuple[Tensor, ...],
    scale: Tensor | None,
    setting: Setting,
) -> tuple[Tensor, ...]:
    """Gradients of x2, of stencil and norm (``params``), and of the MLP in its weights' dtype, from the result's."""
    ops = direct_ops()
    x, x3, mean, rstd, y2 = saved
    grad_y2, *grads_mlp = ops.mlp_backward(grad, y2, *weights, scale)
    grad_x, *grads_cpe = ops.cpe_norm_backward(grad, grad_y2, x, *params, x3, mean, rstd, *setting[:2])
    return grad_x, *grads_cpe, *grads_mlp


def _in_order(first: list[Tensor], last: list[Tensor], master: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients of all parameters in their order and dtype, from those of the two halves."""
    casts = [first[4], first[8], first[12], *last[4:8]]
    if casts[0].dtype != master:
        casts = direct_ops().cast_all(casts, master)
    joint, qk, out, *mlp = casts
    channels = joint.shape[1]
    halves = (*joint.split(channels), *first[5].split(channels))
    return *first[:4], *halves, *first[6:8], qk, first[9], *first[10:12], out, first[13], *last[:4], *mlp


class Call(NamedTuple):
    """One call of a block.

    Attributes:
        weights: See :class:`Products`.
        scales: What stochastic depth multiplies each branch by, (B,), or None.
        setting: Everything else.
        taps: Lepe's weight as the kernels read it (:func:`mila_mm.ops.triton.tensors.depthwise_taps`); None where they
            do not run.
    """

    weights: Products
    scales: tuple[Tensor | None, Tensor | None]
    setting: Setting
    taps: Tensor | None = None

    def plan(self, x: Tensor, master: torch.dtype, keep: bool) -> Any:
        """That by which kernels of ours run the whole block on x, with parameters of dtype ``master``, or None."""
        if self.taps is None:
            return None
        return whole.find(x, self.weights.fc1_weight.shape[0], master, self.scales, keep, self.setting)


class BlockNode(torch.autograd.Function):
    """The node: ``BlockNode.apply(x, call, *parameters)`` with x (B, N, C) and the parameters of ``PARAMETERS``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *params: Tensor) -> Tensor:
        """Compute the block's result (B, N, C)."""
        weights, scales, setting, taps = call
        stencils = [params[i] for i in _STENCILS]
        ctx.setting = setting
        # Of the parameters behind the products and of the first three biases nobody asks for values.
        ctx.master, ctx.params = params[4].dtype, params
        ctx.plan, done = call.plan(x, ctx.master, True), None
        if ctx.plan is not None:
            assert taps is not None
            with suppress(KernelFailed):
                x = x.contiguous()
                done = whole.forward(ctx.plan, x, weights, stencils, taps, scales)
        if done is not None:
            out, *rest = done
            kept: tuple[Tensor | None, ...] = (x, *rest, taps)
        else:
            x2, kept1 = mix(x, weights, params, scales[0], setting)
            out, kept2 = feed_forward(x2, weights, params, scales[1], setting)
            ctx.plan, kept = None, (*kept1, *kept2)
        ctx.save_for_backward(*weights[:6:2], *weights[6:], *scales, *stencils, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x and of all parameters."""
        saved = ctx.saved_tensors  # once: under activation checkpointing each access recomputes
        given, params, x = grad, saved[9:21], saved[21]
        with torch.no_grad(), as_written(grad):
            grads = _gradients(ctx, grad.contiguous(), saved[:7], saved[7:9], params, saved[21:])
        if torch.is_grad_enabled():  # create_graph=True
            grads = tuple(FirstOrderOnly.apply(each, given, x, *ctx.params) for each in grads)
        return grads[0], None, *grads[1:]


def _gradients(
    ctx: Any,
    grad: Tensor,
    weights: tuple[Tensor, ...],
    scales: tuple[Tensor | None, Tensor | None],
    params: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Those of x and of all parameters in their order."""
    if ctx.plan is not None:
        *results, taps = kept
        with suppress(KernelFailed):
            grad, flat = whole.backward(ctx.plan, grad, results, weights[:6], params, taps, scales)
            return grad, *in_order(flat, grad.shape[-1], weights[3].shape[0])
        kept = whole.results(ctx.plan, results)
    grad, *last = _feed_forward_backward(grad, kept[11:], weights[3:], params[8:], scales[1], ctx.setting)
    grad, *first = _mix_backward(grad, kept[:11], weights[:3], params[:8], scales[0], ctx.setting, ctx.master)
    return grad, *_in_order(first, last, ctx.master)


def run(x: Tensor, call: Call, params: tuple[Tensor, ...]) -> Tensor:
    """Compute a block, as a node where somebody may ask for gradients. Autocast must be off."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params)):
        return BlockNode.apply(x, call, *params)
    with torch.no_grad():
        plan = call.plan(x, params[4].dtype, False)
        if plan is not None:
            assert call.taps is not None
            stencils = [params[i] for i in _STENCILS]
            with suppress(KernelFailed):
                return whole.forward(plan, x, call.weights, stencils, call.taps, call.scales)[0]
        x = mix(x, call.weights, params, call.scales[0], call.setting)[0]
        return feed_forward(x, call.weights, params, call.scales[1], call.setting)[0]
