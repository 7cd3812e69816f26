"""Registries of the scope ``mila_mm``, children of mmengine's.

mmengine imports ``mila_mm.registry`` by itself when it meets ``type='mila_mm.MILA'``,
and the ``locations`` below when it looks the name up, so a config needs no
``custom_imports``.
"""

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

_ENGINE = ['mila_mm.engine.components']

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='mila_mm', locations=['mila_mm.models', 'mila_mm.study.model.backbone']
)
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='mila_mm', locations=['mila_mm.datasets'])
DATA_SAMPLERS = Registry('data sampler', parent=MMENGINE_DATA_SAMPLERS, scope='mila_mm', locations=_ENGINE)
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='mila_mm', locations=_ENGINE)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mila_mm', locations=_ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mila_mm',
    locations=_ENGINE,
)
OPTIM_WRAPPERS = Registry('optimizer wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mila_mm', locations=_ENGINE)
MODEL_WRAPPERS = Registry('model wrapper', parent=MMENGINE_MODEL_WRAPPERS, scope='mila_mm', locations=_ENGINE)
