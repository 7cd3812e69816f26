"""A block forward and backward on a plan: the kernels in their order, and PyTorch's matrix products between them.

The formulas are those of :mod:`mila_mm.nn.block_node`; parameters come in its order, without the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.block.plan import RESULT, SCRATCH, Plan, Results, Scratch
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
    shape, layout, rows, c = plan.shape, plan.results, plan.rows, plan.shape.channels
    buffer = torch.empty(layout.size // shape.dtype.itemsize, dtype=shape.dtype, device=x.device)
    way = plan.way(False, x, *params, taps, *weights[6:])
    run, at = way.run, Results(*way.places(layout, buffer))
    cpe1, norm1, (dwc, dwc_bias), (_, lepe_bias), cpe2, norm2 = (way.of(*params[i : i + 2]) for i in range(0, 12, 2))
    tables = way.of(plan.attention.cos, plan.attention.sin)

    run(plan.cpe1, *way.of(x), *cpe1, *norm1, at.x1, at.y1, at.mean1, at.rstd1)
    joint = F.linear(layout.view(buffer, RESULT.y1, rows, c), *weights[:2])
    u0, gate = way.of(*joint.split(c, 1))
    run(plan.dwc, u0, dwc, dwc_bias, u0, at.u)
    qk = F.linear(layout.view(buffer, RESULT.u, rows, c), *weights[2:4])
    qk_place, taps_place = way.of(qk, taps)
    run(plan.state, qk_place, at.u, *tables, at.state_parts, at.mean_parts)
    if plan.attention.splits > 1:
        run(plan.reduce, at.state_parts, at.mean_parts, at.state, at.key_mean)
    run(plan.output, qk_place, at.u, taps_place, lepe_bias, gate, *tables, at.state, at.key_mean, at.a)
    branch = F.linear(layout.view(buffer, RESULT.a, rows, c), *weights[4:6])
    x2 = add_branch(branch.view(x.shape), layout.view(buffer, RESULT.x1), scales[0])
    run(plan.cpe2, *way.of(x2), *cpe2, *norm2, at.x3, at.y2, at.mean2, at.rstd2)
    if plan.mlp is None:
        hidden = F.gelu(F.linear(layout.view(buffer, RESULT.y2, rows, c), *weights[6:8]))
        branch = F.linear(hidden, *weights[8:10]).view(x.shape)
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
        run = _Backward(plan, grad, kept, params, taps)
        run.feed_forward(grad, weights[3:], scales[1])
        run.mix(weights[:3], scales[0])
        return run.finish()


class _Backward:
    """One run of the gradients; what its steps share."""

    def __init__(
        self, plan: Plan, grad: Tensor, kept: Sequence[Tensor], params: Sequence[Tensor], taps: Tensor
    ) -> None:
        self.plan = plan
        self.x, self.x2, self.joint, self.qk, self.buffer = kept
        shape, device = plan.shape, grad.device
        self.flat = torch.empty(sum(plan.sizes), dtype=shape.master, device=device)
        self.scratch = torch.empty(plan.scratch.size // shape.dtype.itemsize, dtype=shape.dtype, device=device)
        self.grad_x = torch.empty(self.x.shape, dtype=shape.residual, device=device)
        self.way = plan.way(True, grad, self.x, *params, taps)
        self.params = self.way.of(*params)
        self.taps = taps
        self.results = Results(*self.way.places(plan.results, self.buffer))
        self.at = Scratch(*self.way.places(plan.scratch, self.scratch))
        # The matrices' gradients in the dtype of the products.
        cast = shape.master != shape.dtype
        self.matrices = plan.scratch.view(self.scratch, SCRATCH.matrices) if cast else self.flat[plan.vectors :]
        self.joint_grad, self.qk_grad, self.out_grad, self.fc1_grad, self.fc2_grad = (
            piece.view(-1, columns)
            for piece, columns in zip(self.matrices.split(plan.matrices), plan.columns_of, strict=True)
        )

    def _result(self, index: int) -> Tensor:
        return self.plan.results.view(self.buffer, index, self.plan.rows, self.plan.shape.channels)

    def _gradient(self, index: int) -> Tensor:
        return self.plan.scratch.view(self.scratch, index)

    def feed_forward(self, grad: Tensor, weights: Sequence[Tensor], scale: Tensor | None) -> None:
        """From the gradient of the result: those of x2, into ``grad_x``, and of the MLP; the hidden map anew."""
        plan, way, at, kept = self.plan, self.way, self.at, self.results
        fc1_weight, fc1_bias, fc2_weight = weights
        branch, y2 = _branch_gradient(grad, scale, plan.shape.dtype, plan.rows), self._result(RESULT.y2)
        hidden, grad_hidden = self._gradient(SCRATCH.hidden), self._gradient(SCRATCH.grad_hidden)
        torch.addmm(fc1_bias, y2, fc1_weight.t(), out=hidden)
        torch.mm(branch, fc2_weight, out=grad_hidden)
        way.run(plan.gelu, at.hidden, at.grad_hidden, at.fc1)
        grad_y2 = torch.mm(grad_hidden, fc1_weight)
        torch.mm(grad_hidden.t(), y2, out=self.fc1_grad)
        torch.mm(branch.t(), hidden, out=self.fc2_grad)

        conv, _, gamma, _ = self.params[8:]
        given, of_y, x2, grad_x = way.of(grad, grad_y2, self.x2, self.grad_x)
        factor = gamma if scale is None else way.of(scale)[0]
        sources = given, of_y, kept.x3, kept.mean2, kept.rstd2, gamma, factor
        way.run(plan.norm2, *sources, at.grad_conv, at.norm2)
        way.run(plan.conv, at.grad_conv, x2, conv, grad_x, at.cpe2)

    def mix(self, weights: Sequence[Tensor], scale: Tensor | None) -> None:
        """From the gradient of x2, in ``grad_x``: that of x, in its place, and those of the first half."""
        plan, way, at, kept = self.plan, self.way, self.at, self.results
        joint_weight, qk_weight, out_weight = weights
        conv, _, gamma, _, dwc, dwc_bias = self.params[:6]
        branch = _branch_gradient(self.grad_x, scale, plan.shape.dtype, plan.rows)
        grad_a = torch.mm(branch, out_weight)
        torch.mm(branch.t(), self._result(RESULT.a), out=self.out_grad)
        products = self._gradient(SCRATCH.grad_products)
        self._attention(grad_a, products)
        grad_qk, grad_joint = products.unbind(0)
        self._gradient(SCRATCH.grad_u).addmm_(grad_qk, qk_weight)
        torch.mm(grad_qk.t(), self._result(RESULT.u), out=self.qk_grad)
        u0, grad_u0 = way.of(self.joint, grad_joint)  # their first halves
        way.run(plan.dwc_back, u0, dwc, dwc_bias, at.grad_u, at.grad_out)
        way.run(plan.dwc_conv, at.grad_out, u0, dwc, grad_u0, at.dwc)
        way.run(plan.columns, at.grad_products, at.products)
        grad_y1 = torch.mm(grad_joint, joint_weight)
        torch.mm(grad_joint.t(), self._result(RESULT.y1), out=self.joint_grad)
        given, of_y, x = way.of(self.grad_x, grad_y1, self.x)
        factor = gamma if scale is None else way.of(scale)[0]
        sources = given, of_y, kept.x1, kept.mean1, kept.rstd1, gamma, factor
        way.run(plan.norm1, *sources, at.grad_conv, at.norm1)
        way.run(plan.conv, at.grad_conv, x, conv, given, at.cpe1)

    def _attention(self, grad_a: Tensor, products: Tensor) -> None:
        """From the attention's gradient: those of qk and of the gate, into ``products``, of u, and lepe's parts."""
        plan, way, at, kept = self.plan, self.way, self.at, self.results
        c, lepe_bias = plan.shape.channels, self.params[7]
        of_a, gate, grad_gate, qk, taps = way.of(grad_a, self.joint[:, c:], products[1, :, c:], self.qk, self.taps)
        tables = way.of(plan.attention.cos, plan.attention.sin)
        state = kept.state, kept.key_mean
        way.run(plan.gate, of_a, qk, kept.u, taps, lepe_bias, gate, *tables, *state, at.grad_out, grad_gate)
        parts, sums = (at.state_parts, at.mean_parts), (at.grad_state, at.grad_mean)
        way.run(plan.query, at.grad_out, qk, *tables, *state, at.grad_products, *parts)
        if plan.attention.splits > 1:
            way.run(plan.reduce, *parts, *sums)
        way.run(plan.key_value, at.grad_out, qk, kept.u, taps, *tables, *sums, at.grad_products, at.grad_u)
        way.run(plan.lepe, at.grad_out, kept.u, at.lepe)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Sum the parts, and cast the matrices' gradients."""
        plan = self.plan
        self.way.run(plan.sums, self.at.norm1, *self.way.of(self.flat))
        if plan.shape.master != plan.shape.dtype:
            self.flat[plan.vectors :].copy_(self.matrices)
        plan.settle(True)
        return self.grad_x, self.flat
