"""The study behind MILA: Mamba's designs as switches of a linear attention Transformer (arXiv 2405.16605)."""

from mila_mm.study.model.design import STUDY_ROWS
from mila_mm.study.model.trunk import LinearAttentionClassifier, LinearAttentionTrunk

__all__ = ['STUDY_ROWS', 'LinearAttentionClassifier', 'LinearAttentionTrunk']
