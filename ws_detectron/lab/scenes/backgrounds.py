"""Background, distractors and grain of a scene."""

import math

import numpy as np

from .draws import Draws
from .raster import (
    OPAQUE,
    UNIT,
    blend,
    draw_texture,
    enlarge,
    polygon_alpha,
    to_fixed,
)
from .sprites import Colour, draw_colour

# Larger images get coarser grain, so that their files do not consist of noise.
_FINE_GRAIN = 256


def draw_background(draws: Draws, size: int) -> np.ndarray:
    """A smooth gradient of similar colours, (size, size, 3) uint8."""
    rows, columns = draws.integer(2, 5), draws.integer(2, 5)
    base = draw_colour(draws)
    grid = np.array(base, dtype=np.int16) + draws.noise(60, (rows, columns, 3))
    return enlarge(np.clip(grid, 0, 255), size, size).astype(np.uint8)


def draw_distractor(draws: Draws, canvas: np.ndarray) -> None:
    """Draws something that is not annotated, in place.

    A thin line, a soft blob of one colour, or a soft patch of texture; none has the hard closed
    outline of an object.
    """
    size = len(canvas)
    kind = draws.choice(("line", "blob", "patch"))
    if kind == "line":
        colour = np.array(draw_colour(draws))
        alpha, top, left = _line(draws, size)
    else:
        height = max(4, int(size * draws.uniform(0.08, 0.35)))
        width = max(4, int(size * draws.uniform(0.08, 0.35)))
        top, left = draws.integer(-height // 2, size), draws.integer(-width // 2, size)
        alpha = _soft_ellipse(height, width)
        first, second = draw_colour(draws), draw_colour(draws)
        if kind == "patch":
            colour = mix(first, second, draw_texture(draws, height, width))
        else:
            colour = np.array(first)
    paste(canvas, colour, alpha, top, left)


def add_grain(draws: Draws, canvas: np.ndarray, amplitude: int) -> np.ndarray:
    """A new image with uniform noise of up to `amplitude` grey levels in each channel.

    A grain is 1 pixel wide in images of up to 511 pixels, then 2 pixels, from 768 on 3, ...
    """
    size = len(canvas)
    grain = max(1, size // _FINE_GRAIN)
    cells = -(-size // grain)
    noise = draws.noise(amplitude, (cells, cells, 3))
    noise = noise.repeat(grain, axis=0).repeat(grain, axis=1)[:size, :size]
    return np.clip(canvas.astype(np.int16) + noise, 0, 255).astype(np.uint8)


def mix(first: Colour, second: Colour, tone: np.ndarray) -> np.ndarray:
    """Colours between `first` (tone 0) and `second` (tone 255), (h, w, 3) int32."""
    t = tone.astype(np.int32)[:, :, None]
    blended = (OPAQUE - t) * np.array(first, np.int32) + t * np.array(second, np.int32)
    return (blended + OPAQUE // 2) // OPAQUE


def paste(canvas: np.ndarray, colour: np.ndarray, alpha: np.ndarray, top: int, left: int) -> None:
    """Blends a piece into the canvas, in place; the part beyond its border is cropped.

    Args:
        canvas: (H, W, 3) uint8.
        colour: (h, w, 3) or (3,).
        alpha: (h, w) uint8.
        top: canvas row of the piece's first row, may be negative.
        left: canvas column of the piece's first column, may be negative.
    """
    inside, piece = overlap(canvas.shape[:2], alpha.shape, top, left)
    colour = colour[piece] if colour.ndim == 3 else colour
    canvas[inside] = blend(canvas[inside], colour, alpha[piece])


def overlap(
    canvas: tuple[int, ...], piece: tuple[int, ...], top: int, left: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The overlap of the canvas and a piece at (top, left), as slices of each."""
    row, column = max(top, 0), max(left, 0)
    bottom = max(min(top + piece[0], canvas[0]), row)
    right = max(min(left + piece[1], canvas[1]), column)
    return (
        (slice(row, bottom), slice(column, right)),
        (slice(row - top, bottom - top), slice(column - left, right - left)),
    )


def _line(draws: Draws, size: int) -> tuple[np.ndarray, int, int]:
    """A straight line, 1 to 2.5 % of the image size and at least 1 pixel wide: alpha, top, left."""
    x, y = draws.uniform(0, size), draws.uniform(0, size)
    length = size * draws.uniform(0.2, 0.9)
    half = max(1.0, size * draws.uniform(0.01, 0.025)) / 2
    angle = draws.uniform(0.0, 2 * math.pi)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]]) * half
    end = np.array([x, y]) + along * length
    corners = to_fixed(np.array([[x, y] - across, [x, y] + across, end + across, end - across]))
    left, top = (int(low) // UNIT for low in corners.min(axis=0))
    width, height = (
        -(-int(high) // UNIT) - low for high, low in zip(corners.max(axis=0), (left, top))
    )
    return polygon_alpha([corners - np.array([left, top]) * UNIT], height, width), top, left


def _soft_ellipse(height: int, width: int) -> np.ndarray:
    """Alpha that falls from 255 in the centre to 0 at an upright ellipse that fills the frame."""
    y = (2 * np.arange(height, dtype=np.int64) + 1 - height)[:, None]
    x = (2 * np.arange(width, dtype=np.int64) + 1 - width)[None, :]
    away = y * y * OPAQUE // height**2 + x * x * OPAQUE // width**2
    return np.maximum(OPAQUE - away, 0).astype(np.uint8)
