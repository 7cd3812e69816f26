"""The shipped configs on real images in COCO's and ADE20K's layouts, with only schedule and size shortened."""

from pathlib import Path

import cv2
import pytest

TRAIN, TEST = 'train.py', 'test.py'

# 20 proposals instead of 1000 for a box head of full width
FEW_PROPOSALS = ['model.test_cfg.rpn.max_per_img=20', 'model.train_cfg.rpn_proposal.max_per_img=20']


@pytest.fixture
def data(workspace: Path, sample_data: Path) -> Path:
    """The folder data/ that the configs name, as a user makes it."""
    (workspace / 'data/ade').mkdir(parents=True)
    (workspace / 'data/coco').symlink_to(sample_data / 'coco8')
    (workspace / 'data/ade/ADEChallengeData2016').symlink_to(sample_data / 'ade8')
    return workspace / 'data'


def test_mask_rcnn(command, root, workspace, data) -> None:
    config = root / 'configs/mask_rcnn_mila_t_3x.py'
    small = '[(160,128)]'
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=2',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
        'test_dataloader.num_workers=0',
        'default_hooks.logger.interval=1',
        # the recipe chooses between resizing, and resizing, cropping and resizing
        f'train_dataloader.dataset.pipeline.3.transforms.0.0.scales={small}',
        f'train_dataloader.dataset.pipeline.3.transforms.1.0.scales={small}',
        'train_dataloader.dataset.pipeline.3.transforms.1.1.crop_size=(96,128)',
        f'train_dataloader.dataset.pipeline.3.transforms.1.2.scales={small}',
        'val_dataloader.dataset.pipeline.1.scale=(160,128)',
        'test_dataloader.dataset.pipeline.1.scale=(160,128)',
        'model.test_cfg.rcnn.score_thr=0.0',  # two iterations find nothing that is sure
        *FEW_PROPOSALS,
    ]
    ended = command(TRAIN, config, '--work-dir', 'run', '--cfg-options', *options)
    assert ended.status == 0, ended.err
    assert 'loss_mask: ' in ended.out
    assert 'coco/segm_mAP: ' in ended.out
    argv = ['--work-dir', 'run', '--show-dir', 'pictures', '--cfg-options', *options]
    ended = command(TEST, config, 'run/epoch_1.pth', *argv)
    assert ended.status == 0, ended.err
    assert 'coco/bbox_mAP: ' in ended.out
    pictures = {path.name for path in (workspace / 'pictures').iterdir()}
    assert pictures == {path.name for path in (data / 'coco/val2017').iterdir()}


def test_upernet(command, root, workspace, data) -> None:
    config = root / 'configs/upernet_mila_t_160k.py'
    options = [
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
        'test_dataloader.num_workers=0',
        'model.data_preprocessor.size=(64,64)',
        'train_dataloader.dataset.pipeline.2.scale=(256,64)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(256,64)',
        'test_dataloader.dataset.pipeline.1.scale=(256,64)',
    ]
    ended = command(TRAIN, config, '--work-dir', 'run', '--cfg-options', *options)
    assert ended.status == 0, ended.err
    assert 'decode.loss_ce: ' in ended.out
    assert 'mIoU: ' in ended.out
    argv = ['--work-dir', 'run', '--show-dir', 'pictures', '--cfg-options', *options]
    ended = command(TEST, config, 'run/iter_2.pth', *argv)
    assert ended.status == 0, ended.err
    assert 'mIoU: ' in ended.out
    first = cv2.imread(str(next((workspace / 'pictures').iterdir())))
    assert first.ndim == 3
