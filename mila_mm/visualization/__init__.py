"""Pictures of what a run did: predictions beside the truth, and curves from its log."""

from mila_mm.visualization.curves import read_scalars, save_curves
from mila_mm.visualization.predictions import Labels, Sample, save_predictions
from mila_mm.visualization.samples import read_detections, read_segmentations

__all__ = [
    'Labels',
    'Sample',
    'read_detections',
    'read_scalars',
    'read_segmentations',
    'save_curves',
    'save_predictions',
]
