"""Sprites: the objects of which scenes are composed."""

import math
from dataclasses import dataclass
from typing import Optional, Union

import cv2
import numpy as np

from ws_detectron.lab.fashion_mnist.files import FASHION_CLASSES, load_fashion_mnist

from .raster import OPAQUE, UNIT, Draws, draw_texture, polygon_alpha, resample, to_fixed

Colour = tuple[int, int, int]
# A pixel belongs to the object if the object covers at least half of it.
MASK_THRESHOLD = 128


@dataclass(frozen=True)
class Sprite:
    """One object, cropped to its extent, without colours."""

    category: int  # index into the source's classes
    alpha: np.ndarray  # (h, w) uint8, 0 outside, 255 inside
    tone: np.ndarray  # (h, w) uint8, interpolates between the two colours of the palette
    source_index: Optional[int] = None  # of the article in its split of Fashion-MNIST

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool, the pixels of the whole object."""
        return self.alpha >= MASK_THRESHOLD


def distance(a: Colour, b: Colour) -> int:
    """Sum of the absolute channel differences, 0 to 765."""
    return sum(abs(p - q) for p, q in zip(a, b))


def draw_colour(draws: Draws, *apart_from: Colour, gap: int = 140, darkest: int = 0) -> Colour:
    """A random colour with a `distance` of at least `gap` from each given one.

    The most distant of 32 colours if none has it: three colours can exclude all others.

    Args:
        draws: the stream to draw from.
        apart_from: colours to avoid.
        gap: the least `distance`.
        darkest: the least sum of the channels, for bright colours.
    """
    best, best_gap = (0, 0, 0), -1
    for _ in range(32):
        colour = (draws.integer(0, 255), draws.integer(0, 255), draws.integer(0, 255))
        if sum(colour) < darkest:
            continue
        nearest = min((distance(colour, other) for other in apart_from), default=gap)
        if nearest > best_gap:
            best, best_gap = colour, nearest
        if nearest >= gap:
            break
    return best


def trim(alpha: np.ndarray, *planes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Crops `alpha` and planes of its shape to the extent of its nonzero pixels."""
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return tuple(np.ascontiguousarray(plane[window]) for plane in (alpha, *planes))


# Corners of the polygon for a circle: at a radius of 150 pixels they differ by at most 0.2 pixels.
_ROUND = 64
# Largest ratio of the axes: a larger one would make classes ambiguous.
_STRETCH = 1.3
# Largest rotation in either direction, radians (30 degrees): more is hard to learn in minutes.
_TILT = math.pi / 6
# Least distance of the first colour from the background, largest difference per channel between the
# two colours, least distance of the second colour from the background. So the outline has more
# contrast than the texture; with equal contrast, a small model learns little in minutes.
_EDGE, _SHADE, _FAINT_EDGE = 170, 60, 110


def _disc(radius: float, corners: int = _ROUND, start: float = 0.0) -> np.ndarray:
    angles = np.arange(corners) * (2 * math.pi / corners) + start
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _arch() -> np.ndarray:
    """The upper half of a ring."""
    angles = math.pi * np.arange(_ROUND // 2 + 1) / (_ROUND // 2)
    half = np.stack([np.cos(angles), -np.sin(angles)], axis=1)
    return np.concatenate([half, 0.4 * half[::-1]])


def _cross() -> np.ndarray:
    arm = 1 / 3
    quarter = np.array([(1.0, -arm), (1.0, arm), (arm, arm)])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Name -> polygons in the unit circle, (V, 2) floats each; the second is a hole.
OUTLINES = {
    "circle": [_disc(1.0)],
    "ring": [_disc(1.0), _disc(0.5)],
    "triangle": [_disc(1.0, 3, -math.pi / 2)],  # one corner up
    "bar": [np.array([(1.0, 0.5), (-1.0, 0.5), (-1.0, -0.5), (1.0, -0.5)])],
    "cross": [_cross()],
    "arch": [_arch()],
}


class ShapeSprites:
    """Shapes of all classes, with equal probability."""

    classes = tuple(OUTLINES)

    def draw(self, draws: Draws, size: int) -> Sprite:
        """A random sprite whose longer side is about `size` pixels."""
        category = draws.integer(0, len(self.classes) - 1)
        stretch = draws.log_uniform(1 / _STRETCH, _STRETCH)
        angle = draws.uniform(-_TILT, _TILT)
        cosine, sine = math.cos(angle), math.sin(angle)
        turn = np.array([[cosine * stretch, sine * stretch], [-sine, cosine]])
        polygons = [polygon @ turn for polygon in OUTLINES[self.classes[category]]]

        low = polygons[0].min(axis=0)
        scale = size / (polygons[0].max(axis=0) - low).max()
        # Integers from here on: the last bits of sine and cosine differ between machines.
        polygons = [to_fixed((polygon - low) * scale) for polygon in polygons]
        width, height = (-(-int(side) // UNIT) for side in polygons[0].max(axis=0))
        alpha = polygon_alpha(polygons, height, width)
        alpha, tone = trim(alpha, draw_texture(draws, height, width))
        return Sprite(category, alpha, tone)

    def palette(self, draws: Draws, backdrop: Colour) -> tuple[Colour, Colour]:
        """The colours for tone 0 and 255, which contrast with the mean colour behind the sprite."""
        first = draw_colour(draws, backdrop, gap=_EDGE)
        second = first
        for _ in range(8):
            red, green, blue = (
                min(max(channel + draws.integer(-_SHADE, _SHADE), 0), 255) for channel in first
            )
            second = red, green, blue
            if distance(second, backdrop) >= _FAINT_EDGE:
                return first, second
        return first, first


# Split of the scenes -> split of Fashion-MNIST
_ARTICLES = {"train": "train", "val": "test"}
# Least grey level of an article. Lower levels are halos, left by the rescaling to 28 x 28 pixels;
# the darkest clothes are only slightly brighter.
_DARKEST = 16
# Pixels; smaller enclosed dark spots are prints and folds and get filled, larger ones are openings,
# such as the handle of a bag.
_LARGEST_SPOT = 16
# An article is skipped if its largest connected piece has less than this share of its pixels: 1 in
# 100 articles, with dark stripes or white soles.
_LEAST_PIECE = 0.8
_MAX_ROTATION = math.radians(20)
_FIXED = 2**16


def article_mask(grey: np.ndarray) -> Optional[np.ndarray]:
    """The mask of the article in a 28 x 28 image.

    The largest 4-connected piece of the pixels of grey level 16 or more, with holes of up to 16
    pixels filled.

    Args:
        grey: (h, w) uint8, black background.

    Returns:
        (h, w) bool, or None if the largest piece has less than 80 % of the pixels.
    """
    lit = (grey >= _DARKEST).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(lit, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < _LEAST_PIECE * areas.sum():
        return None
    # With a border, all pixels outside the article are one piece, too large for a spot.
    mask = np.pad(labels == 1 + int(areas.argmax()), 1)
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    spot = stats[:, cv2.CC_STAT_AREA] <= _LARGEST_SPOT
    return (mask | spot[labels])[1:-1, 1:-1]


class FashionSprites:
    """Articles of one split, tinted, scaled and rotated by up to 20 degrees; as `ShapeSprites`."""

    classes = FASHION_CLASSES

    def __init__(self, split: str) -> None:
        """
        Args:
            split: `"train"`: the 60,000 training articles; `"val"`: the 10,000 test articles.

        Raises:
            UserError: Fashion-MNIST is missing or damaged.
        """
        self._images, self._labels = load_fashion_mnist(_ARTICLES[split])

    def draw(self, draws: Draws, size: int) -> Sprite:
        mask = None
        while mask is None:
            index = draws.integer(0, len(self._images) - 1)
            mask = article_mask(self._images[index])
        angle = draws.uniform(-_MAX_ROTATION, _MAX_ROTATION)
        alpha, tone = _rotate(mask, self._images[index], size, angle)
        return Sprite(int(self._labels[index]), alpha, tone, source_index=index)

    def palette(self, draws: Draws, backdrop: Colour) -> tuple[Colour, Colour]:
        red, green, blue = tint = draw_colour(draws, backdrop, darkest=330)
        return (red // 4, green // 4, blue // 4), tint


SpriteSource = Union[ShapeSprites, FashionSprites]


def _rotate(mask: np.ndarray, grey: np.ndarray, size: int, angle: float) -> tuple[np.ndarray, ...]:
    """Alpha and tone of an article whose rotated frame is `size` pixels long."""
    outline, grey = trim(mask.astype(np.uint8) * OPAQUE, grey)
    source_height, source_width = outline.shape
    cosine, sine = math.cos(angle), math.sin(angle)
    frame_width = abs(cosine) * source_width + abs(sine) * source_height
    frame_height = abs(sine) * source_width + abs(cosine) * source_height
    scale = size / max(frame_width, frame_height)
    # one pixel of margin for the antialiased edge
    width = math.floor(frame_width * scale + 0.5) + 2
    height = math.floor(frame_height * scale + 0.5) + 2

    # result pixel -> source pixel: rotation and scaling about the centres
    a, b = cosine / scale, sine / scale
    inverse = [
        [a, b, (source_width - 1) / 2 - a * (width - 1) / 2 - b * (height - 1) / 2],
        [-b, a, (source_height - 1) / 2 + b * (width - 1) / 2 - a * (height - 1) / 2],
    ]
    fixed = [[math.floor(value * _FIXED + 0.5) for value in line] for line in inverse]
    # Grey is interpolated within the article: weighted by alpha, then divided by it.
    weighted = np.where(outline > 0, grey, 0).astype(np.uint8)
    alpha, tone = resample(np.stack([outline, weighted]), height, width, fixed)
    tone = np.minimum(tone.astype(np.int32) * OPAQUE // np.maximum(alpha, 1), OPAQUE)
    return trim(alpha, tone.astype(np.uint8))
