"""Weights written for others."""

import pytest
import torch

from mila_mm import MILA
from mila_mm.errors import UserError
from mila_mm.weights import (
    load_backbone,
    read_file,
)
from mila_mm.weights.exporting import export


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_export_writes_what_the_released_code_loads(file, published, classifier, tmp_path, suffix):
    out = tmp_path / f'out{suffix}'
    export(file(published), out, image_size=64)
    content = read_file(out)
    assert ('model' if suffix == '.pth' else 'state_dict') in content
    weights = content.get('model') or content['state_dict']
    assert set(weights) == set(classifier)
    assert all(torch.equal(weights[name], value) for name, value in classifier.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file.pth', out.name]
    if suffix == '.pth':  # by anyone, without our reader
        assert list(torch.load(out, weights_only=True)) == ['model']


def test_export_of_a_part_and_of_shared_memory(file, dense, tmp_path, micro, detector):
    block = torch.arange(10.0)
    weights = detector(dense, neck__a=block[:5], neck__b=block[5:], neck__c=torch.ones(4, 4).t())
    path = file({'state_dict': weights, 'optimizer': {'state': {}}})
    export(path, tmp_path / 'all.safetensors', naming='project')
    assert torch.equal(read_file(tmp_path / 'all.safetensors')['state_dict']['neck.b'], block[5:])
    assert export(path, tmp_path / 'part.pth', part='backbone') == len(dense)
    written = read_file(tmp_path / 'part.pth')['model']
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in written.values())
    load_backbone(MILA(**micro), tmp_path / 'part.pth')


def test_export_refuses_what_it_cannot_do(file, dense, tmp_path):
    path = file({'state_dict': dense})
    for target, options, words in (
        ('a.onnx', {}, 'ends in .safetensors or .pth'),
        ('no/folder/a.pth', {}, 'no such folder'),
        ('a.pth', {'naming': 'mine'}, 'naming'),
        ('a.pth', {'image_size': 33}, 'multiple of 32'),
    ):
        with pytest.raises(UserError, match=words):
            export(path, tmp_path / target, **options)
    with pytest.raises(UserError, match='no MILA'):
        export(file({'conv.weight': torch.ones(1)}, 'other.pth'), tmp_path / 'a.pth')
    assert not (tmp_path / 'a.pth').exists()
