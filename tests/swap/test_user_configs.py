"""Configs as users write them: overrides, preprocessing of their own, and files that must not be harmed."""

import math
from pathlib import Path

import pytest
from mmengine.config import Config

from mila_mm.errors import UserError
from mila_mm.swap import SwapRefused, check_out, plan_swap, write_child

RETINANET = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@pytest.fixture
def mine(tmp_path):
    """Write a config on top of RetinaNet, or the whole of one, and return its path."""

    def write(text: str = '', name: str = 'mine.py', base: str = RETINANET) -> str:
        path = tmp_path / name
        path.write_text(base + text)
        return str(path)

    return write


def quick(config, **options):
    return plan_swap(config, 'nano', whole_models=False, **options)


def files_in(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob('*') if path.is_file()}


def test_nothing_that_the_config_builds_on_is_overwritten(mine, tmp_path) -> None:
    mine(name='base.py')
    mine(name='middle.py', base="_base_ = ['./base.py']\n")
    (tmp_path / 'alias.py').symlink_to('base.py')
    child = mine('model = dict(bbox_head=dict(num_classes=3))\n', base="_base_ = './middle.py'\n")
    before = files_in(tmp_path)
    result = quick(child)
    for name, words in (
        ('base.py', 'is a base of'),
        ('middle.py', 'is a base of'),
        ('alias.py', 'is a base of'),
        ('mine.py', 'config itself'),
    ):
        for write in (lambda out: check_out(out, child), lambda out: write_child(result, out)):
            with pytest.raises(UserError, match=words):
                write(tmp_path / name)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(('out', 'words'), [('x.json', 'ends in .py'), ('folder.py', 'is a folder')])
def test_where_no_config_can_be_written(out, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder.py').mkdir()
    with pytest.raises(UserError, match=words):
        check_out(out)


def test_a_child_that_reads_back_differently_leaves_nothing_behind(mine, tmp_path) -> None:
    config = mine()
    result = quick(config)
    out = tmp_path / 'out.py'
    write_child(result, out)
    out.chmod(0o640)
    write_child(result, out)
    assert out.stat().st_mode & 0o777 == 0o640
    mine('work_dir = "elsewhere"\n')  # the original changes under the swap
    before = files_in(tmp_path)
    for target in (out, tmp_path / 'new' / 'deep' / 'out.py'):
        with pytest.raises(UserError, match='other values of work_dir'):
            write_child(result, target)
    assert files_in(tmp_path) == before and not (tmp_path / 'new').exists()


def test_overrides_and_entries_of_the_base(mine, tmp_path) -> None:
    mine('batch = 3\nclasses = ("a", "b")\n', name='base.py')
    config = mine(
        """
_base_.optim_wrapper.optimizer.lr = 0.02
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18, norm_eval=True),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, num_classes={{_base_.batch}}))
train_dataloader = dict(batch_size={{_base_.batch}}, dataset=dict(metainfo=dict(classes={{_base_.classes}})))
""",
        base="_base_ = './base.py'\n",
    )
    result = quick(config, recipe='mila')
    assert result.config.model.neck.in_channels == [64, 128, 256] and result.config.model.neck.out_channels == 32
    write_child(result, tmp_path / 'children' / 'out.py')
    read = Config.fromfile(tmp_path / 'children' / 'out.py')
    assert read.to_dict() == result.config.to_dict()
    assert read.train_dataloader.batch_size == read.model.bbox_head.num_classes == 3
    assert read.train_dataloader.dataset.metainfo.classes == ('a', 'b')


def test_values_and_names_that_python_writes_in_its_own_way(mine, tmp_path) -> None:
    """Infinite and undefined numbers, and keys that are words of the language, inside of what is rewritten."""
    config = mine("""
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-5, T_max=12, end=float('inf'), low=-float('inf'),
                        gap=float('nan'))]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'lambda': dict(lr_mult=0.1), 'layer3': dict(lr_mult=0.2)}))
""")
    out = tmp_path / 'out.py'
    write_child(quick(config, recipe='mila'), out)
    step = Config.fromfile(out).param_scheduler[1]
    assert (step.end, step.low) == (math.inf, -math.inf) and math.isnan(step.gap)
    assert Config.fromfile(out).optim_wrapper.paramwise_cfg.custom_keys['lambda'].lr_mult == 0.1


def test_a_data_preprocessor_beside_the_model_is_set_too(mine) -> None:
    """mmengine's runner hands it to a model that names none."""
    retinanet = Config.fromfile(mine()).to_dict()['model']
    normalisation = retinanet.pop('data_preprocessor') | dict(
        mean=[103.53, 116.28, 123.675], std=[1.0] * 3, bgr_to_rgb=False
    )
    runtime = "_base_ = 'mmdet::_base_/default_runtime.py'\n"
    found = quick(mine(f'data_preprocessor = {normalisation!r}\nmodel = {retinanet!r}\n', base=runtime)).config
    assert 'data_preprocessor' not in found.model
    assert found.data_preprocessor == normalisation | dict(mean=MEAN, std=STD, bgr_to_rgb=True)
    # the model's own comes before it
    retinanet['data_preprocessor'] = normalisation
    found = quick(mine(f'data_preprocessor = {normalisation!r}\nmodel = {retinanet!r}\n', base=runtime)).config
    assert found.data_preprocessor == normalisation and found.model.data_preprocessor.mean == MEAN


@pytest.mark.parametrize('wrapped', [False, True])
def test_images_that_the_pipeline_normalises_are_left_to_it(mine, wrapped) -> None:
    pipeline = """
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
            dict(type='mmdet.Normalize', mean=[0.0, 1.0, 2.0], std=[3.0, 4.0, 5.0], to_rgb=True),
            dict(type='PackDetInputs')]
model = dict(data_preprocessor=dict(_delete_=True, type='DetDataPreprocessor', pad_size_divisor=32))
"""
    dataset = (
        "dict(_delete_=True, type='RepeatDataset', times=2, dataset=dict(type='CocoDataset', pipeline=pipeline))"
        if wrapped
        else 'dict(pipeline=pipeline)'
    )
    result = quick(mine(f'{pipeline}train_dataloader = dict(dataset={dataset})\n'))
    assert result.config.model.data_preprocessor == dict(type='DetDataPreprocessor', pad_size_divisor=32)
    assert any('normalised in the pipeline' in u and '[0.0, 1.0, 2.0]' in u for u in result.unknowns)


def test_images_loaded_as_rgb_reach_mila_as_rgb(mine) -> None:
    result = quick(mine('model = dict(data_preprocessor=dict(bgr_to_rgb=False, rgb_to_bgr=True))\n'))
    found = result.config.model.data_preprocessor
    assert (found.bgr_to_rgb, found.rgb_to_bgr) == (False, False)


def test_training_does_not_go_on_from_the_old_model(mine) -> None:
    result = quick(mine("resume = True\nwork_dir = 'old_run'\n"))
    assert result.config.resume is False and result.config.work_dir == 'old_run'
    assert any('old_run' in unknown and '--work-dir' in unknown for unknown in result.unknowns)
    untouched = quick(mine())
    assert not untouched.config.resume and not any('work_dir' in unknown for unknown in untouched.unknowns)


def test_a_config_that_is_no_python_is_refused(mine) -> None:
    with pytest.raises(UserError, match='cannot be read: SyntaxError') as caught:
        quick(mine('model = dict(\n'))
    assert len(str(caught.value).splitlines()) <= 2


def test_modules_that_fail_to_import_for_any_reason(mine, tmp_path, monkeypatch) -> None:
    (tmp_path / 'half_written_module.py').write_text('def f(:\n')
    (tmp_path / 'raising_module.py').write_text('raise RuntimeError("no GPU")\n')
    monkeypatch.syspath_prepend(tmp_path)
    imports = "custom_imports = dict(imports=['half_written_module', 'raising_module'], allow_failed_imports=False)\n"
    result = quick(mine(imports))
    # the old backbone is known, so they are for something else, which may be registered where the config will run
    assert result.config.custom_imports.imports == ['half_written_module', 'raising_module']
    told = ' '.join(result.unknowns)
    assert 'SyntaxError' in told and 'RuntimeError: no GPU' in told and 'it stays' in told
    with pytest.raises(SwapRefused, match='RuntimeError: no GPU') as caught:
        quick(mine(imports + "model = dict(neck=dict(type='NeckOfRaisingModule'))\n"))
    assert len(str(caught.value).splitlines()) <= 2


def test_weights_are_named_so_that_training_finds_them_from_anywhere(mine, tmp_path, monkeypatch) -> None:
    (tmp_path / 'w.pth').touch()
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = mine()
    for name in ('~/w.pth', 'w.pth'):
        assert quick(config, weights=name).config.model.backbone.init_cfg.checkpoint == str(tmp_path / 'w.pth')
    address = 'https://example.org/w.pth'
    assert quick(config, weights=address).config.model.backbone.init_cfg.checkpoint == address


def test_guessed_widths_are_told() -> None:
    result = quick('mmdet::ssd/ssd300_coco')
    assert any(
        'model.neck.out_channels' in unknown and 'equal to an old width' in unknown for unknown in result.unknowns
    )


def test_exact_strides_are_kept_though_none_is_a_32nd(mine) -> None:
    config = mine(
        """
default_scope = 'mmseg'
norm_cfg = dict(type='BN')
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='ResNet', depth=18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1),
                  out_indices=(0, 1, 2)),
    decode_head=dict(in_channels=256, in_index=2, norm_cfg=norm_cfg),
    auxiliary_head=[dict(type='FCNHead', in_channels=64 << i, in_index=i, channels=16, num_classes=19)
                    for i in range(2)])
""",
        base="_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'\n",
    )
    result = quick(config)
    assert result.new_maps.strides == (4, 8, 16) and result.config.model.decode_head.in_channels == 128
    assert any('no deeper than 1/16' in unknown for unknown in result.unknowns)
