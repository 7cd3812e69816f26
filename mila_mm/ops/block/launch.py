"""A block forward and backward on a plan: the kernels in their order, and PyTorch's matrix products between them.

The formulas are those of :mod:`mila_mm.nn.block_node`; parameters come in its order, without the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.block.layout import RESULT, Results, Scratch
from mila_mm.ops.block.plan import Plan
from mila_mm.ops.linear.op import add_branch
from mila_mm.ops.triton.tensors import on_device

Scales = tuple[Tensor | None, Tensor | None]
"""What stochastic depth multiplies each branch by, (B,) in the dtype of the products, or None."""


def forward(
    plan: Plan, x: Tensor, weights: Sequence[Tensor], params: Sequence[Tensor], taps: Tensor, scales: Scales
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a block.

    Args:
        plan: For the shape of all this.
        x: (B, N, C) contiguous.
        weights: Weight and bias of the products joint, qk, out_proj, fc1 and fc2, in ``plan.shape.dtype``.
        params: Weights and biases of cpe1, norm1, dwc, lepe, cpe2, norm2.
        taps: Lepe's weight as :func:`mila_mm.ops.triton.tensors.depthwise_taps` lays it out.
        scales: See ``Scales``.

    Returns:
        The result (B, N, C), x2 (B, N, C), the products joint and qk (B * N, 2C), and the buffer of the other results.
    """
    with on_device(x):
        return _forward(plan, x, weights, params, taps, scales)


def _forward(
    plan: Plan, x: Tensor, weights: Sequence[Tensor], params: Sequence[Tensor], taps: Tensor, scales: Scales
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, layout = plan.shape, plan.results
    buffer = torch.empty(plan.buffer_size, dtype=shape.dtype, device=x.device)
    way = plan.way(False, x, *params, taps, *weights[6:])
    run, at = way.run, Results(*way.places(layout, buffer))
    cpe1, cpe1_bias, norm1, norm1_bias, dwc, dwc_bias, _, lepe_bias, *second = way.of(*params)
    x_place, taps_place, cos, sin = way.of(x, taps, plan.attention.cos, plan.attention.sin)

    run(plan.cpe1, x_place, cpe1, cpe1_bias, norm1, norm1_bias, at.x1, at.y1, at.mean1, at.rstd1)
    joint = F.linear(buffer.as_strided(*plan.y1), weights[0], weights[1])
    u0, gate = way.halves(joint)
    run(plan.dwc, u0, dwc, dwc_bias, u0, at.u)
    qk = F.linear(buffer.as_strided(*plan.u), weights[2], weights[3])
    (qk_place,) = way.of(qk)
    run(plan.state, qk_place, at.u, cos, sin, at.state_parts, at.mean_parts)
    if plan.attention.splits > 1:
        run(plan.reduce, at.state_parts, at.mean_parts, at.state, at.key_mean)
    run(plan.output, qk_place, at.u, taps_place, lepe_bias, gate, cos, sin, at.state, at.key_mean, at.a)
    branch = F.linear(buffer.as_strided(*plan.a), weights[4], weights[5]).view(x.shape)
    x2 = add_branch(branch, layout.view(buffer, RESULT.x1), scales[0])
    run(plan.cpe2, *way.of(x2), *second, at.x3, at.y2, at.mean2, at.rstd2)
    if plan.mlp is None:
        hidden = F.gelu(F.linear(buffer.as_strided(*plan.y2), weights[6], weights[7]))
        branch = F.linear(hidden, weights[8], weights[9]).view(x.shape)
        out = add_branch(branch, layout.view(buffer, RESULT.x3), scales[1])
    else:
        out = torch.empty(x.shape, dtype=shape.residual, device=x.device)
        scale, place = way.of(weights[9] if scales[1] is None else scales[1], out)
        run(plan.mlp, at.y2, *way.of(*weights[6:]), at.x3, scale, place)
    plan.settle(False)
    return out, x2, joint, qk, buffer


def _branch_gradient(grad: Tensor, scale: Tensor | None, dtype: torch.dtype, rows: int) -> Tensor:
    """The gradient of a branch (rows, C) from that of its sum with the shortcut."""
    grad = grad if grad.dtype == dtype else grad.to(dtype)
    return (grad if scale is None else grad * scale[:, None, None]).view(rows, -1)


def backward(
    plan: Plan,
    grad: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    params: Sequence[Tensor],
    taps: Tensor,
    scales: Scales,
) -> tuple[Tensor, Tensor]:
    """Run the gradients.

    Args:
        plan: As in the forward.
        grad: Of the result, (B, N, C) contiguous.
        kept: x, and x2, joint, qk and the buffer as the forward returned them.
        weights: Of joint, qk, out_proj and fc1, fc1's bias and fc2's weight.
        params: As in the forward.
        taps: As in the forward.
        scales: As in the forward.

    Returns:
        The gradient of x (B, N, C), and those of all parameters one behind the other, see
        :func:`mila_mm.ops.block.gradients.gradient_sizes`.
    """
    with on_device(grad):
        run = _Backward(plan, grad, kept, weights[3:], params, taps)
        run.feed_forward(grad, weights[3:], scales[1])
        run.mix(weights[:3], scales[0])
        return run.finish()


class _Backward:
    """One run of the gradients; what its steps share."""

    def __init__(
        self,
        plan: Plan,
        grad: Tensor,
        kept: Sequence[Tensor],
        weights: Sequence[Tensor],
        params: Sequence[Tensor],
        taps: Tensor,
    ) -> None:
        self.plan = plan
        self.x, self.x2, self.joint, self.qk, self.buffer = kept
        if self.buffer.storage_offset():  # unpacked by somebody's hook, as a view
            self.buffer = self.buffer.clone()
        shape, device = plan.shape, grad.device
        self.flat = torch.empty(plan.flat_size, dtype=shape.master, device=device)
        self.scratch = torch.empty(plan.scratch_size, dtype=shape.dtype, device=device)
        self.grad_x = torch.empty(self.x.shape, dtype=shape.residual, device=device)
        foreign = grad, self.x, self.x2, self.joint, self.qk, self.buffer, *weights, *params, taps
        self.way = plan.way(True, *foreign)
        self.params = self.way.of(*params)
        self.taps = taps
        self.results = Results(*self.way.places(plan.results, self.buffer))
        self.at = Scratch(*self.way.places(plan.scratch, self.scratch))
        # Where the gradients of matrices are written to: by kernels, and by products.
        self.place = self.at.matrices if plan.matrices.sums is not None else self.way.of(self.flat)[0]
        self.matrices = self.scratch if plan.matrices.casts else self.flat

    def feed_forward(self, grad: Tensor, weights: Sequence[Tensor], scale: Tensor | None) -> None:
        """From the gradient of the result: those of x2, into ``grad_x``, and of the MLP; the hidden map anew."""
        plan, way, at, kept = self.plan, self.way, self.at, self.results
        fc1_weight, fc1_bias, fc2_weight = weights
        branch = _branch_gradient(grad, scale, plan.shape.dtype, plan.rows)
        grad_hidden = self.scratch.as_strided(*plan.grad_hidden)
        (of_branch,) = way.of(branch)
        if plan.by_hidden:
            way.run(plan.hidden_back, kept.y2, of_branch, *way.of(*weights), at.hidden, at.grad_hidden, at.fc1)
        else:
            hidden = self.scratch.as_strided(*plan.hidden)
            torch.addmm(fc1_bias, self.buffer.as_strided(*plan.y2), fc1_weight.t(), out=hidden)
            torch.mm(branch, fc2_weight, out=grad_hidden)
            way.run(plan.hidden_back, at.hidden, at.grad_hidden, at.fc1)
        grad_y2 = torch.mm(grad_hidden, fc1_weight)
        if plan.matrices.mlp is None:
            self._matrix(3, grad_hidden, self.buffer.as_strided(*plan.y2))
            self._matrix(4, branch, self.scratch.as_strided(*plan.hidden))
        else:
            grads = at.grad_hidden, of_branch, of_branch
            way.run(plan.matrices.mlp, *grads, kept.y2, at.hidden, at.hidden, self.place)

        conv, _, gamma, _ = self.params[8:]
        given, of_y, x2, grad_x = way.of(grad, grad_y2, self.x2, self.grad_x)
        factor = gamma if scale is None else way.of(scale)[0]
        way.run(plan.norm2, given, of_y, kept.x3, kept.mean2, kept.rstd2, gamma, factor, at.grad_conv, at.norm2)
        way.run(plan.conv, at.grad_conv, x2, conv, grad_x, at.cpe2)

    def _matrix(self, index: int, grad: Tensor, rows: Tensor) -> None:
        """The gradient of a matrix from that of a product and from what it was of."""
        torch.mm(grad.t(), rows, out=self.matrices.as_strided(*self.plan.matrix_grads[index]))

    def mix(self, weights: Sequence[Tensor], scale: Tensor | None) -> None:
        """From the gradient of x2, in ``grad_x``: that of x, in its place, and those of the first half."""
        plan, way, at, kept, buffer = self.plan, self.way, self.at, self.results, self.buffer
        joint_weight, qk_weight, out_weight = weights
        conv, _, gamma, _, dwc, dwc_bias = self.params[:6]
        branch = _branch_gradient(self.grad_x, scale, plan.shape.dtype, plan.rows)
        grad_a = torch.mm(branch, out_weight)
        grad_qk, grad_joint = self.scratch.as_strided(*plan.grad_qk), self.scratch.as_strided(*plan.grad_joint)
        u0, gate = way.halves(self.joint)
        grad_u0, grad_gate = way.halves(grad_joint)
        self._attention(grad_a, gate, grad_gate)
        self.scratch.as_strided(*plan.grad_u).addmm_(grad_qk, qk_weight)
        way.run(plan.dwc_back, u0, dwc, dwc_bias, at.grad_u, at.grad_out)
        way.run(plan.dwc_conv, at.grad_out, u0, dwc, grad_u0, at.dwc)
        way.run(plan.columns, at.grad_products, at.products)
        grad_y1 = torch.mm(grad_joint, joint_weight)
        if plan.matrices.mix is None:
            for index, (grad, rows) in enumerate(((grad_joint, plan.y1), (grad_qk, plan.u), (branch, plan.a))):
                self._matrix(index, grad, buffer.as_strided(*rows))
        else:
            grads = way.of(grad_joint, grad_qk, branch)
            way.run(plan.matrices.mix, *grads, kept.y1, kept.u, kept.a, self.place)
        given, of_y, x = way.of(self.grad_x, grad_y1, self.x)
        factor = gamma if scale is None else way.of(scale)[0]
        way.run(plan.norm1, given, of_y, kept.x1, kept.mean1, kept.rstd1, gamma, factor, at.grad_conv, at.norm1)
        way.run(plan.conv, at.grad_conv, x, conv, given, at.cpe1)

    def _attention(self, grad_a: Tensor, gate: Any, grad_gate: Any) -> None:
        """From the attention's gradient: those of qk, of u and of the gate, and lepe's parts."""
        plan, run, at, kept = self.plan, self.way.run, self.at, self.results
        u, state, key_mean, lepe_bias = kept.u, kept.state, kept.key_mean, self.params[7]
        of_a, qk, taps, cos, sin = self.way.of(grad_a, self.qk, self.taps, plan.attention.cos, plan.attention.sin)
        run(plan.gate, of_a, qk, u, taps, lepe_bias, gate, cos, sin, state, key_mean, at.grad_out, grad_gate)
        parts = at.state_parts, at.mean_parts
        run(plan.query, at.grad_out, qk, cos, sin, state, key_mean, at.grad_products, *parts)
        if plan.attention.splits > 1:
            run(plan.reduce, *parts, at.grad_state, at.grad_mean)
        of_sums = at.grad_state, at.grad_mean
        run(plan.key_value, at.grad_out, qk, u, taps, cos, sin, *of_sums, at.grad_products, at.grad_u)
        run(plan.lepe, at.grad_out, u, at.lepe)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Sum the parts, and cast the matrices' gradients."""
        plan, way = self.plan, self.way
        way.run(plan.sums, self.at.norm1, *way.of(self.flat))
        if plan.matrices.sums is not None:
            way.run(plan.matrices.sums, self.place, *way.of(*[self.flat[plan.vectors :]] * 2))
        elif plan.matrices.casts:
            self.flat[plan.vectors :].copy_(self.scratch.as_strided(*plan.all_matrices))
        plan.settle(True)
        return self.grad_x, self.flat
