"""Predictions in a pickle: data come through, a program does not."""

import os
import pickle
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
