"""What is done with an annotation file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """What is done with a file, on which depends what it must hold.

    Attributes:
        masks: Whether instance masks are read.
        evaluation: Whether COCO's evaluation reads it.
        polygons_only: Whether run-length encoded masks are passed over (``poly2mask=False``).
        labels: Whether annotations are read at all: not of the images of a test server, nor of unlabelled ones.
    """

    labels: bool = True

    masks: bool = False
    evaluation: bool = False
    polygons_only: bool = False
