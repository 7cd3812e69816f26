"""Masks as COCO's segmentations, exactly."""

import numpy as np
import shapely


def encode_segmentation(mask: np.ndarray) -> list[list[int]] | dict:
    """Write a mask as the segmentation of a COCO annotation.

    The polygons follow the edges of the pixels, so that pycocotools turns them back into
    exactly this mask. A mask with a hole, which no list of polygons can say, becomes an
    uncompressed run-length encoding.

    Args:
        mask: The mask, (H, W) bool, with at least one pixel.

    Returns:
        One polygon ``[x0, y0, x1, y1, ...]`` for each 4-connected part, or ``dict(size=[H, W], counts=[...])``.

    Raises:
        ValueError: If the mask is empty or not two-dimensional.
    """
    if mask.ndim != 2 or not mask.any():
        raise ValueError(f'expected a mask (H, W) with at least one pixel, got shape {mask.shape}, {mask.sum()} pixels')
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]
    outline = shapely.normalize(shapely.union_all(shapely.box(starts, rows, stops, rows + 1)))
    parts = shapely.get_parts(outline)
    if shapely.get_num_interior_rings(parts).any():
        return encode_runs(mask)
    # Simplifying by nothing drops the points within straight edges; the normal form starts at a corner.
    return [
        shapely.get_coordinates(ring)[:-1].astype(int).ravel().tolist()
        for ring in shapely.get_exterior_ring(shapely.simplify(parts, 0))
    ]


def encode_runs(mask: np.ndarray) -> dict:
    """Write a mask (H, W) bool as COCO's uncompressed run-length encoding, column by column, zeros first."""
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))
    return {'size': list(mask.shape), 'counts': np.diff(edges, prepend=0).tolist()}
