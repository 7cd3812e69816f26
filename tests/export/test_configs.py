"""Every config of the package has an exported form, or is refused by the name of what has none."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mila_mm.engine import load_config, scope_of
from mila_mm.errors import UserError
from mila_mm.export.api import _without_pretrained
from mila_mm.export.checks import stating
from mila_mm.export.deployed import Deployed
from mila_mm.export.metadata import class_names

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
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': 'the detector PanopticFPN has no exported form',
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py': 'the RoI head has the shared_head ResLayer',
    'mmdet::htc/htc-without-semantic_r50_fpn_1x_coco.py': 'the RoI head HybridTaskCascadeRoIHead has no exported form',
    'mmdet::yolact/yolact_r50_1xb8-55e_coco.py': 'the detector YOLACT has no exported form',
    'mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py': 'CornerHead predicts in a way of its own',
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py': 'GFLHead predicts in a way of its own',
    'mmseg::danet/danet_r50-d8_4xb4-80k_ade20k-512x512.py': 'the head DAHead has no exported form',
    'mmseg::encnet/encnet_r50-d8_4xb4-80k_ade20k-512x512.py': 'the head EncHead has no exported form',
    'mmseg::ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512.py': 'the segmentor CascadeEncoderDecoder has no exported',
    'mmseg::maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py': 'the head MaskFormerHead has no exported form',
}


def built(name, options=()):
    """Build a config's model without memory: shapes are enough."""
    cfg = load_config(name, options)
    init_default_scope(scope_of(cfg))
    _without_pretrained(cfg.model)
    with torch.device('meta'):
        return MODELS.build(cfg.model).eval()


QUICK_OTHERS = ('rtmdet', 'yolox', 'panoptic_fpn', 'faster_rcnn', 'gfl', 'encnet')


@pytest.mark.parametrize(
    'name', [x if any(y in x for y in QUICK_OTHERS) else pytest.param(x, marks=pytest.mark.slow) for x in OTHERS]
)
def test_heads_of_other_libraries_without_an_exported_form_are_refused_by_name(name):
    with pytest.raises(UserError, match=f'^export: .*{OTHERS[name]}'):
        Deployed(built(name))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['model.test_cfg.rcnn.mask_thr_binary=-1'], 'roi_head gives masks in grey'),
        (['model.test_cfg.rpn.nms.max_num=5'], 'rpn_head suppresses boxes with'),
        (['model.test_cfg.rcnn=None'], 'MaskRCNN has no exported form: AttributeError'),
    ],
)
def test_settings_that_nothing_states_are_refused(options, words):
    model = built(str(CONFIGS / 'mask_rcnn_mila_t_1x.py'), options)
    with pytest.raises(UserError, match=f'^export: {words}'), stating(model):
        Deployed(model)


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
    classes = class_names(cfg, {}, count)
    assert classes is not None and classes[0].startswith(first)


SAVED, TOP, GIVEN = (dict(classes=(letter * 1, letter * 2)) for letter in 'abc')


@pytest.mark.parametrize(
    ('saved', 'top', 'given', 'count', 'expected'),
    [
        (SAVED, TOP, GIVEN, 2, ['a', 'aa']),
        ({}, TOP, GIVEN, 2, ['b', 'bb']),
        ({}, None, GIVEN, 2, ['c', 'cc']),
        ({}, None, None, 2, None),
        (dict(classes=('a',)), None, GIVEN, 2, ['c', 'cc']),
        (SAVED, TOP, GIVEN, 3, None),
        (dict(classes='ab'), None, None, 1, ['ab']),
        ({}, None, None, 80, 80),
    ],
)
def test_names_are_the_checkpoints_else_the_configs_and_as_many_as_the_head_has(saved, top, given, count, expected):
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(type='RetinaNet'),
            **({} if top is None else dict(metainfo=top)),
            test_dataloader=dict(dataset=dict(type='CocoDataset', **({} if given is None else dict(metainfo=given)))),
        )
    )
    names = class_names(cfg, saved, count)
    assert (len(names), names[0]) == (80, 'person') if expected == 80 else names == expected
