"""The study behind MILA: Mamba's designs as switches of a linear attention Transformer (arXiv 2405.16605)."""

from .design import STUDY_ROWS
from .trunk import LinearAttentionClassifier, LinearAttentionTrunk

__all__ = ['STUDY_ROWS', 'LinearAttentionClassifier', 'LinearAttentionTrunk']
