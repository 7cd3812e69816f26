"""Data that the package can make by itself."""

from mila_mm.datasets.shapes import ADE_CLASSES, COCO_CLASSES, write_shapes

__all__ = ['ADE_CLASSES', 'COCO_CLASSES', 'write_shapes']
