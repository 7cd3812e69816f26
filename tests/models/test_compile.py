"""MILA under torch.compile and torch.export."""

import pytest
import torch

from mila_mm import MILA

# Two stages hold every kind of layer; symbolic sizes make the compiler's work grow fast with the depth.
SMALL = dict(arch=dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1))
SIZES = [(64, 96), (75, 101), (40, 130)]


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_compile_fullgraph_for_any_size(training):
    torch._dynamo.reset()
    model = MILA(**SMALL).train(training)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        image = torch.rand(2, 3, *size)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        got = compiled(image)
        model.load_state_dict(state)  # running statistics moved
        for a, b in zip(got, model(image), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1, 'a new size must not compile again'


def test_compile_gradients(weighted_sum, same_gradients):
    torch._dynamo.reset()
    model = MILA(**SMALL).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend='aot_eager')
    image = torch.rand(2, 3, 75, 101)
    outputs, grads = [], []
    for forward in (model, compiled):
        model.zero_grad()
        outputs.append(forward(image))
        weighted_sum(outputs[-1]).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    same_gradients(grads[1], grads[0], 1e-4)


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_export(backend):
    model = MILA(**SMALL, attn_backend=backend).eval()
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.rand(1, 3, 64, 96),), dynamic_shapes=(sides,))
    image = torch.rand(1, 3, 75, 101)
    with torch.no_grad():
        for a, b in zip(program.module()(image), model(image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_trace_uses_plain_operators():
    model = MILA(**SMALL).eval()
    image = torch.rand(1, 3, 64, 96)
    traced = torch.jit.trace(model, image)
    assert 'mila_mm::' not in str(traced.inlined_graph)
    for a, b in zip(traced(image), model(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
