"""The classifier's losses beside averaged weights."""

import pytest
import torch

from mila_mm.models import MILAImageClassifier
from mila_mm.models.image_classifier import mesa_loss


@pytest.mark.parametrize('options', [{}, {'ratio': 2.0}], ids=['once', 'twice'])
def test_the_divergence_from_the_average_counts_once_unless_said_otherwise(options) -> None:
    structures = pytest.importorskip('mmpretrain.structures')
    torch.manual_seed(0)
    model, average = (MILAImageClassifier('nano', num_classes=3).eval() for _ in range(2))
    x, samples = torch.randn(2, 3, 32, 32), [structures.DataSample().set_gt_label(k) for k in (2, 1)]
    with torch.no_grad():
        assert 'loss_mesa' not in model(x, samples, mode='loss')
        model.set_average(average, **options)
        loss = model(x, samples, mode='loss')['loss_mesa']
        torch.testing.assert_close(loss, options.get('ratio', 1.0) * mesa_loss(model(x), average(x)))
        assert loss > 0
        model.set_average(None)
        assert 'loss_mesa' not in model(x, samples, mode='loss')
