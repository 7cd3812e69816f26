"""The ImageNet recipe through tools/train.py and tools/test.py, on a folder of small images, with MESA on."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain', reason="needs mmpretrain: pip install 'mila-mm[classify]'")

import timm
import torch

from mila_mm import MILAClassifier
from mila_mm.engine import MESAHook
from mila_mm.models import MILAImageClassifier, MILATrunk
from mila_mm.models.image_classifier import mesa_loss
from mila_mm.weights import load_backbone, read_checkpoint

CLASSES = ('blue', 'green', 'red')
SMALL = """
_base_ = BASE
model = dict(arch='nano', num_classes=3, data_preprocessor=dict(num_classes=3))
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32), dict(type='PackInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32)), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=6, num_workers=0, persistent_workers=False,
    dataset=dict(_delete_=True, type='CustomDataset', data_root=ROOT, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=6, num_workers=0, persistent_workers=False,
    dataset=dict(_delete_=True, type='CustomDataset', data_root=ROOT, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
param_scheduler = []
optim_wrapper = dict(optimizer=dict(lr=2e-3))
train_cfg = dict(max_epochs=3, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
custom_hooks = [dict(type='mila_mm.MESAHook', ratio=1.5, begin_mesa_epoch=1, momentum=0.2)]
randomness = dict(seed=0)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Six training and three held-out noise images of each of three colours, as torchvision lays folders out."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 3)):
        for channel, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 90, (30 + i, 44, 3), dtype=np.uint8)
                image[..., channel] += 150
                cv2.imwrite(str(root / split / name / f'{i}.png'), image)
    return root


@pytest.fixture(scope='module')
def config(tmp_path_factory, folder, root):
    path = tmp_path_factory.mktemp('config') / 'small.py'
    base = root / 'configs' / 'imagenet' / 'mila_t_in1k.py'
    path.write_text(SMALL.replace('BASE', repr(str(base))).replace('ROOT', repr(str(folder))))
    return path


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
    """A work folder after three epochs, two of them with MESA, and its runner."""
    from mila_mm.engine import train

    work_dir = tmp_path_factory.mktemp('run')
    return work_dir, train(str(config), work_dir=str(work_dir))


def test_trains_with_mesa_from_its_epoch_on(trained):
    work_dir, runner = trained
    history = {key: runner.message_hub.get_scalar(f'train/{key}').data[0] for key in ('loss', 'loss_cls', 'loss_mesa')}
    assert len(history['loss_cls']) == 9 and len(history['loss_mesa']) == 6, 'three steps an epoch, none in the first'
    assert np.all(history['loss_mesa'] > 0)
    assert history['loss'][3:] == pytest.approx(history['loss_cls'][3:] + history['loss_mesa'], rel=1e-5)
    assert 0 <= runner.message_hub.get_scalar('val/accuracy/top1').current() <= 100
    assert (work_dir / 'epoch_3.pth').is_file()


def test_the_checkpoint_holds_the_average_under_released_names(trained):
    work_dir, runner = trained
    checkpoint = read_checkpoint(work_dir / 'epoch_3.pth')
    averaged, last = checkpoint['state_dict'], runner.model.state_dict()
    assert list(averaged) == list(MILAClassifier('nano', num_classes=3).state_dict())
    stored = {k.removeprefix('module.'): v for k, v in checkpoint['ema_state_dict'].items()}
    assert torch.equal(stored['head.weight'], last['head.weight'])
    assert not torch.equal(averaged['head.weight'], last['head.weight'])
    assert not torch.equal(
        averaged['patch_embed.conv1.norm.running_var'], last['patch_embed.conv1.norm.running_var']
    ), 'statistics are averaged as well'


def test_the_checkpoint_serves_timm_and_backbones(trained, monkeypatch):
    from mila_mm.arch import ARCHS

    file = trained[0] / 'epoch_3.pth'
    averaged = read_checkpoint(file)['state_dict']
    monkeypatch.setitem(ARCHS, 'tiny', ARCHS['nano'])
    model = timm.create_model('mila_tiny', num_classes=3)
    model.load_pretrained(file)
    assert torch.equal(model.head.weight, averaged['head.weight'])
    backbone = MILATrunk('nano')
    report = load_backbone(backbone, file)
    assert report.complete and torch.equal(
        backbone.layers[3].blocks[0].in_proj.weight, averaged['layers.3.blocks.0.in_proj.weight']
    )


def test_resumes_with_average_and_mesa(trained, config, tmp_path):
    from mila_mm.engine import train

    work_dir, _ = trained
    resumed = train(str(config), work_dir=str(tmp_path / 'again'), resume=str(work_dir / 'epoch_2.pth'))
    assert resumed.epoch == 3
    again, straight = (read_checkpoint(d / 'epoch_3.pth') for d in (tmp_path / 'again', work_dir))
    for name in ('state_dict', 'ema_state_dict'):
        for key, value in straight[name].items():
            torch.testing.assert_close(again[name][key], value, rtol=1e-4, atol=1e-6, msg=f'{name} {key}')


def test_tools_test_a_checkpoint(command, config, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command('test.py', config, trained[0] / 'epoch_3.pth', '--out', 'scores.pkl')
    assert ended.status == 0, ended.err
    assert re.search(r'accuracy/top1: +\d', ended.out + ended.err)
    assert Path('scores.pkl').is_file()


def test_pictures_of_a_classifier_are_refused(command, refused, config, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(command('test.py', config, trained[0] / 'epoch_3.pth', '--show-dir', 'pictures'), '--show-dir', '--out')


def test_mesa_loss_is_the_divergence_from_the_average():
    torch.manual_seed(0)
    logits, averaged = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.randn(4, 7).double()
    averaged.requires_grad_()
    loss = mesa_loss(logits, averaged)
    q, p = averaged.softmax(1), logits.softmax(1)
    torch.testing.assert_close(loss, (q * (q / p).log()).sum(1).mean())
    loss.backward()
    # the gradient of cross-entropy against the average's probabilities
    torch.testing.assert_close(logits.grad, (p - q).detach() / 4)
    assert averaged.grad is None
    assert mesa_loss(logits, logits).item() == pytest.approx(0, abs=1e-12)
    assert mesa_loss(logits.half(), averaged.half()).dtype == torch.float32


def test_mixed_targets_and_smoothing():
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    model = MILAImageClassifier('nano', num_classes=3, label_smoothing=0.1).eval()
    x = torch.randn(2, 3, 32, 32)
    scores = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0]])
    with torch.no_grad():
        logits = model(x)
        mixed = model(x, [DataSample().set_gt_score(s) for s in scores], mode='loss')['loss_cls']
        labels = model(x, [DataSample().set_gt_label(k) for k in (2, 1)], mode='loss')['loss_cls']
        samples = model(x, mode='predict')
    target = 0.9 * scores + 0.1 / 3
    torch.testing.assert_close(mixed, -(target * logits.log_softmax(1)).sum(1).mean())
    target = 0.9 * torch.eye(3)[[2, 1]] + 0.1 / 3
    torch.testing.assert_close(labels, -(target * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(torch.stack([s.pred_score for s in samples]), logits.softmax(1))
    assert [s.pred_label.item() for s in samples] == logits.argmax(1).tolist()


def test_the_average_is_no_part_of_the_model():
    model, average = (MILAImageClassifier('nano', num_classes=3) for _ in range(2))
    keys, count = list(model.state_dict()), len(list(model.parameters()))
    model.set_average(average.eval(), 2.0)
    assert list(model.state_dict()) == keys and len(list(model.parameters())) == count
    model.train()
    assert not average.training


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: MILAImageClassifier('nano', label_smoothing=1.0), 'label_smoothing'),
        (lambda: MILAImageClassifier('nano', num_classes=0), 'num_classes'),
        (lambda: MILAImageClassifier('nano')(torch.rand(1, 3, 32, 32), mode='logits'), 'logits'),
        (lambda: MESAHook(ratio=-1), 'ratio'),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
