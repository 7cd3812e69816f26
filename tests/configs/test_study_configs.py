"""The configs of the study's rows: each builds what its name says, and the two recipes train."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mila_mm.engine
from mila_mm.datasets.shapes import write_shapes
from mila_mm.study.model import STUDY_ROWS

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = [96, 192, 384, 768]
RECIPES = {'mask_rcnn_{}_1x': 'mask_rcnn_mila_t_1x', 'upernet_{}_160k': 'upernet_mila_t_160k'}


def test_every_row_has_its_configs():
    names = {p.stem for p in (ROOT / 'configs' / 'study').glob('*.py')}
    assert names == {recipe.format(row) for row in STUDY_ROWS for recipe in RECIPES}


@pytest.mark.parametrize('row', STUDY_ROWS)
@pytest.mark.parametrize('recipe', RECIPES)
def test_a_config_is_its_row_in_milas_recipe(recipe, row):
    cfg = Config.fromfile(ROOT / 'configs' / 'study' / f'{recipe.format(row)}.py')
    milas = Config.fromfile(ROOT / 'configs' / f'{RECIPES[recipe]}.py')
    backbone = dict(cfg.model.backbone)
    assert backbone.pop('type') == 'mila_mm.LinearAttentionTransformer' and backbone.pop('arch') == 'tiny'
    assert backbone.pop('drop_path_rate') == milas.model.backbone.drop_path_rate
    assert backbone == dict(STUDY_ROWS[row])
    if 'mask_rcnn' in recipe:
        assert cfg.model.neck.in_channels == WIDTHS
    else:
        assert cfg.model.decode_head.in_channels == WIDTHS and cfg.model.auxiliary_head.in_channels == WIDTHS[2]
        assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    for key in ('train_dataloader', 'param_scheduler', 'train_cfg'):
        assert cfg[key] == milas[key]
    assert cfg.optim_wrapper.optimizer == milas.optim_wrapper.optimizer
    undecayed = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert {k: v.decay_mult for k, v in undecayed.items()} == dict(norm=0.0, log_rate=0.0, shortcut=0.0, table=0.0)


def test_undecayed_names_are_those_of_parameters():
    init_default_scope('mmdet')
    model = MODELS.build(
        dict(
            type='mila_mm.LinearAttentionTransformer',
            arch='nano',
            forget_gate=True,
            shortcut=True,
            positional_encoding='ape',
        )
    )
    for key in ('log_rate', 'shortcut', 'table'):
        names = [n for n, _ in model.named_parameters() if key in n]
        assert len(names) == 5, 'one for each block and nothing else'


def test_a_detector_with_a_forget_gate_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = write_shapes(tmp_path / 'shapes', num_train=4, num_val=2, size=64, seed=0)
    cfg = Config.fromfile(ROOT / 'configs' / 'demo' / 'mask_rcnn_mila_nano_shapes.py')
    study = Config.fromfile(ROOT / 'configs' / 'study' / 'mask_rcnn_forget_gate_1x.py')
    cfg.model.backbone = study.model.backbone
    cfg.model.backbone.arch = 'nano'
    cfg.optim_wrapper = study.optim_wrapper
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=10)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[loader].update(num_workers=0, persistent_workers=False, batch_size=2)
        cfg[loader].dataset.data_root = str(shapes)
    for evaluator in ('val_evaluator', 'test_evaluator'):
        cfg[evaluator].ann_file = str(shapes / 'annotations' / 'instances_val.json')
    cfg.dump(tmp_path / 'config.py')
    runner = mila_mm.engine.train(str(tmp_path / 'config.py'), work_dir=str(tmp_path / 'run'))
    assert 0 < runner.message_hub.log_scalars['train/loss'].current() < 1e4
    groups = runner.optim_wrapper.optimizer.param_groups
    names = {id(p): n for n, p in runner.model.named_parameters()}
    decays = {names[id(p)]: g['weight_decay'] for g in groups for p in g['params']}
    rates = {n: d for n, d in decays.items() if 'log_rate' in n}
    assert len(rates) == 5 and set(rates.values()) == {0.0}
    assert decays['backbone.layers.0.blocks.0.attn.qk.weight'] == 0.05
    start = torch.arange(1, 33, dtype=torch.float).log()[:, None]
    moved = runner.model.backbone.layers[0].blocks[0].attn.forget_gate.log_rate.detach() - start
    assert moved.abs().max() > 0, 'the optimizer has moved the forget gate'
