"""Writes docs/mmcv_ops.md from the op table: ``python tools/docs/mmcv_ops.py docs/mmcv_ops.md``."""

import sys
from pathlib import Path

from mila_mm.compat.mmcv_ext.table import NOT_PROVIDED, OPS

HEAD = """\
<!-- Made by `python tools/docs/mmcv_ops.py docs/mmcv_ops.md`; change mila_mm/compat/mmcv_ext/table.py instead. -->

# mmcv's ops without compiling

`import mila_mm` appends an import hook to the end of `sys.meta_path`. Where mmcv was installed without its compiled
ops, the hook supplies `mmcv._ext` over torchvision's kernels and plain PyTorch, on CPU and CUDA. A compiled mmcv
always wins: the hook is then never asked. `mila_mm` must be imported before `mmdet` or `mmseg`: `mila` and
`tools/*.py` do so, in Python `import mila_mm` comes first, and a tool of mmdet or mmseg runs by `mila run mmdet TOOL`.
A config's `custom_imports = dict(imports=['mila_mm'])` is enough for mmdet's `train.py` only: the other tools import
mmcv's ops before they read a config.

Provided is what the models of mmdet and mmseg call. Where the original computes in float32 only, float64 and, through
float32, float16 and bfloat16 work too. Nothing here is compiled or installed at run time. Speed beside a compiled mmcv:
[mmcv_ops_speed.md](mmcv_ops_speed.md).

## Provided

| op | provided by | equal to |
| --- | --- | --- |
"""

MIDDLE = """
`get_compiler_version` and `get_compiling_cuda_version` answer that nothing was compiled.

Python-only parts of mmcv.ops that need no op of their own work as they are: `CornerPool`, `CrissCrossAttention`,
`point_sample`, `SimpleRoIAlign`, `SAConv2d`, the merge cells.

## Not provided

These names exist, so that mmcv imports, and raise `OpNotProvidedError` (a `NotImplementedError`) on call. An mmcv
built with `MMCV_WITH_OPS=1` provides them.

| family | ops |
| --- | --- |
"""


def render() -> str:
    """Return the page as Markdown."""
    provided = ''.join(f'| `{op.name}` | {op.provided_by} | {op.equal_to} |\n' for op in OPS)
    missing = ''.join(
        f'| {family} | {", ".join(f"`{n}`" for n in names)} |\n' for family, names in NOT_PROVIDED.items()
    )
    return HEAD + provided + MIDDLE + missing


if __name__ == '__main__':
    Path(sys.argv[1]).write_text(render(), encoding='utf-8')
