"""The classifier as a graph: what timm's own test suite asks of its models with torch.fx, and ONNX.

Of timm's tests (tests/test_models.py there) those of torch.jit.script are left out: the trunk's depth of outputs,
options by keyword and the ops' checks are Python that TorchScript's language, in maintenance since 2025, does not have.
"""

import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import mila_mm  # noqa: F401  registers the names
from mila_mm.nn.classifier import MILAClassifier


@pytest.fixture(params=[False, True], ids=['plain', 'fused'])
def model(request):
    torch.manual_seed(0)
    return timm.create_model('mila_tiny', num_classes=5, fused=request.param).eval()


def as_graph(model):
    """The whole model as timm's tests make it one."""
    tracer = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train, val = get_graph_node_names(model, tracer_kwargs=tracer, suppress_diff_warning=True)
    return create_feature_extractor(
        model,
        train_return_nodes=[train[-1]],
        eval_return_nodes=[val[-1]],
        tracer_kwargs=tracer,
        suppress_diff_warning=True,
    )


def test_fx_forward(model):
    graph = as_graph(model)
    for size in ((64, 96), (33, 71)):
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            (y,) = graph(x).values()
            assert torch.equal(y, model(x))


def test_fx_backward(model):
    graph = as_graph(model.train())
    graph.train()
    (y,) = graph(torch.rand(2, 3, 64, 64)).values()
    y.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in graph.parameters())
    assert len(list(graph.parameters())) == len(list(model.parameters()))


def test_onnx_of_the_classifier(tmp_path):
    pytest.importorskip('onnxscript', reason='the extra [export] is not installed')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = MILAClassifier('nano', num_classes=5).eval()
    x = torch.rand(1, 3, 33, 71)
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / 'model.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)
