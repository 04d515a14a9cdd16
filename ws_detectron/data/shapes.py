"""Drawn shapes as sprites: no data needed.

Colour, texture and tilt are independent of the class, and the outline is stretched mildly, so only
the form tells the classes apart.
"""

import math

import numpy as np

from .draws import Draws
from .raster import UNIT, polygon_alpha, to_fixed
from .sprites import Colour, Sprite, distance, draw_colour, trim
from .textures import draw_texture

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
