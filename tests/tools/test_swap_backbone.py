"""tools/swap_backbone.py: what it writes and prints, its errors, and that the examples are its own output."""

import shlex

import pytest
import torch
from mmengine.config import Config

TOOL = 'swap_backbone.py'
RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco'


def examples(root):
    return sorted((root / 'configs' / 'swapped').glob('*.py'))


def test_writes_a_short_config_and_says_what_changed(command, tmp_path) -> None:
    out = tmp_path / 'mine.py'
    ended = command(TOOL, RETINANET, '--weights', 'mila://tiny-in1k', '--out', out)
    assert ended.status == 0, ended.err
    cfg = Config.fromfile(out)
    assert cfg.model.backbone.arch == 'tiny' and cfg.model.neck.in_channels == [128, 256, 512]
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='mila://tiny-in1k')
    for words in ('model.neck.in_channels', '[256, 512, 1024, 2048]', '[128, 256, 512]', 'not known', 'lr=0.01'):
        assert words in ended.out
    assert str(out) in ended.out
    text = out.read_text()
    assert len(text.splitlines()) < 30 and '# widths of the new maps' in text


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['nowhere.py', '--out', 'x.py'], 'does not exist'),
        ([RETINANET, '--out', 'x.py', '--arch', 'huge'], 'tiny'),
        ([RETINANET], '--out'),
        ([RETINANET, '--out', 'x.py', '--recipe', 'sgd'], 'sgd'),
        ([RETINANET, '--out', 'x.py', '--weights', 'mila://base-in1k'], "'base'"),
        ([RETINANET, '--out', 'x.py', '--weights', 'nowhere.pth'], 'does not exist'),
        # the name of the file comes before what takes long
        (['mmseg::_base_/models/stdc.py', '--out', 'x.json'], '.py'),
        (['mmseg::_base_/models/stdc.py', '--out', '..'], 'ends in .py'),
        ([RETINANET, '--out', 'x.py', '--drop-path-rate', '1.5'], '[0, 1)'),
        (['mmdet::_base_/default_runtime.py', '--out', 'x.py'], 'fragment'),
        (['mmseg::_base_/models/stdc.py', '--out', 'x.py'], 'fused'),
    ],
    ids=[
        'no config',
        'arch',
        'no out',
        'recipe',
        'weights of another',
        'no weights',
        'suffix',
        'folder',
        'rate',
        'fragment',
        'refused',
    ],
)
def test_mistakes_end_in_one_message(command, workspace, arguments, words) -> None:
    ended = command(TOOL, *arguments)
    assert ended.status == 2 and words in ended.err
    assert ended.err.startswith('error: ') and len(ended.err.splitlines()) <= 2
    assert not (workspace / 'x.py').exists()


# On top of the detector for the shapes set, as somebody has it who does not know of MILA yet.
DETECTOR = """
_base_ = './detector.py'
model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(_delete_=True, type='ResNet', depth=18, frozen_stages=1, norm_eval=True),
    neck=dict(in_channels=[64, 128, 256, 512]))
train_dataloader = dict(batch_size={{_base_.val_dataloader.batch_size}})
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'roi_head': dict(lr_mult=2.0), 'layer4': dict(lr_mult=0.5)}))
resume = True
"""


def test_what_the_tool_writes_for_a_config_of_a_user_trains(command, detector) -> None:
    """From the config of a ResNet to a trained epoch, by the commands alone."""
    mine, out = detector.with_name('mine.py'), detector.with_name('new') / 'mine_mila.py'
    mine.write_text(DETECTOR)
    before = {path: path.read_text() for path in (mine, detector)}
    ended = command(TOOL, mine, '--arch', 'nano', '--recipe', 'mila', '--out', detector)
    assert ended.status == 2 and 'is a base of' in ended.err and len(ended.err.splitlines()) <= 2
    ended = command(TOOL, mine, '--arch', 'nano', '--recipe', 'mila', '--out', out)
    assert ended.status == 0, ended.err
    assert {path: path.read_text() for path in before} == before and [out] == list(out.parent.iterdir())
    assert 'training loss computed' in ended.out and "'layer4'" in ended.out
    run = detector.with_name('run')
    ended = command('train.py', out, '--work-dir', run, '--cfg-options', 'train_cfg.val_interval=9')
    assert ended.status == 0, ended.err
    weights = torch.load(run / 'epoch_1.pth', weights_only=False)
    names = [name for name in weights['state_dict'] if name.startswith('backbone.')]
    assert any('attn' in name for name in names) and not any('layer4' in name for name in names)
    groups = weights['optimizer']['param_groups']
    assert {group['initial_lr'] for group in groups} == {1e-4, 2e-4}


def test_there_is_an_example_of_each_kind(root) -> None:
    names = ' '.join(path.stem for path in examples(root))
    for kind in ('retinanet', 'cascade', 'atss', 'dino', 'mask2former', 'rtmdet', 'segformer', 'deeplabv3plus'):
        assert kind in names
    assert names.count('mask2former') == 2


def test_examples_are_the_output_of_the_tool(command, root, tmp_path, monkeypatch) -> None:
    """README.md of the folder lists the commands; each gives its file again, byte by byte."""
    lines = (root / 'configs' / 'swapped' / 'README.md').read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith('python tools/swap_backbone.py')]
    assert sorted(argv[argv.index('--out') + 1] for argv in commands) == [
        path.relative_to(root).as_posix() for path in examples(root)
    ]
    monkeypatch.chdir(tmp_path)
    for argv in commands:
        written = argv[argv.index('--out') + 1]
        ended = command(TOOL, *argv[2:])
        assert ended.status == 0, ended.err
        assert (tmp_path / written).read_text() == (root / written).read_text(), written
