"""Every config of the package has an exported form, or is refused by the name of what has none."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mila_mm.engine import load_config, scope_of
from mila_mm.errors import UserError
from mila_mm.export.api import _class_names, _classes_of, _without_pretrained
from mila_mm.export.deployed import Deployed

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
ALL = sorted(str(x.relative_to(CONFIGS)) for x in CONFIGS.rglob('*.py') if '_base_' not in x.parts)
REFUSED = {
    'swapped/mask2former_mila_t_160k_ade20k.py': 'Mask2FormerHead',
    'swapped/mask2former_mila_t_50e_panoptic.py': 'Mask2Former',
    'scale/upernet_mila_t_cityscapes_tiled.py': 'TiledSegmentor',
}
# Of each folder and task one, and all that other libraries' heads are in
QUICK = {
    *(x for x in ALL if x.startswith('swapped/')),
    *REFUSED,
    'mask_rcnn_mila_t_1x.py',
    'upernet_mila_t_160k.py',
    'imagenet/mila_t_in1k.py',
    'study/mask_rcnn_forget_gate_1x.py',
    'study/upernet_ape_160k.py',
}


OTHERS = {
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py': 'RTMDetInsSepBNHead predicts in a way of its own',
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': 'YOLOXHead predicts in a way of its own',
    'mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py': 'the RoI head PointRendRoIHead has no exported form',
    'mmdet::detr/detr_r50_8xb2-150e_coco.py': 'the detector DETR has no exported form',
    'mmseg::maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py': 'the head MaskFormerHead has no exported form',
}


def built(name):
    """Build a config's model without memory: shapes are enough."""
    cfg = load_config(name)
    init_default_scope(scope_of(cfg))
    _without_pretrained(cfg.model)
    with torch.device('meta'):
        return MODELS.build(cfg.model).eval()


@pytest.mark.parametrize('name', OTHERS)
def test_heads_of_other_libraries_without_an_exported_form_are_refused_by_name(name):
    with pytest.raises(UserError, match=f'^export: .*{OTHERS[name]}'):
        Deployed(built(name))


@pytest.mark.parametrize('name', [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in ALL])
def test_a_config_has_an_exported_form_or_is_refused_by_name(name):
    if name.startswith('imagenet/'):
        pytest.importorskip('mmpretrain', reason="needs mmpretrain: pip install 'mila-mm[classify]'")
    model = built(str(CONFIGS / name))
    if name in REFUSED:
        with pytest.raises(UserError, match=f'^export: .*{REFUSED[name]} has no exported form'):
            Deployed(model)
    else:
        assert Deployed(model).output_names


@pytest.mark.parametrize(
    ('name', 'count', 'first'),
    [
        ('mask_rcnn_mila_t_1x.py', 80, 'person'),
        ('upernet_mila_t_160k.py', 150, 'wall'),
        ('imagenet/mila_t_in1k.py', 1000, 'tench'),
    ],
)
def test_a_file_knows_the_names_of_the_classes(name, count, first):
    if name.startswith('imagenet/'):
        pytest.importorskip('mmpretrain', reason="needs mmpretrain: pip install 'mila-mm[classify]'")
    cfg = load_config(str(CONFIGS / name))
    init_default_scope(scope_of(cfg))
    classes = _classes_of(cfg.test_dataloader.dataset)
    assert len(classes) == count and classes[0].startswith(first)


@pytest.mark.parametrize(('count', 'expected'), [(2, ['a', 'b']), (3, None), (None, ['a', 'b'])])
def test_names_of_another_number_than_the_heads_have_are_left_out(count, expected):
    cfg = Config(dict(test_dataloader=dict(dataset=dict(metainfo=dict(classes=('a', 'b'))))))
    model = nn.ModuleDict(dict(head=nn.Identity()))
    if count is not None:
        model['head'].num_classes = count
    assert _class_names(cfg, model) == expected
