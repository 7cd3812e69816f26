"""The study's commands: a replication in miniature, and every figure from configs, checkpoints and images."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

FIGURES, REPLICATE = 'analysis_tools/study_figures.py', 'analysis_tools/replicate_study.py'

MINIATURE = """
_base_ = BASE
shapes = dict(num_train=4, num_val=2, size=32, seed=0)
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dim=16, depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1), img_size=32),
    decode_head=dict(in_channels=[16, 32], in_index=[0, 1], channels=8))
train_dataloader = dict(batch_size=2)
default_hooks = dict(logger=dict(interval=1))
"""


@pytest.fixture(scope='module')
def replicated(tmp_path_factory, root):
    """A work folder with two rows of the study, trained for two steps; also its config."""
    from mila_mm.study.model import STUDY_ROWS
    from mila_mm.study.replication import Plan, run_row

    folder = tmp_path_factory.mktemp('study')
    config = folder / 'miniature.py'
    config.write_text(MINIATURE.replace('BASE', repr(str(root / 'configs' / 'demo' / 'study_nano_shapes.py'))))
    plan = Plan(str(config), folder / 'runs', folder / 'data', 2)
    gated = dict(input_gate=True, forget_gate=True)
    return plan, [
        run_row(plan, row, switches, 0)
        for row, switches in (('baseline', STUDY_ROWS['baseline']), ('forget_gate', gated))
    ]


@pytest.fixture
def models(replicated):
    """Model arguments of the two rows."""
    plan, _ = replicated
    return [
        f'{row}={plan.work_dir}/{row}_seed0/config.py@{plan.work_dir}/{row}_seed0/iter_2.pth'
        for row in ('baseline', 'forget_gate')
    ]


@pytest.fixture
def pictures(replicated):
    return replicated[0].data_root / 'images' / 'validation'


def test_a_run_says_what_it_was(replicated):
    plan, (baseline, gated) = replicated
    assert baseline['iterations'] == 2 and baseline['batch_size'] == 2 and baseline['data']['size'] == 32
    assert 0 <= baseline['metrics']['mIoU'] <= 100 and baseline['final_loss'] > 0 and baseline['machine']['torch']
    assert gated['params'] > baseline['params']
    assert (plan.work_dir / 'forget_gate_seed0' / 'iter_2.pth').is_file()


def test_what_is_done_is_not_repeated_and_goes_into_the_table(command, replicated, tmp_path):
    plan, _ = replicated
    before = (plan.work_dir / 'baseline_seed0' / 'result.json').stat().st_mtime_ns
    arguments = [
        '--config',
        plan.config,
        '--work-dir',
        plan.work_dir,
        '--data-root',
        plan.data_root,
        '--iters',
        2,
        '--json',
        tmp_path / 'all.json',
        '--markdown',
        tmp_path / 'docs' / 'table.md',
    ]
    ended = command(REPLICATE, *arguments, '--rows', 'baseline', 'lepe', '--part', '1/2')
    assert ended.status == 0, ended.err
    assert (plan.work_dir / 'baseline_seed0' / 'result.json').stat().st_mtime_ns == before
    assert not (plan.work_dir / 'lepe_seed0').exists(), 'that is the share of the second process'
    assert [r['row'] for r in json.loads((tmp_path / 'all.json').read_text())] == ['baseline', 'forget_gate']
    assert '| baseline |' in (tmp_path / 'docs' / 'table.md').read_text() and 'not trained yet: input_gate' in ended.out
    ended = command(REPLICATE, *arguments, '--report-only', '--seeds', 0, 1)
    assert ended.status == 0 and not list(plan.work_dir.glob('*_seed1')), ended.err


def test_another_budget_is_another_run(replicated):
    from mila_mm.study.replication import Plan, run_row

    plan, (baseline, _) = replicated
    longer = Plan(plan.config, plan.work_dir.parent / 'longer', plan.data_root, 3)
    (longer.work_dir / 'baseline_seed0').mkdir(parents=True)
    (longer.work_dir / 'baseline_seed0' / 'result.json').write_text(json.dumps(baseline))
    result = run_row(longer, 'baseline', {}, 0)
    assert result['iterations'] == 3 and result['digest'] != baseline['digest']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--rows', 'basline'], ['basline', 'baseline']),
        (['--part', '3/2'], ['--part', '3/2']),
        (['--iters', '1'], ['--iters', '2']),
        (['--config', 'configs/mask_rcnn_mila_t_1x.py'], ['LinearAttention']),
    ],
)
def test_replication_refuses(command, refused, root, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(root)
    refused(command(REPLICATE, '--work-dir', tmp_path / 'w', *arguments), *words)
    assert not (tmp_path / 'w').exists()


def is_figure(path: Path) -> bool:
    picture = cv2.imread(str(path))
    return picture is not None and picture.std() > 5


def test_every_figure_is_drawn(command, models, pictures, tmp_path):
    plain, gated = models
    common = ['--images', pictures, '--size', 32, 48]
    for name, arguments in {
        'decay': [],
        'input-gate': [gated, *common, '--layers', '1.1', '2.1'],
        'forget-gate': [gated, *common],
        'token-lengths': [plain, gated, *common],
        'erf': [plain, gated, 'timm:resnet18', *common, '--limit', 1, '--stage', 1, '--scale', 'gamma'],
    }.items():
        out = tmp_path / 'new' / f'{name}.png'
        ended = command(FIGURES, name, *arguments, '--out', out)
        assert ended.status == 0, (name, ended.err)
        assert is_figure(out) and str(out) in ended.out
        if name == 'token-lengths':
            assert {'baseline', 'forget_gate'} <= {line.split()[0] for line in ended.out.splitlines() if line}


def test_weights_are_used(models):
    import torch

    from mila_mm.study.figures.feature_model import open_feature_model
    from mila_mm.weights import read_checkpoint

    model = open_feature_model(models[0])
    config, _, checkpoint = models[0].partition('=')[2].partition('@')
    stored = read_checkpoint(checkpoint)['state_dict']
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, stored[f'backbone.{name}']), name
    assert model.label == 'baseline' and open_feature_model(config).label == 'config'


def test_images_reach_the_backbone_as_the_model_expects_them():
    from mila_mm.study.figures.feature_model import open_feature_model

    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    expected = (255 - 123.675) / 58.395
    for spec in ('timm:resnet18', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'):
        assert open_feature_model(spec).normalise(red)[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-3)
    caffe = open_feature_model('mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py').normalise(red)
    assert caffe[0, :, 0, 0].tolist() == pytest.approx([-103.53, -116.28, 255 - 123.675], rel=1e-3), 'BGR, std 1'


def test_images_are_scaled_and_cut_to_one_size(tmp_path):
    from mila_mm.study.figures.feature_model import read_images

    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40, 2] = 255  # red in the middle
    cv2.imwrite(str(tmp_path / 'b.png'), wide)
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((64, 40, 3), np.uint8))
    images = read_images([tmp_path], (40, 40))
    assert images.shape == (2, 40, 40, 3)
    assert images[0].max() == 0 and (images[1][..., 0] > 250).mean() > 0.9 and images[1][..., 2].max() < 10
    assert len(read_images([tmp_path], (40, 40), limit=1)) == 1


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['erf', 'timm:mila_tny', '--images', 'x.png', '--size', '32'], ['mila_tny', 'mila_tiny']),
        (['erf', 'timm:resnet18', '--images', 'no/such.png', '--size', '32'], ['no/such.png']),
        (['erf', 'timm:resnet18', '--images', '.', '--size', '32'], ['no image']),
        (['erf', 'nothing.py', '--images', 'x.png', '--size', '32'], ['nothing.py']),
        (['forget-gate', 'timm:mila_tiny', '--images', 'x.png', '--size', '32'], ['forget_gate=True']),
        (['input-gate', 'timm:resnet18', '--images', 'x.png', '--size', '32'], ['LinearAttentionTransformer']),
        (['token-lengths', 'timm:mila_tiny@gone.pth', '--images', 'x.png', '--size', '32'], ['gone.pth']),
        (['decay', '--gates', '1.5'], ['(0, 1)']),
        (['erf', 'timm:resnet18', '--images', 'x.png', '--size', '1', '2', '3'], ['--size']),
    ],
)
def test_figures_refuse(command, refused, workspace, arguments, words):
    cv2.imwrite('x.png', np.zeros((40, 40, 3), np.uint8)) if 'x.png' in arguments else None
    refused(command(FIGURES, *arguments, '--out', 'out.png'), *words)
    assert not Path('out.png').exists()


def test_gates_of_a_block_that_is_not_there(command, refused, models, pictures, tmp_path):
    refused(
        command(
            FIGURES,
            'input-gate',
            models[1],
            '--images',
            pictures,
            '--size',
            32,
            '--layers',
            '3.1',
            '--out',
            tmp_path / 'x.png',
        ),
        '3.1',
        '1.1, 2.1',
    )
