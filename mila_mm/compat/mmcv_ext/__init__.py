"""A stand-in for ``mmcv._ext``, mmcv's compiled ops, over torchvision and plain PyTorch.

``install()`` appends an import hook to the END of ``sys.meta_path``: it is asked only when
nothing else on the path provides ``mmcv._ext``, so a compiled mmcv always wins. Importing this
package imports neither torch nor mmcv; both happen when ``mmcv._ext`` is first imported.

What is provided, and by what, is the table in ``mila_mm/compat/mmcv_ext/table.py`` (docs/mmcv_ops.md).
"""

from mila_mm.compat.finder import install, is_stand_in

__all__ = ['install', 'is_stand_in']
