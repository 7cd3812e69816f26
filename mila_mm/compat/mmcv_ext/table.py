"""The one table of mmcv's ops: what provides each, and what it equals. ``mmcv._ext`` is made from it."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from mila_mm.compat.mmcv_ext import attention, boxes, carafe, deform, lanes, losses, masks, nms, norm, pools, prroi, roi
from mila_mm.compat.mmcv_ext.common import as_compiled
from mila_mm.errors import UserError

_TORCHVISION = "torchvision's kernel"
_PLAIN = 'plain PyTorch'


class OpNotProvidedError(UserError, NotImplementedError):
    """An op of mmcv was called that the stand-in does not provide."""


@dataclass(frozen=True)
class Op:
    """One provided function of ``mmcv._ext``.

    Attributes:
        function: The implementation; its name is the op's name.
        provided_by: What computes it.
        equal_to: What its results are equal to, and where they differ.
    """

    function: Callable[..., Any]
    provided_by: str
    equal_to: str

    @property
    def name(self) -> str:
        """The name under which mmcv asks for it."""
        return self.function.__name__


def get_compiler_version() -> str:
    """Return what stands where a compiler's version would stand."""
    return 'none (ops from mila_mm.compat.mmcv_ext)'


def get_compiling_cuda_version() -> str:
    """Return what stands where the CUDA version of the compilation would stand."""
    return 'none (ops from mila_mm.compat.mmcv_ext)'


OPS: tuple[Op, ...] = (
    Op(nms.nms, _TORCHVISION, 'mmcv; equal scores keep their order'),
    Op(nms.softnms, 'NumPy, one vectorised step per kept box: each depends on the one before', 'mmcv, ties included'),
    Op(nms.nms_match, f'{_TORCHVISION} for the kept boxes, {_PLAIN} for the groups', 'mmcv'),
    Op(boxes.bbox_overlaps, _PLAIN, 'mmcv'),
    Op(
        roi.roi_align_forward,
        f'average: {_TORCHVISION}; max: {_PLAIN}',
        'mmcv; in max mode a bin without samples gives 0 (mmcv: the smallest float)',
    ),
    Op(
        roi.roi_align_backward,
        f'average: {_TORCHVISION} on CUDA, {_PLAIN} (embedding_bag) on CPU and in deterministic mode; max: {_PLAIN}',
        'mmcv',
    ),
    Op(
        roi.roi_pool_forward,
        f'{_TORCHVISION}, one bin at a time',
        'mmcv (not torchvision, which rounds boxes); a box of negative size passes no gradient',
    ),
    Op(roi.roi_pool_backward, _TORCHVISION, 'mmcv'),
    Op(
        losses.sigmoid_focal_loss_forward,
        _PLAIN,
        'mmcv, and exact where mmcv clamps (logits beyond 16); class weights leave background at 1 (mmcv: undefined)',
    ),
    Op(losses.sigmoid_focal_loss_backward, _PLAIN, 'the derivative of the forward'),
    Op(losses.softmax_focal_loss_forward, _PLAIN, 'mmcv; a target outside the classes costs 0'),
    Op(losses.softmax_focal_loss_backward, _PLAIN, 'mmcv'),
    Op(deform.deform_conv_forward, _TORCHVISION, 'mmcv'),
    Op(deform.deform_conv_backward_input, _TORCHVISION, 'mmcv'),
    Op(deform.deform_conv_backward_parameters, f'{_TORCHVISION}, the same pass as the input gradient', 'mmcv'),
    Op(deform.modulated_deform_conv_forward, _TORCHVISION, 'mmcv'),
    Op(deform.modulated_deform_conv_backward, _TORCHVISION, 'mmcv'),
    Op(attention.ms_deform_attn_forward, f'{_PLAIN} (embedding_bag)', 'mmcv; also on CPU, where mmcv has no kernel'),
    Op(attention.ms_deform_attn_backward, f'{_PLAIN} (embedding_bag)', 'mmcv; also on CPU'),
    Op(pools.deform_roi_pool_forward, f'{_PLAIN} (embedding_bag)', 'mmcv; also on CPU'),
    Op(
        pools.deform_roi_pool_backward,
        f'{_PLAIN} (embedding_bag)',
        'the derivative of the forward; also on CPU. mmcv differs for offsets of samples within one cell of the border',
    ),
    Op(prroi.prroi_pool_forward, f'{_PLAIN} (embedding_bag)', 'mmcv; also on CPU'),
    Op(prroi.prroi_pool_backward, f'{_PLAIN} (embedding_bag)', 'mmcv; also on CPU'),
    Op(prroi.prroi_pool_coor_backward, f'{_PLAIN} (embedding_bag)', 'the derivative of the forward; also on CPU'),
    Op(pools.border_align_forward, _PLAIN, 'mmcv; also on CPU'),
    Op(pools.border_align_backward, _PLAIN, 'mmcv; also on CPU'),
    Op(carafe.carafe_forward, _PLAIN, 'mmcv; also on CPU'),
    Op(carafe.carafe_backward, _PLAIN, 'mmcv; also on CPU'),
    Op(carafe.carafe_naive_forward, _PLAIN, 'mmcv; also on CPU'),
    Op(carafe.carafe_naive_backward, _PLAIN, 'mmcv (whose Python accepts gradients on CUDA only)'),
    Op(masks.masked_im2col_forward, _PLAIN, 'mmcv; also on CPU'),
    Op(masks.masked_col2im_forward, _PLAIN, 'mmcv; also on CPU'),
    Op(masks.psamask_forward, _PLAIN, 'mmcv'),
    Op(masks.psamask_backward, _PLAIN, 'mmcv'),
    Op(norm.sync_bn_forward_mean, _PLAIN, 'mmcv; also on CPU'),
    Op(norm.sync_bn_forward_var, _PLAIN, 'mmcv; also on CPU'),
    Op(norm.sync_bn_forward_output, _PLAIN, 'mmcv; also on CPU'),
    Op(norm.sync_bn_backward_param, _PLAIN, 'mmcv; also on CPU'),
    Op(norm.sync_bn_backward_data, _PLAIN, 'mmcv; also on CPU'),
    Op(
        lanes.line_nms_forward,
        _PLAIN,
        'CLRNet; also on CPU. mmcv compares by score on one side of a pair and by position on the other',
    ),
)

# Families of names that mmcv's Python asks for at import and that nothing in mmdet's or mmseg's models calls.
NOT_PROVIDED: dict[str, tuple[str, ...]] = {
    'rotated and quadrilateral boxes': (
        'active_rotated_filter_backward',
        'active_rotated_filter_forward',
        'box_iou_quadri',
        'box_iou_rotated',
        'convex_giou',
        'convex_iou',
        'diff_iou_rotated_sort_vertices_forward',
        'min_area_polygons',
        'nms_quadri',
        'nms_rotated',
        'points_in_polygons_forward',
        'riroi_align_rotated_backward',
        'riroi_align_rotated_forward',
        'roi_align_rotated_backward',
        'roi_align_rotated_forward',
        'rotated_feature_align_backward',
        'rotated_feature_align_forward',
    ),
    'point clouds, voxels and 3D boxes': (
        'assign_score_withk_backward',
        'assign_score_withk_forward',
        'ball_query_forward',
        'chamfer_distance_backward',
        'chamfer_distance_forward',
        'dynamic_point_to_voxel_backward',
        'dynamic_point_to_voxel_forward',
        'dynamic_voxelize_forward',
        'furthest_point_sampling_forward',
        'furthest_point_sampling_with_dist_forward',
        'gather_points_backward',
        'gather_points_forward',
        'group_points_backward',
        'group_points_forward',
        'hard_voxelize_forward',
        'iou3d_boxes_overlap_bev_forward',
        'iou3d_nms3d_forward',
        'iou3d_nms3d_normal_forward',
        'knn_forward',
        'points_in_boxes_all_forward',
        'points_in_boxes_cpu_forward',
        'points_in_boxes_part_forward',
        'roiaware_pool3d_backward',
        'roiaware_pool3d_forward',
        'roipoint_pool3d_forward',
        'stack_ball_query_forward',
        'stack_group_points_backward',
        'stack_group_points_forward',
        'three_interpolate_backward',
        'three_interpolate_forward',
        'three_nn_forward',
    ),
    'sparse convolution': (
        'fused_indice_conv_forward',
        'get_indice_pairs_2d_backward',
        'get_indice_pairs_2d_forward',
        'get_indice_pairs_3d_backward',
        'get_indice_pairs_3d_forward',
        'get_indice_pairs_4d_forward',
        'indice_conv_backward',
        'indice_conv_forward',
        'indice_maxpool_backward',
        'indice_maxpool_forward',
    ),
    'generative models, video and text': (
        'bezier_align_backward',
        'bezier_align_forward',
        'bias_act',
        'contour_expand',
        'correlation_backward',
        'correlation_forward',
        'filtered_lrelu',
        'filtered_lrelu_act_',
        'fused_bias_leakyrelu',
        'pixel_group',
        'tin_shift_backward',
        'tin_shift_forward',
        'upfirdn2d',
    ),
}


def _not_provided(name: str) -> Callable[..., NoReturn]:
    """Make the function that stands for an op which is not provided.

    Returns:
        A function that raises ``OpNotProvidedError`` whatever it is called with.
    """

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise OpNotProvidedError(
            f"mmcv's op '{name}' is not provided: mmcv is installed without its compiled ops, and mila_mm's stand-in "
            f'lacks this one. Install an mmcv built with MMCV_WITH_OPS=1; it then takes precedence by itself.'
        )

    missing.__name__ = missing.__qualname__ = name
    return missing


def populate(module: ModuleType) -> None:
    """Fill ``mmcv._ext``.

    Args:
        module: A fresh module. Names that are in no table, as a newer mmcv may ask for, are answered
            with functions that raise on call.
    """
    for op in OPS:
        setattr(module, op.name, as_compiled(op.function))
    module.get_compiler_version = get_compiler_version
    module.get_compiling_cuda_version = get_compiling_cuda_version
    for name in (name for family in NOT_PROVIDED.values() for name in family):
        setattr(module, name, _not_provided(name))

    def __getattr__(name: str) -> Callable[..., NoReturn]:
        if name.startswith('_'):
            raise AttributeError(f"module '{module.__name__}' has no attribute {name!r}")
        return _not_provided(name)

    module.__getattr__ = __getattr__
