"""What others save beside their weights is read as plain data."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub

from mila_mm.weights import (
    read_file,
)


@pytest.mark.parametrize('new_format', [True, False])
def test_leftovers_of_training_scripts_become_plain(file, dense, new_format):
    hub = MessageHub('weights-test')
    hub.update_scalar('train/loss', 2.0)
    hub.update_scalar('train/loss', 4.0)
    hub.update_info('iter', 7)
    hub.update_info('palette', np.array([[1, 2], [3, 4]], dtype=np.uint8, order='F'))
    content = {
        'model': dense,
        'args': argparse.Namespace(lr=0.1, output=Path('/a/b'), nested=argparse.Namespace(x=1)),
        'config': ConfigDict(a=1, b=dict(c=[1, 2])),
        'full': Config(dict(z=dict(y=2))),
        'max_accuracy': np.float64(83.5),
        'wide': np.arange(3, dtype='>i4'),
        'flag': np.bool_(True),
        'name': np.str_('abc'),
        'message_hub': hub.state_dict(),
        'whole_hub': hub,
        'seen': {1, 2},
        'random': np.random.get_state(),
    }
    read = read_file(file(content, _use_new_zipfile_serialization=new_format))
    assert read['args'] == {'lr': 0.1, 'output': '/a/b', 'nested': {'x': 1}}
    assert read['config'] == {'a': 1, 'b': {'c': [1, 2]}}
    assert read['full'] == {'z': {'y': 2}}
    assert (read['max_accuracy'], read['flag'], read['name'], read['seen']) == (83.5, True, 'abc', {1, 2})
    assert type(read['max_accuracy']) is np.float64
    np.testing.assert_array_equal(read['wide'], [0, 1, 2])
    np.testing.assert_array_equal(read['random'][1], content['random'][1])
    for stored in (read['message_hub'], read['whole_hub']):
        assert type(stored['log_scalars']['train/loss']) is HistoryBuffer
        assert stored['log_scalars']['train/loss'].mean() == 3.0
        assert stored['runtime_info']['iter'] == 7
        np.testing.assert_array_equal(stored['runtime_info']['palette'], [[1, 2], [3, 4]])
        MessageHub('weights-test-back').load_state_dict(stored)


def test_yacs_config_as_the_released_code_saves_it(file, dense, monkeypatch):
    """yacs itself is not needed: its class is made here, under its name."""
    import sys
    import types

    class CfgNode(dict):
        def __init__(self, content):
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in content.items()})
            self.__dict__.update({'__immutable__': True, '__deprecated_keys__': set()})

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    path = file({'model': dense, 'config': CfgNode({'MODEL': {'TYPE': 'mlla', 'DEPTHS': [2, 4]}, 'EPOCHS': 300})})
    monkeypatch.delitem(sys.modules, 'yacs.config')
    assert read_file(path)['config'] == {'MODEL': {'TYPE': 'mlla', 'DEPTHS': [2, 4]}, 'EPOCHS': 300}
