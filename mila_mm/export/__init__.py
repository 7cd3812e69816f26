"""Trained models as files that run without mmdet, mmseg and this package: ONNX, torch.export, TorchScript, OpenVINO."""

from mila_mm.export.api import Exported, export_model

__all__ = ['Exported', 'export_model']
