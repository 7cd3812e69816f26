"""Predictions in a pickle: data come through, a program does not."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

import mila_mm  # noqa: F401 - what is tested here
from mila_mm.cli import command
from mila_mm.compat import pickles
from mila_mm.compat.pickles import UnsafePickleError


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


class Setting:
    """Pickles as an object whose state is set."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple:
        return InstanceData, (), self.state


CONTENTS = {
    'predictions': [{'scores': torch.rand(3), 'masks': [{'size': [4, 5], 'counts': b'\x80a'}], 'img_id': 7}],
    'dtypes': {'half': torch.ones(2, dtype=torch.bfloat16), 'kind': torch.int64, 'empty': torch.zeros(0, 4)},
    'views': torch.arange(12).view(3, 4)[:, 1:3].t(),
    'arrays': {'a': np.arange(6.0).reshape(2, 3), 'b': np.float32(2.5), 'c': np.array(['x', 'yz']), 'd': np.zeros(0)},
    'containers': OrderedDict(a={1, 2}, b=frozenset('x'), c=(1, None, True, 2j), d='ß', e=b'\x00\xff'),
}


@pytest.mark.parametrize('protocol', [2, 4, 5])
@pytest.mark.parametrize('name', list(CONTENTS))
def test_data_come_through(name: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / 'content.pkl'
    path.write_bytes(pickle.dumps(CONTENTS[name], protocol=protocol))
    read = mmengine.load(path)
    if name == 'views':
        assert torch.equal(read, CONTENTS[name])
    else:
        assert repr(read) == repr(CONTENTS[name])


def test_samples_come_through(tmp_path: Path) -> None:
    detected = DetDataSample(metainfo=dict(img_path='a.jpg', ori_shape=(4, 5)))
    detected.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.rand(2, 4)), masks=BitmapMasks(np.ones((2, 4, 5), np.uint8), 4, 5)
    )
    detected.pred_instances = InstanceData(scores=torch.rand(3))
    segmented = SegDataSample()
    segmented.pred_sem_seg = PixelData(data=torch.ones(1, 4, 5, dtype=torch.long))
    mmengine.dump([detected, segmented], tmp_path / 'samples.pkl')
    first, second = mmengine.load(tmp_path / 'samples.pkl')
    assert first.img_path == 'a.jpg'
    assert torch.equal(first.gt_instances.bboxes.tensor, detected.gt_instances.bboxes.tensor)
    assert np.array_equal(first.gt_instances.masks.masks, detected.gt_instances.masks.masks)
    assert torch.equal(first.pred_instances[:2].scores, detected.pred_instances.scores[:2])
    assert torch.equal(second.pred_sem_seg.data, segmented.pred_sem_seg.data)


def programs(canary: str) -> dict[str, object]:
    make = Call(os.mkdir, canary)
    return {
        'at the top': make,
        'in a list': [{'scores': make}],
        'as a key': {(make, 1): 2},
        'exec': [Call(exec, f'import os; os.mkdir({canary!r})')],
        'getattr': [Call(getattr, 'x', 'upper')],
        'a pickle in a pickle': [Call(pickle.loads, pickle.dumps(make))],
        'in the place of a storage': [Call(torch.storage._load_from_bytes, pickle.dumps(make))],
        'in the state of a sample': [Setting({'_data': make})],
        'a module': [Call(torch.nn.Linear, 2, 2)],
        'a loader': [Call(torch.load, canary)],
        'an array of objects': np.array([make, 1], dtype=object),
    }


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('name', list(programs('')))
def test_no_program_runs(name: str, protocol: int, tmp_path: Path) -> None:
    canary, path = tmp_path / 'executed', tmp_path / 'results.pkl'
    path.write_bytes(pickle.dumps(programs(str(canary))[name], protocol=protocol))
    with pytest.raises(Exception, match=r'more than data|[Ww]eights.only|Unsupported') as refused:
        mmengine.load(path)
    if 'storage' not in name:  # which torch refuses
        assert isinstance(refused.value, UnsafePickleError)
        assert 'results.pkl' in str(refused.value)
    assert not canary.exists()


def test_names_with_dots_reach_nothing() -> None:
    data = b'\x80\x04\x8c\x13mmengine.structures\x8c\x15InstanceData.__init__\x93.'
    with pytest.raises(UnsafePickleError, match=r'InstanceData\.__init__'):
        pickles.loads(data)


def test_trust_reads_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / 'made'))))
    monkeypatch.setenv(pickles.TRUST, '1')
    mmengine.load(tmp_path / 'a.pkl')
    assert (tmp_path / 'made').is_dir()


def test_a_tool_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('results.pkl').write_bytes(pickle.dumps([Call(os.mkdir, str(tmp_path / 'executed'))]))
    words = ('run', 'mmdet', 'confusion_matrix', 'mask_rcnn_mila_nano_shapes', 'results.pkl', 'out')
    assert command.main(words) == 2
    assert 'results.pkl: this pickle is not read' in capsys.readouterr().err
    assert not (tmp_path / 'executed').exists()


def spoilt() -> dict[str, object]:
    """Return data with sizes that nothing in the file fills."""
    storage = torch.ones(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)

    def tensor(*layout: object) -> Call:
        return Call(torch._utils._rebuild_tensor_v2, typed, *layout, False, OrderedDict())

    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float32(1).__reduce__()[0]
    return {
        'a tensor larger than its storage': tensor(0, (10**9,), (1,)),
        'a tensor that begins behind it': tensor(4, (1,), (1,)),
        'a tensor that begins before it': tensor(-1, (2,), (1,)),
        'a tensor of negative size': tensor(0, (-2,), (1,)),
        'a tensor of large strides': tensor(0, (2, 2), (2, 3)),
        'a tensor of a size in words': tensor(0, ('4',), (1,)),
        'a tensor with fewer strides': tensor(0, (4, 1), (1,)),
        'a tensor of no storage': Call(torch._utils._rebuild_tensor_v2, 'x', 0, (1,), (1,), False, OrderedDict()),
        'an array from a number': Call(np.ndarray, (10**9,)),
        'an array begun large': Call(reconstruct, np.ndarray, (10**9,), b'b'),
        'a number without bytes': Call(scalar, np.dtype('S100000000')),
        'a number of an object': Call(scalar, np.dtype('O'), 'x'),
        'a mask as large as memory': [{'masks': [{'size': [10**6, 10**6], 'counts': b'11'}]}],
        'a mask of negative size': ({'size': [-4, 5], 'counts': b'P'},),
        'a mask of a size in words': {'a': {'size': ['4', 5], 'counts': b'P'}},
        'a mask of one side': {'size': [4], 'counts': b'P'},
        'a mask of a size that is a number': {'size': 4, 'counts': b'P'},
        'a mask without runs': {'size': [4, 5], 'counts': None},
        'a mask of negative runs': {'size': [4, 5], 'counts': [-3, 23]},
        'a mask in a sample': Setting({'masks': [{'size': [4, 5.5], 'counts': b'P'}]}),
    }


@pytest.mark.parametrize('name', list(spoilt()))
def test_sizes_that_nothing_fills_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / 'results.pkl'
    path.write_bytes(pickle.dumps(spoilt()[name], protocol=4))
    with pytest.raises(UnsafePickleError, match=r'results\.pkl: .* a size in it is wrong'):
        mmengine.load(path)


def test_torch_and_pycocotools_would_take_these_sizes() -> None:
    """Otherwise the test above shows nothing: torch makes up a million numbers from a file of four."""
    large = spoilt()['a tensor larger than its storage']
    storage, _, _, *rest = large.call[1]  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(Call(large.call[0], storage, 0, (10**6,), *rest))).numel() == 10**6  # type: ignore[attr-defined]


def test_masks_of_data_come_through(tmp_path: Path) -> None:
    masks = [
        {'size': [np.int64(4), 5], 'counts': b'P'},
        {'size': (0, 5), 'counts': ''},
        {'size': [4, 5], 'counts': [3, 17], 'area': 17},
    ]
    round_trip: list = [masks]
    round_trip.append(round_trip)  # a circle
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(round_trip))
    assert mmengine.load(tmp_path / 'a.pkl')[0] == masks


def test_other_readers_of_pickles_take_data_only(tmp_path: Path) -> None:
    from mmseg.utils import datafrombytes

    scan = np.arange(6.0).reshape(1, 2, 3)
    assert np.array_equal(datafrombytes(pickle.dumps(scan), backend='pickle'), scan)
    with pytest.raises(UnsafePickleError, match='more than data'):
        datafrombytes(pickle.dumps(Call(os.mkdir, str(tmp_path / 'executed'))), backend='pickle')
    cifar = pytest.importorskip('mmpretrain.datasets.cifar')
    assert cifar.pickle.loads(pickle.dumps({'data': scan}, protocol=2), encoding='latin1')['data'].shape == scan.shape
    with pytest.raises(UnsafePickleError, match='more than data'):
        cifar.pickle.loads(pickle.dumps(Call(os.mkdir, str(tmp_path / 'executed'))))
    assert not (tmp_path / 'executed').exists()


def test_the_classes_of_open_images_are_data(tmp_path: Path) -> None:
    from mmdet.datasets import OpenImagesChallengeDataset

    dataset = object.__new__(OpenImagesChallengeDataset)
    dataset.backend_args = None
    tree, path = np.arange(9.0).reshape(3, 3), tmp_path / 'hierarchy.np'
    for content in (tree, tree.astype(object)):
        with path.open('wb') as file:
            np.save(file, content, allow_pickle=True)
        assert np.array_equal(dataset._get_relation_matrix(str(path)), tree[1:, 1:])
    path.write_bytes(pickle.dumps(tree))
    assert np.array_equal(dataset._get_relation_matrix(str(path)), tree[1:, 1:])
    with path.open('wb') as file:
        np.save(file, np.array([[1, Call(os.mkdir, str(tmp_path / 'executed'))]], dtype=object), allow_pickle=True)
    with pytest.raises(UnsafePickleError, match=r'hierarchy\.np: .* more than data'):
        dataset._get_relation_matrix(str(path))
    assert not (tmp_path / 'executed').exists()


def test_the_file_is_named_also_where_mmengine_came_first(tmp_path: Path) -> None:
    path = tmp_path / 'results.pkl'
    path.write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / 'executed'))))
    program = f'import mmengine, mila_mm\ntry: mmengine.load({str(path)!r})\nexcept Exception as error: print(error)'
    ended = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(f'{path}: this pickle is not read')
    assert not (tmp_path / 'executed').exists()
