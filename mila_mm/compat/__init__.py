"""What stands between the package and the OpenMMLab that is installed: the ``mmcv._ext`` stand-in, the two lineages."""
