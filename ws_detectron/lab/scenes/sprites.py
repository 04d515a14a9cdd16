"""Sprites: the single objects that scenes are made of."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol, Union

import cv2
import numpy as np

from ws_detectron.lab.fashion_mnist.files import FASHION_CLASSES, load_fashion_mnist

from .draws import Draws
from .raster import OPAQUE, UNIT, polygon_alpha, resample, to_fixed
from .textures import draw_texture

Colour = tuple[int, int, int]
# A pixel belongs to the object where the object covers at least half of it.
MASK_THRESHOLD = 128


@dataclass(frozen=True)
class Sprite:
    """One object, cropped to its extent, not yet coloured."""

    category: int  # index into the source's classes
    alpha: np.ndarray  # (h, w) uint8, 0 outside, 255 inside
    tone: np.ndarray  # (h, w) uint8, mixes the two colours of the palette
    source_index: Optional[int] = None  # which entry of the source data it shows

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool, the pixels of the whole object."""
        return self.alpha >= MASK_THRESHOLD


class SpriteSource(Protocol):
    """Where the sprites of one kind and one split come from."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the categories."""

    def draw(self, draws: Draws, size: int) -> Sprite:
        """A random sprite whose longer side is about `size` pixels."""

    def palette(self, draws: Draws, backdrop: Colour) -> tuple[Colour, Colour]:
        """The colours for tone 0 and tone 255, set off from the mean colour behind the sprite."""


def distance(a: Colour, b: Colour) -> int:
    """Sum of the absolute channel differences, 0 to 765."""
    return sum(abs(p - q) for p, q in zip(a, b))


def draw_colour(draws: Draws, *apart_from: Colour, gap: int = 140, darkest: int = 0) -> Colour:
    """A random colour at least `gap` away from each given one.

    After 32 colours that come too near, the best of them is taken: three colours can leave no room.

    Args:
        draws: the stream to draw from.
        apart_from: colours to keep away from.
        gap: the least `distance`.
        darkest: the least sum of the channels, for colours that must be bright.
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
    """Crops `alpha` and the planes like it to the pixels where alpha is not zero.

    Raises:
        ValueError: alpha is zero everywhere.
    """
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    if not len(rows):
        raise ValueError("the sprite has no pixels")
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return tuple(np.ascontiguousarray(plane[window]) for plane in (alpha, *planes))


SHAPE_CLASSES = ("circle", "ring", "triangle", "bar", "cross", "arch")
# Corners of a polygon that stands for a circle: at a radius of 150 pixels the polygon is at most
# 0.2 pixels away from it.
_ROUND = 64
# Largest stretch of one axis against the other: more would turn classes into one another.
_STRETCH = 1.3
# Largest rotation to either side, radians (30 degrees): more is hard to learn in minutes.
_TILT = math.pi / 6
# The outline stands out more than the texture: least difference of the first colour from the
# background, largest difference per channel between the two colours, least difference of the second
# colour from the background. With two colours as far apart as each is from the background, texture
# outweighs form, and a small model learns little in minutes.
_EDGE, _SHADE, _FAINT_EDGE = 170, 60, 110


def _disc(radius: float) -> np.ndarray:
    angles = 2 * math.pi * np.arange(_ROUND) / _ROUND
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


def outline(name: str) -> list[np.ndarray]:
    """The polygons of a shape within the unit circle, (V, 2) floats each; the second is a hole.

    Raises:
        ValueError: no shape has this name.
    """
    if name == "circle":
        return [_disc(1.0)]
    if name == "ring":
        return [_disc(1.0), _disc(0.5)]
    if name == "triangle":
        angles = np.arange(3) * (2 * math.pi / 3) - math.pi / 2  # one corner up
        return [np.stack([np.cos(angles), np.sin(angles)], axis=1)]
    if name == "bar":
        return [np.array([(1.0, 0.5), (-1.0, 0.5), (-1.0, -0.5), (1.0, -0.5)])]
    if name == "cross":
        return [_cross()]
    if name == "arch":
        return [_arch()]
    raise ValueError(f"shape must be one of {SHAPE_CLASSES}, got {name!r}")


class ShapeSprites:
    """Shapes of all classes, equally likely."""

    classes = SHAPE_CLASSES

    def draw(self, draws: Draws, size: int) -> Sprite:
        category = draws.integer(0, len(self.classes) - 1)
        stretch = draws.log_uniform(1 / _STRETCH, _STRETCH)
        angle = draws.uniform(-_TILT, _TILT)
        cosine, sine = math.cos(angle), math.sin(angle)
        turn = np.array([[cosine * stretch, sine * stretch], [-sine, cosine]])
        polygons = [polygon @ turn for polygon in outline(self.classes[category])]

        low = polygons[0].min(axis=0)
        scale = size / (polygons[0].max(axis=0) - low).max()
        # From here on integers: the last bits of sine and cosine differ between machines.
        polygons = [to_fixed((polygon - low) * scale) for polygon in polygons]
        width, height = (-(-int(side) // UNIT) for side in polygons[0].max(axis=0))
        alpha = polygon_alpha(polygons, height, width)
        alpha, tone = trim(alpha, draw_texture(draws, height, width))
        return Sprite(category, alpha, tone)

    def palette(self, draws: Draws, backdrop: Colour) -> tuple[Colour, Colour]:
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


# Scenes call their splits as COCO does; the validation scenes show test articles.
_ARTICLES = {"train": "train", "val": "test"}
# Grey level from which a pixel counts as article. Below it lie halos left by the rescaling to
# 28 x 28 pixels; the darkest clothes start not far above.
_DARKEST = 16
# Enclosed dark spots up to this many pixels are prints and folds; larger ones are openings, such as
# the handle of a bag, and stay open.
_LARGEST_SPOT = 16
# An article that falls apart, its largest piece below this share of its pixels, is passed over.
# This concerns 1 in 100 articles: dark stripes, white soles.
_LEAST_PIECE = 0.8
_MOST_TURN = math.radians(20)
_FIXED = 2**16


def article_mask(grey: np.ndarray) -> Optional[np.ndarray]:
    """The pixels of the article in a 28 x 28 picture.

    The largest 4-connected piece of the pixels of grey level 16 and more, with holes of up to 16
    pixels filled.

    Args:
        grey: (h, w) uint8, black background.

    Returns:
        (h, w) bool, or None where the largest piece has less than 80 % of the pixels.
    """
    lit = (grey >= _DARKEST).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(lit, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < _LEAST_PIECE * areas.sum():
        return None
    # The border makes everything outside the article one piece, too large for a spot.
    mask = np.pad(labels == 1 + int(areas.argmax()), 1)
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    spot = stats[:, cv2.CC_STAT_AREA] <= _LARGEST_SPOT
    return (mask | spot[labels])[1:-1, 1:-1]


class FashionSprites:
    """Articles of one split, tinted, scaled and turned by up to 20 degrees."""

    classes = FASHION_CLASSES

    def __init__(self, split: str, folder: Optional[Union[str, Path]] = None) -> None:
        """
        Args:
            split: `"train"` shows the 60,000 training articles, `"val"` the 10,000 test articles.
            folder: see `load_fashion_mnist`.

        Raises:
            UserError: Fashion-MNIST is missing or damaged.
            ValueError: no such split.
        """
        if split not in _ARTICLES:
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")
        images, labels = load_fashion_mnist(_ARTICLES[split], folder)
        self._images = images
        self._labels = labels

    def draw(self, draws: Draws, size: int) -> Sprite:
        mask = None
        while mask is None:
            index = draws.integer(0, len(self._images) - 1)
            mask = article_mask(self._images[index])
        angle = draws.uniform(-_MOST_TURN, _MOST_TURN)
        alpha, tone = _turn(mask, self._images[index], size, angle)
        return Sprite(int(self._labels[index]), alpha, tone, source_index=index)

    def palette(self, draws: Draws, backdrop: Colour) -> tuple[Colour, Colour]:
        red, green, blue = tint = draw_colour(draws, backdrop, darkest=330)
        return (red // 4, green // 4, blue // 4), tint


def _turn(mask: np.ndarray, grey: np.ndarray, size: int, angle: float) -> tuple[np.ndarray, ...]:
    """Alpha and tone of an article, its turned frame `size` pixels long."""
    outline, grey = trim(mask.astype(np.uint8) * OPAQUE, grey)
    source_height, source_width = outline.shape
    cosine, sine = math.cos(angle), math.sin(angle)
    frame_width = abs(cosine) * source_width + abs(sine) * source_height
    frame_height = abs(sine) * source_width + abs(cosine) * source_height
    scale = size / max(frame_width, frame_height)
    # a margin of one pixel for the soft edge
    width = math.floor(frame_width * scale + 0.5) + 2
    height = math.floor(frame_height * scale + 0.5) + 2

    # result pixel -> source pixel: about the two centres, turned back and scaled down
    a, b = cosine / scale, sine / scale
    inverse = [
        [a, b, (source_width - 1) / 2 - a * (width - 1) / 2 - b * (height - 1) / 2],
        [-b, a, (source_height - 1) / 2 + b * (width - 1) / 2 - a * (height - 1) / 2],
    ]
    fixed = [[math.floor(value * _FIXED + 0.5) for value in line] for line in inverse]
    # Grey is interpolated within the article only: weighted by alpha, then divided by it.
    weighted = np.where(outline > 0, grey, 0).astype(np.uint8)
    alpha, tone = resample(np.stack([outline, weighted]), height, width, fixed)
    tone = np.minimum(tone.astype(np.int32) * OPAQUE // np.maximum(alpha, 1), OPAQUE)
    return trim(alpha, tone.astype(np.uint8))
