"""Graphs for runtimes that know nothing of this package: the ops leave plain operators in them."""

import pytest
import torch
from torch import nn

from mila_mm.ops import cpe_norm, dwc_silu, gated_linear_attention, mila_attention
from mila_mm.ops.common import needs_plain_operators, only_plain_operators
from mila_mm.ops.gated.reference import gated_linear_attention_reference


class Op(nn.Module):
    """A function as a module, for torch.export."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def attention(qk, v, weight, bias, gate):
    return mila_attention(qk, v, weight, bias, (3, 5), 2, gate)


def norm(x, weight, bias, scale, shift):
    return cpe_norm(x, weight, bias, scale, shift, (3, 5))


def convolution(x, weight, bias):
    return dwc_silu(x, weight, bias, (3, 5))


def scan(q, k, v, delta, rate):
    return gated_linear_attention(q, k, v, num_heads=2, forget_gate=(delta, rate))


CASES = {
    'mila_attention': (attention, [(2, 15, 16), (2, 15, 8), (8, 1, 3, 3), (8,), (2, 15, 8)]),
    'cpe_norm': (norm, [(2, 15, 8), (8, 1, 3, 3), (8,), (8,), (8,)]),
    'dwc_silu': (convolution, [(2, 15, 8), (8, 1, 3, 3), (8,)]),
    'gated_scan': (scan, [(2, 15, 4), (2, 15, 4), (2, 15, 8), (2, 15, 8), (2, 8)]),
}


def inputs(name):
    torch.manual_seed(0)
    tensors = [torch.randn(*shape) for shape in CASES[name][1]]
    if name == 'gated_scan':
        tensors = [x.abs() for x in tensors[:4]] + [-tensors[4].abs()]
    return tensors


def ops_of(program):
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == 'call_function'}


@pytest.mark.parametrize('name', CASES)
def test_an_export_keeps_the_op_unless_asked_for_plain_operators(name):
    tensors = inputs(name)
    with torch.no_grad():
        kept = torch.export.export(Op(CASES[name][0]), tuple(tensors))
        with only_plain_operators():
            plain = torch.export.export(Op(CASES[name][0]), tuple(tensors))
        expected = CASES[name][0](*tensors)
    assert any('mila_mm' in op for op in ops_of(kept))
    assert not any('mila_mm' in op for op in ops_of(plain))
    torch.testing.assert_close(plain.module()(*tensors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_onnx_takes_every_op_unasked(name, tmp_path):
    pytest.importorskip('onnxscript', reason='the extra [export] is not installed')
    onnxruntime = pytest.importorskip('onnxruntime')
    tensors = inputs(name)
    torch.onnx.export(Op(CASES[name][0]).eval(), tuple(tensors), dynamo=True, verbose=False).save(tmp_path / 'op.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'op.onnx', providers=['CPUExecutionProvider'])
    results = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), tensors, strict=True)})
    expected = CASES[name][0](*tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('tokens', [1, 7, 64, 200])
def test_the_unrolled_scan_is_the_recurrence(tokens):
    torch.manual_seed(tokens)
    q, k = (torch.rand(2, tokens, 6) for _ in range(2))
    v, delta = torch.randn(2, tokens, 8), torch.rand(2, tokens, 8)
    gate = delta, -torch.rand(3, 8) * 3
    with only_plain_operators():
        got = gated_linear_attention(q, k, v, num_heads=2, forget_gate=gate, chunk_size=9)
    torch.testing.assert_close(
        got, gated_linear_attention_reference(q, k, v, num_heads=2, forget_gate=gate), rtol=1e-4, atol=1e-5
    )


def test_the_request_ends_with_its_block():
    assert not needs_plain_operators()
    with pytest.raises(RuntimeError), only_plain_operators():
        assert needs_plain_operators()
        raise RuntimeError
    assert not needs_plain_operators()
