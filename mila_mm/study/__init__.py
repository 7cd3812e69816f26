"""What surrounds the study of Mamba's designs: published figures, tables, plots, throughput, a replication in small.

The models are in :mod:`mila_mm.study.model`, the operator in :mod:`mila_mm.ops.gated`.
"""
