"""Building without a sound, on no memory, and leaving everything as it was."""

import logging

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope

from mila_mm.swap.light import build, in_scope


def test_loggers_are_silent_inside_and_as_before_outside() -> None:
    loggers = [logging.getLogger(name) for name in ('mmengine', 'current')]
    before = [logger.level for logger in loggers]
    try:
        for logger, level in zip(loggers, (logging.DEBUG, logging.WARNING), strict=True):
            logger.setLevel(level)
        with pytest.raises(KeyError), in_scope('mmseg'):
            assert [logger.level for logger in loggers] == [logging.ERROR] * 2
            assert DefaultScope.get_current_instance().scope_name == 'mmseg'
            raise KeyError('of the caller')
        assert [logger.level for logger in loggers] == [logging.DEBUG, logging.WARNING]
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def test_an_iteration_that_is_known_stays() -> None:
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', 7)
    try:
        with in_scope('mmdet'):
            assert hub.get_info('iter') == 7 and hub.get_info('epoch') is not None
    finally:
        hub.update_info('iter', 0)


def test_modules_hold_zeros_or_nothing_and_leave_the_random_state() -> None:
    cfg = dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained', checkpoint='no/such/file.pth'))
    before = torch.get_rng_state()
    module = build(cfg, 'mmdet')
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert 'checkpoint' in cfg['init_cfg'], 'the config is not changed'
    assert {value.device.type for value in build(cfg, 'mmdet', 'meta').parameters()} == {'meta'}
