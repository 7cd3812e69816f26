"""The config that a training leaves in its work folder is complete, and a test leaves it alone."""

from mmengine.config import Config


def test_train_then_test_and_resume_from_the_dumped_config(command, detector, workspace) -> None:
    assert command('train.py', detector, '--work-dir', 'run').status == 0
    dumped = workspace / 'run' / 'detector.py'
    written = dumped.read_text()
    cfg = Config.fromfile(dumped)
    assert cfg.test_dataloader.dataset.ann_file and cfg.test_evaluator and cfg.train_dataloader and cfg.optim_wrapper

    ended = command('test.py', dumped, workspace / 'run' / 'epoch_1.pth', '--work-dir', 'run')
    assert ended.status == 0, ended.err
    assert dumped.read_text() == written

    ended = command('train.py', dumped, '--work-dir', 'run', '--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    assert ended.status == 0, ended.err
    assert (workspace / 'run' / 'epoch_2.pth').is_file()


def test_outputs_that_cannot_be_written_are_refused_before_testing(
    command, detector, trained_detector, workspace, refused
) -> None:
    (workspace / 'file').write_text('')
    for flag, path in (('--out', 'file/x.pkl'), ('--show-dir', 'file/pictures')):
        refused(command('test.py', detector, trained_detector, flag, path), flag, 'is a file')
