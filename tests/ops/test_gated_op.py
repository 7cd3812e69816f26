"""The gated attention as a registered op: memory linear in the tokens, compilation, and what autograd makes of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mila_mm.ops import gated_linear_attention
from mila_mm.ops.gated import scan


def draw(tokens, channels=6, heads=2, states=3, batch=2, seed=0, dtype=torch.float64):
    """q, k, v, delta, a, D with what a model would give: positive keys and queries, positive delta, negative a."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    return [
        uniform(batch, tokens, heads * states),
        uniform(batch, tokens, heads * states),
        uniform(batch, tokens, channels) - 0.5,
        uniform(batch, tokens, channels) + 0.1,
        -0.1 - uniform(states, channels),
        uniform(channels),
    ]


def gradients(y, leaves, seed=1):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True, materialize_grads=True)


class Watch(TorchDispatchMode):
    """Counts operations and notes the largest tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.calls = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


def watched(tokens, channels=16, states=32):
    q, k, v, delta, a, _ = draw(tokens, channels, 1, states, batch=1, dtype=torch.float32)
    with Watch() as forward:
        y, starts = scan.scan_forward(q, k, v, delta, a, 1)
    with Watch() as backward:
        scan.scan_backward(torch.ones_like(y), q, k, v, delta, a, starts, 1)
    return forward, backward, starts


def test_no_loop_over_tokens():
    for watch in watched(10000)[:2]:
        assert watch.calls < 10000 / 2, 'a loop over tokens makes several operations for each'


def test_no_tensor_of_tokens_x_states_x_channels(monkeypatch):
    monkeypatch.setattr(scan, '_STEP_ELEMENTS', {'cpu': 2**14, 'cuda': 2**14})
    short, long = watched(5000), watched(20000)
    for few, many in zip(short[:2], long[:2], strict=True):
        # What grows with the tokens is of the size of v, for the states between chunks d / length of it.
        assert many.largest <= max(few.largest * 1.3, 20000 * 16) < 20000 * 16 * 32 / 4
    assert long[2].numel() < 20000 * 16


def test_causal_sums_need_memory_linear_in_the_tokens():
    largest = []
    for tokens in (4096, 16384):
        q, k, v, *_ = draw(tokens, 32, 1, 32, batch=1, dtype=torch.float32)
        with Watch() as watch:
            gated_linear_attention(q, k, v, causal=True)
        largest.append(watch.largest)
    assert largest[1] <= 4 * largest[0]


def test_the_registered_ops_pass_pytorchs_checks():
    q, k, v, delta, a, _ = draw(11, channels=4, heads=2, states=2)
    for leaf in (q, k, v, delta, a):
        leaf.requires_grad_()
    torch.library.opcheck(torch.ops.mila_mm.gated_scan_forward.default, (q, k, v, delta, a, 2, 4))


def test_compiles_once_for_all_sizes():
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend('aot_eager')
    torch._dynamo.reset()

    def attend(q, k, v, delta, a):
        return gated_linear_attention(q, k, v, num_heads=2, forget_gate=(delta, a))

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (50, 49, 448, 3136, 5000):
        leaves = [t.requires_grad_() for t in draw(tokens)[:5]]
        y, expected = compiled(*leaves), attend(*leaves)
        torch.testing.assert_close(y, expected)
        for mine, theirs in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert len(compiled_graphs) == 1


def test_a_second_differentiation_says_what_to_do():
    q, k, v, delta, a, _ = (t.requires_grad_() for t in draw(5))
    for backend in ('auto', 'reference'):
        y = gated_linear_attention(q, k, v, num_heads=2, forget_gate=(delta, a), normalize=False, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), v, create_graph=True)
        if backend == 'reference':
            assert torch.autograd.grad(grad.sum(), q)[0].abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="take backend='reference'"):
                torch.autograd.grad(grad.sum(), q)
