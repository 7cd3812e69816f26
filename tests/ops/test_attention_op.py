"""The attention as a registered op: what it saves, how it compiles, and what autograd makes of it."""

import pytest
import torch

from mila_mm.ops import mila_attention


def draw(batch, height, width, channels, dtype=torch.float64, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = (batch, height * width)
    activation = (*tokens, channels)
    shapes = [(*tokens, 2 * channels), activation, (channels, 1, 3, 3), (channels,), activation]
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    tensors[0] += mean
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('loss', [torch.sum, lambda y: y.square().sum()], ids=['linear', 'square'])
def test_second_order_says_that_there_is_none(loss, dtype):
    """Also where qk alone is differentiated, by functions that take a gradient without a graph for zero."""
    qk, v, weight, bias, gate = draw(1, 2, 3, 8, dtype)

    def attend(qk):
        return loss(mila_attention(qk, v, weight, bias, (2, 3), 2, gate))

    (grad,) = torch.autograd.grad(attend(qk.requires_grad_()), qk, create_graph=True)
    with pytest.raises(RuntimeError, match='expected one differentiation, got a second'):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match='expected one differentiation, got a second'):
        torch.autograd.functional.hessian(attend, qk.detach())


def test_torch_func_takes_the_reference():
    qk, v, weight, bias, gate = draw(2, 2, 3, 8)

    def attend(qk, backend='auto'):
        return mila_attention(qk, v, weight, bias, (2, 3), 2, gate, backend=backend)

    direction = torch.randn(qk.shape, dtype=qk.dtype)
    for transform in (
        lambda f: torch.func.jvp(f, (qk,), (direction,))[1],
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(qk),
        lambda f: torch.func.vmap(f)(torch.stack((qk, -qk))),
    ):
        got = transform(attend)
        assert got.abs().sum() > 0
        torch.testing.assert_close(got, transform(lambda x: attend(x, 'reference')))


def saved_elements(function):
    """Count what a call of the function on (2, 16 * 16, 64) keeps for its backward besides its inputs."""
    saved = []
    inputs = [t.requires_grad_() for t in draw(2, 16, 16, 64, torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*inputs)
    own = {t.data_ptr() for t in inputs}
    return sum(t.numel() for t in saved if t.data_ptr() not in own)


def test_op_saves_its_inputs_and_a_state_per_head_only():
    options = (16, 16, 2, 1e-6, 10000.0)
    assert saved_elements(lambda *inputs: torch.ops.mila_mm.attention_forward(*inputs, *options)) == 4 * (32 * 32 + 32)


def test_eager_cpu_saves_the_features_in_place_of_qk_and_one_activation_more():
    qk, activation, per_head = 2 * 256 * 128, 2 * 256 * 64, 4 * (32 * 32 + 32) + 2 * 256 * 2
    kept = saved_elements(lambda *inputs: mila_attention(*inputs[:4], (16, 16), 2, inputs[4]))
    assert kept == qk + activation + per_head


def test_eager_cpu_and_the_op_agree():
    inputs = [t.requires_grad_() for t in draw(2, 7, 5, 64, torch.float32)]
    grad = torch.randn(2, 35, 64, generator=torch.Generator().manual_seed(4))
    options = (7, 5, 2, 1e-6, 10000.0)
    results = []
    for function in (
        lambda: mila_attention(*inputs[:4], (7, 5), 2, inputs[4]),
        lambda: torch.ops.mila_mm.attention_forward(*inputs, *options)[0],
    ):
        y = function()
        results.append((y, *torch.autograd.grad(y, inputs, grad)))
    for eager, op in zip(*results, strict=True):
        torch.testing.assert_close(eager, op, rtol=0, atol=2e-6 * op.abs().max().item())


@pytest.mark.parametrize('shape', [(2, 3, 5, 32, 2), (0, 3, 4, 32, 2)], ids=['two', 'empty_batch'])
def test_opcheck(shape):
    batch, height, width, channels, heads = shape
    inputs = draw(batch, height, width, channels, torch.float32)
    qk, v, weight, bias, gate = (t.requires_grad_() for t in inputs)
    options = (height, width, heads, 1e-6, 10000.0)
    permuted_qk, permuted = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (qk, v))
    for joint, values in ((qk, v), (qk, permuted), (permuted_qk, v)):
        torch.library.opcheck(torch.ops.mila_mm.attention_forward, (joint, values, weight, bias, gate, *options))
        torch.library.opcheck(torch.ops.mila_mm.attention_forward, (joint, values, None, None, None, *options))
        _, state, mean = torch.ops.mila_mm.attention_forward(joint, values, weight, bias, gate, *options)
        detached = [t.detach() for t in (torch.randn_like(v), joint, values, weight, bias, gate, state, mean)]
        torch.library.opcheck(torch.ops.mila_mm.attention_backward, (*detached, *options))


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def attend(*tensors):
        return mila_attention(*tensors[:4], tensors[5], 2, tensors[4]).sum()

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend='aot_eager')
    for size in [(6, 8), (7, 11), (9, 4)]:
        inputs = draw(2, *size, 32, torch.float32)
        got, expected = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
        compiled(*got, size).backward()
        attend(*expected, size).backward()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
