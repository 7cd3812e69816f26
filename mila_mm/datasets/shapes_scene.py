"""Drawing one scene of the shapes set: textured shapes that overlap on textured ground.

Everything is integer arithmetic on a random stream that numpy has frozen, so that a
scene is the same on every platform, in every process and under every version.
"""

import colorsys
import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np

SHAPE_CLASSES = ('circle', 'square', 'triangle', 'star', 'cross', 'ring')
GROUND = 'ground'

# Edges are drawn on a grid this many times finer. Odd, so that the centre of every pixel is a sample
# of that grid: what lies on it decides whose pixel it is.
_FINE = 3
# A scene is built by trial: a candidate is dropped where it would leave less than this of a shape in sight.
_MIN_VISIBLE = 0.5
_MIN_INSIDE = 0.75
# Colour hints at the class, as it does in nature, and never decides: around the circle of hues the classes lie as far
# apart as they spread to either side, so that every hue belongs to two of them, which differ in shape only.
_HUES = {'circle': 0, 'star': 60, 'square': 120, 'ring': 180, 'triangle': 240, 'cross': 300}
_HUE_SPREAD = 60
_SHAPES_PER_SCENE = (3, 6)
_RADIUS = (0.15, 0.26)  # of the image side
_TILT = 30  # degrees to either side


@dataclass(frozen=True)
class Scene:
    """One drawn image and what is visible in it.

    Attributes:
        image: RGB image, (size, size, 3) uint8.
        instances: Instance map, (size, size) uint8: 0 for ground, k for the k-th shape where it is not occluded.
        categories: For each shape, from the bottom to the top, its index in ``SHAPE_CLASSES``.
        full_areas: For each shape, the pixels that it would cover within the image if nothing lay on it.
    """

    image: np.ndarray
    instances: np.ndarray
    categories: tuple[int, ...]
    full_areas: tuple[int, ...]


def draw_scene(seed: int, index: int, size: int) -> Scene:
    """Draw the scene that a seed and an index name.

    Args:
        seed: Seed of the set, >= 0.
        index: Index of the image, >= 0. Scenes of different indices are independent.
        size: Side of the square image in pixels, >= 32.

    Returns:
        The scene. It holds at least one shape, and of each shape at least half is in sight.
    """
    # RandomState's stream is the one that numpy promises never to change.
    rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, index))))
    image = _ground(rng, size)
    instances = np.zeros((size, size), dtype=np.uint8)
    categories: list[int] = []
    full_areas: list[int] = []
    wanted = _integer(rng, *_SHAPES_PER_SCENE)
    for _ in range(6 * wanted):
        if len(categories) == wanted:
            break
        category = _integer(rng, 0, len(SHAPE_CLASSES) - 1)
        contours, radius = _place(rng, SHAPE_CLASSES[category], size)
        paint = _Paint.draw(rng, SHAPE_CLASSES[category], radius)
        fine = _fill(contours, size)
        mask = fine[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE].astype(bool)
        if not _fits(mask, instances, full_areas, contours):
            continue
        categories.append(category)
        full_areas.append(int(mask.sum()))
        instances[mask] = len(categories)
        _lay(image, paint, fine, contours)
    grain = rng.randint(-9, 10, size=image.shape, dtype=np.int64)
    image = np.clip(image + grain, 0, 255).astype(np.uint8)
    return Scene(image, instances, tuple(categories), tuple(full_areas))


def _integer(rng: np.random.RandomState, low: int, high: int) -> int:
    """Return a random integer from low to high, both included."""
    return int(rng.randint(low, high + 1, dtype=np.int64))


@functools.cache
def _unit_contours(name: str) -> list[list[tuple[float, float]]]:
    """Return the closed contours of a shape inscribed in the unit circle; a second contour is a hole."""

    def around(radii: tuple[float, ...], count: int) -> list[tuple[float, float]]:
        turn = 2 * math.pi / count
        return [
            (radii[i % len(radii)] * math.cos(i * turn), radii[i % len(radii)] * math.sin(i * turn))
            for i in range(count)
        ]

    arm = 0.36
    reach = math.sqrt(1 - arm * arm)
    quarter = [(reach, -arm), (reach, arm), (arm, arm)]
    cross = [point for turn in range(4) for point in (_rotate(p, 90 * turn) for p in quarter)]
    return {
        'circle': [around((0.9,), 72)],
        'square': [[_rotate(p, 45) for p in around((1.0,), 4)]],
        'triangle': [[_rotate(p, -90) for p in around((1.0,), 3)]],
        'star': [[_rotate(p, -90) for p in around((1.0, 0.45), 10)]],
        'cross': [cross],
        'ring': [around((0.95,), 72), around((0.5,), 72)],
    }[name]


def _rotate(point: tuple[float, float], degrees: int) -> tuple[float, float]:
    # Rounded, so that libraries whose cosines differ in the last bit agree.
    cos, sin = round(math.cos(math.radians(degrees)), 6), round(math.sin(math.radians(degrees)), 6)
    return point[0] * cos - point[1] * sin, point[0] * sin + point[1] * cos


def _place(rng: np.random.RandomState, name: str, size: int) -> tuple[list[np.ndarray], int]:
    """Choose where a shape lies, how large it is and how it is turned and stretched.

    Returns:
        The contours on the fine grid, each (points, 2) int32 of x, y; and the radius in pixels.
    """
    radius = _integer(rng, round(_RADIUS[0] * size), round(_RADIUS[1] * size))
    degrees = _integer(rng, -_TILT, _TILT)
    squeeze = _integer(rng, 85, 100) / 100
    margin = radius // 2
    centre = [_integer(rng, margin * _FINE, (size - margin) * _FINE) for _ in range(2)]
    contours = []
    for contour in _unit_contours(name):
        points = [_rotate((x, y * squeeze), degrees) for x, y in contour]
        contours.append(
            np.array([[centre[k] + round(p[k] * radius * _FINE, 3) for k in range(2)] for p in points])
            .round()
            .astype(np.int32)
        )
    return contours, radius


def _fill(contours: list[np.ndarray], size: int) -> np.ndarray:
    """Fill contours on the fine grid; (3 size, 3 size) uint8 of 0 and 1."""
    fine = np.zeros((size * _FINE, size * _FINE), dtype=np.uint8)
    cv2.fillPoly(fine, contours, 1)  # more than one contour: the even-odd rule, so the second is a hole
    return fine


def _fits(mask: np.ndarray, instances: np.ndarray, full_areas: list[int], contours: list[np.ndarray]) -> bool:
    """Tell whether enough of the new shape is inside, and enough of each older one stays in sight."""
    whole = abs(cv2.contourArea(contours[0])) - sum(abs(cv2.contourArea(c)) for c in contours[1:])
    if mask.sum() * _FINE**2 < _MIN_INSIDE * whole:
        return False
    visible = np.bincount(instances[~mask], minlength=len(full_areas) + 1)[1:]
    return all(left >= _MIN_VISIBLE * full for left, full in zip(visible, full_areas, strict=True))


def _colour(
    rng: np.random.RandomState, hue: tuple[int, int], saturation: tuple[int, int], value: tuple[int, int]
) -> np.ndarray:
    """Draw an RGB colour, (3,) int64: hue in degrees, saturation and value in percent, each within its range."""
    drawn = (_integer(rng, *hue) % 360 / 360, _integer(rng, *saturation) / 100, _integer(rng, *value) / 100)
    return np.array([int(255 * channel) for channel in colorsys.hsv_to_rgb(*drawn)], dtype=np.int64)


def _ground(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Paint dull ground, two colours mixed by smooth noise at two scales; (size, size, 3) int64."""
    first, second = (_colour(rng, (0, 359), (5, 35), (25, 80)) for _ in range(2))
    weight = (2 * _smooth_noise(rng, size, 32) + _smooth_noise(rng, size, 8)) // 3
    return (first * (255 - weight[..., None]) + second * weight[..., None]) // 255


def _smooth_noise(rng: np.random.RandomState, size: int, cell: int) -> np.ndarray:
    """Interpolate a random lattice linearly; (size, size) int64 in 0 .. 255, ``cell`` pixels between nodes."""
    nodes = rng.randint(0, 256, size=(size // cell + 2,) * 2, dtype=np.int64)
    whole, part = np.divmod(np.arange(size), cell)
    rows = nodes[whole] * (cell - part)[:, None] + nodes[whole + 1] * part[:, None]
    return (rows[:, whole] * (cell - part) + rows[:, whole + 1] * part) // cell**2


def _lay(image: np.ndarray, paint: '_Paint', fine: np.ndarray, contours: list[np.ndarray]) -> None:
    """Lay a painted shape with an outline over the image, in place, its edges smoothed."""
    # One pixel of margin, so that the erosion sees where the shape ends; at the border of the image it goes on.
    low = np.maximum(contours[0].min(axis=0) // _FINE - 1, 0)
    high = np.minimum(contours[0].max(axis=0) // _FINE + 2, len(image))
    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    fine = fine[tuple(slice(s.start * _FINE, s.stop * _FINE) for s in window)]
    inner = cv2.erode(fine, np.ones((3, 3), np.uint8), iterations=_FINE - 1, borderType=cv2.BORDER_REPLICATE)
    for samples, colour in ((fine, paint.texture(window)), (fine - inner, paint.outline)):
        coverage = sum(samples[i::_FINE, j::_FINE, None].astype(np.int64) for i in range(_FINE) for j in range(_FINE))
        image[window] = (image[window] * (_FINE**2 - coverage) + colour * coverage) // _FINE**2


@dataclass(frozen=True)
class _Paint:
    """Two shades of one colour in a pattern: plain, stripes, checks or dots."""

    colours: np.ndarray
    pattern: str
    period: int
    direction: tuple[int, int]

    @classmethod
    def draw(cls, rng: np.random.RandomState, name: str, radius: int) -> '_Paint':
        """Draw colour, shade, light and pattern of a shape of class ``name`` and of ``radius`` pixels."""
        centre = _HUES[name]
        colour = _colour(rng, (centre - _HUE_SPREAD, centre + _HUE_SPREAD), (55, 100), (60, 100))
        shade = colour * _integer(rng, 45, 75) // 100
        light = 255 - (255 - colour) * _integer(rng, 45, 75) // 100
        pattern = ('plain', 'stripes', 'checks', 'dots')[_integer(rng, 0, 3)]
        period = max(3, radius * _integer(rng, 25, 45) // 100)
        direction = ((1, 0), (0, 1), (1, 1), (1, -1))[_integer(rng, 0, 3)]
        return cls(np.stack([colour, (shade, light)[_integer(rng, 0, 1)]]), pattern, period, direction)

    @property
    def outline(self) -> np.ndarray:
        """The colour of the outline, (3,) int64."""
        return self.colours[0] * 45 // 100

    def texture(self, window: tuple[slice, slice]) -> np.ndarray:
        """Return the texture of a window of the image, (rows, columns, 3) int64."""
        y, x = np.mgrid[window]
        if self.pattern == 'stripes':
            which = (self.direction[0] * x + self.direction[1] * y) // self.period % 2
        elif self.pattern == 'checks':
            which = (x // self.period + y // self.period) % 2
        elif self.pattern == 'dots':
            centre = self.period // 2
            square = (x % self.period - centre) ** 2 + (y % self.period - centre) ** 2
            which = (square * 10 <= self.period**2).astype(np.int64)
        else:
            which = np.zeros_like(x)
        return self.colours[which]
