"""Stand-ins for the libraries of the package, with which Sphinx reads its reference without installing them.

Sphinx brings them (``autodoc_mock_imports``). Three things that this package does when it is imported are more than
they can do: writing ``Tensor | None``, asking ``isinstance(value, torch.dtype)``, and registering a class by a
decorator.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, Union

from sphinx.ext.autodoc.mock import _MockObject, mock

# All that the package imports beside Python's own; what is missing here fails the build by name.
LIBRARIES = [
    'cv2', 'faster_coco_eval', 'filelock', 'matplotlib', 'mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'numpy',
    'onnx', 'onnxruntime', 'onnxscript', 'openvino', 'pycocotools', 'safetensors', 'shapely', 'supervision', 'timm',
    'torch', 'torchvision', 'tqdm', 'triton', 'PIL',
]  # fmt: skip

__all__ = ['LIBRARIES', 'complete', 'mock']


def complete() -> None:
    """Teach Sphinx's stand-ins unions, ``isinstance`` and decorators, and to leave signatures of subclasses alone."""
    call: Callable[..., Any] = _MockObject.__call__

    def as_type(value: Any) -> Any:
        return type(value) if isinstance(value, _MockObject) else value

    def call_or_decorate(self: Any, *args: Any, **options: Any) -> Any:
        decorates = len(args) == 1 and not options and isinstance(args[0], type | FunctionType)
        return args[0] if decorates else call(self, *args, **options)

    _MockObject.__or__ = lambda self, other: Union[as_type(self), as_type(other)]  # noqa: UP007 - they know no |
    _MockObject.__ror__ = lambda self, other: Union[as_type(other), as_type(self)]  # noqa: UP007
    _MockObject.__instancecheck__ = lambda self, instance: False
    _MockObject.__call__ = call_or_decorate
    # autodoc takes a class's arguments from __new__ before __init__, and passes over this one
    _MockObject.__new__.__module__, _MockObject.__new__.__qualname__ = 'typing', 'Generic.__new__'
