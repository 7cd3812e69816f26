"""Configs of the package by name, in mmengine's own functions."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.infer.infer import BaseInferencer

from mila_mm import zoo
from mila_mm.errors import UserError


class Named(BaseInferencer):
    """An inferencer that only looks names up."""

    def __init__(self) -> None:
        self.scope = 'mmdet'

    def _init_pipeline(self, cfg: object) -> None: ...

    def visualize(self, *args: object) -> None: ...

    def postprocess(self, *args: object) -> None: ...


@pytest.mark.parametrize('name', ['mila_mm::mask_rcnn_mila_t_3x', 'mila_mm::demo/mask_rcnn_mila_nano_shapes.py'])
def test_get_config(name: str, root: Path) -> None:
    cfg = get_config(name)
    assert cfg.model.type == 'MaskRCNN'
    assert Path(cfg.filename) == root / 'configs' / (name.partition('::')[2].removesuffix('.py') + '.py')


def test_get_config_names_the_published_weights() -> None:
    from mila_mm.weights import PUBLISHED

    assert get_config('mila_mm::mask_rcnn_mila_t_3x', pretrained=True).model_path == PUBLISHED['mask-rcnn-tiny-3x'].url
    with pytest.raises(UserError, match='no weights are published'):
        get_config('mila_mm::mask_rcnn_mila_b_3x', pretrained=True)


def test_base_keeps_the_scopes_of_its_types(tmp_path: Path) -> None:
    (tmp_path / 'child.py').write_text(
        "_base_ = 'mila_mm::mask_rcnn_mila_t_1x.py'\nmodel = dict(backbone=dict(arch='nano'))\n"
        'again = {{_base_.model.backbone}}\n'
    )
    cfg = Config.fromfile(tmp_path / 'child.py')
    assert cfg.model.backbone.arch == 'nano'
    assert '_scope_' not in cfg.again
    assert cfg.train_cfg.max_epochs == get_config('mila_mm::mask_rcnn_mila_t_1x').train_cfg.max_epochs


def test_a_base_of_another_package_costs_no_metafile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine looks for each through all metafiles of the package, and finds the same file."""
    (tmp_path / 'child.py').write_text(
        "_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'\nagain = {{_base_.model}}\n"
    )
    whole = Config._get_cfg_path.__wrapped__('mmdet::_base_/models/retinanet_r50_fpn.py', '')
    monkeypatch.setattr('mmengine.config.config._get_external_cfg_path', None)
    cfg = Config.fromfile(tmp_path / 'child.py')
    assert cfg.model.type == 'RetinaNet' and cfg.again._scope_ == 'mmdet'
    path, scope = Config._get_cfg_path('mmdet::_base_/models/retinanet_r50_fpn.py', '')
    assert (Path(path).resolve(), scope) == (Path(whole[0]).resolve(), whole[1])


def test_misspelt_name_lists_the_nearest() -> None:
    with pytest.raises(UserError, match=r'did you mean mask_rcnn_mila_t_3x'):
        get_config('mila_mm::mask_rcn_mila_t_3x')


@pytest.mark.parametrize('model', ['mask_rcnn_mila_t_3x', 'mila_mm::mask_rcnn_mila_t_3x', 'Mask_RCNN_MILA_T_3x'])
def test_inferencers_find_models_by_name(model: str) -> None:
    inferencer = Named()
    cfg, weights = inferencer._load_model_from_metafile(model)
    assert cfg.model.backbone.arch == 'tiny'
    assert weights.startswith('https://')
    assert inferencer._load_model_from_metafile('mila_mm::mask_rcnn_mila_b_3x')[1] is None


def test_other_names_are_left_to_mmengine() -> None:
    inferencer = Named()
    assert inferencer._load_model_from_metafile('retinanet_r50_fpn_1x_coco')[0].model.type == 'RetinaNet'
    with pytest.raises(ValueError, match='Cannot find model'):
        inferencer._load_model_from_metafile('no-such-model')


def test_names_and_paths() -> None:
    assert 'mask_rcnn_mila_t_3x' in zoo.config_names()
    assert not [name for name in zoo.config_names() if '_base_' in name]
    assert zoo.find_config('mask_rcnn_mila_nano_shapes') == zoo.find_config('demo/mask_rcnn_mila_nano_shapes')
    assert zoo.find_config('../setup') is None
    assert zoo.find_config('/etc/passwd') is None


def test_a_published_address_has_one_place_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmengine.runner import load_checkpoint

    from mila_mm.weights import PUBLISHED, loaders

    asked = []

    def local_path(name: str, **_: object) -> Path:
        asked.append(name)
        raise UserError('stop')

    monkeypatch.setattr(loaders, 'local_path', local_path)
    for address in (PUBLISHED['mask-rcnn-tiny-3x'].url, 'https://elsewhere.org/a.pth'):
        with pytest.raises(UserError, match='stop'):
            load_checkpoint(None, address)
    assert asked == ['mila://mask-rcnn-tiny-3x', 'https://elsewhere.org/a.pth']
