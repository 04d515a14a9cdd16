"""Random draws and drawing, the same on every machine and with every version of every library.

numpy guarantees that the raw output of `PCG64` and of `SeedSequence` never changes, but not the
methods of `Generator` (NEP 19, "Random Number Generator Policy"), and drawing routines of image
libraries change between versions and instruction sets. Scenes are therefore drawn from the raw
output, with integer arithmetic; exact comparison decides whether a pixel belongs to a mask.

Coordinates are fixed-point, `UNIT` steps per pixel; pixel (row r, column c) covers
[c, c + 1) x [r, r + 1) pixels, with its centre at (c + 1/2, r + 1/2).
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import TypeVar

import numpy as np

T = TypeVar("T")

UNIT = 256
# Samples per pixel and axis; the alpha of an edge pixel has SUPERSAMPLE**2 + 1 levels.
SUPERSAMPLE = 4
OPAQUE = 255

TEXTURES = ("plain", "gradient", "stripes", "checker", "dots")
# Fractional bits of rotated texture coordinates.
_BITS = 10


class Draws:
    """A stream of random draws that depends only on its seed words."""

    def __init__(self, *seed_words: int) -> None:
        """
        Args:
            seed_words: integers in [0, 2**32); streams with different words are independent.
        """
        # SeedSequence does not distinguish (1,) and (1, 0); the number of words does.
        self._bits = np.random.PCG64(np.random.SeedSequence((len(seed_words), *seed_words)))

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included, less than 2**31 apart.

        Scaling 32 random bits makes probabilities differ by at most 2**-32.
        """
        return low + ((int(self._bits.random_raw()) >> 32) * (high - low + 1) >> 32)

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high), from 53 random bits."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def log_uniform(self, low: float, high: float) -> float:
        """A float in [low, high) whose logarithm is uniform."""
        return low * (high / low) ** self.uniform(0.0, 1.0)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def noise(self, amplitude: int, shape: tuple[int, ...]) -> np.ndarray:
        """Integers in [-amplitude, amplitude], int16, `amplitude` <= 127.

        Each value is made from one random byte, so probabilities differ by up to 1/256.
        """
        count = int(np.prod(shape))
        words = self._bits.random_raw(-(-count // 8))
        # "<u8": little-endian on every machine
        octets = words.astype("<u8").view(np.uint8)[:count].reshape(shape).astype(np.uint16)
        return ((octets * np.uint16(2 * amplitude + 1)) >> 8).astype(np.int16) - np.int16(amplitude)


def to_fixed(points: np.ndarray) -> np.ndarray:
    """Rounds coordinates in pixels to fixed-point integers (int64)."""
    return np.floor(np.asarray(points, dtype=np.float64) * UNIT + 0.5).astype(np.int64)


def polygon_alpha(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """The share of each pixel inside the polygons, by the even-odd rule.

    A point is inside if a ray from it crosses the outlines an odd number of times, so a polygon
    within another is a hole. Each pixel is sampled at `SUPERSAMPLE` x `SUPERSAMPLE` points.

    Args:
        polygons: each (V, 2) fixed-point x, y, closed implicitly; may extend beyond the canvas.
        height, width: of the canvas, in pixels.

    Returns:
        (height, width) uint8, 0 outside to 255 inside.
    """
    step = UNIT // SUPERSAMPLE
    rows, columns = height * SUPERSAMPLE, width * SUPERSAMPLE
    start = np.concatenate([np.asarray(polygon, dtype=np.int64) for polygon in polygons])
    end = np.concatenate([np.roll(np.asarray(p, dtype=np.int64), -1, axis=0) for p in polygons])
    upward = start[:, 1] > end[:, 1]
    start, end = (
        np.where(upward[:, None], end, start),
        np.where(upward[:, None], start, end),
    )
    sample_y = np.arange(rows, dtype=np.int64) * step + step // 2

    # An edge crosses the sample row y if y0 <= y < y1: half open, so a vertex counts once.
    edge, row = np.nonzero(
        (start[:, 1, None] <= sample_y[None, :]) & (sample_y[None, :] < end[:, 1, None])
    )
    run = end[edge, 0] - start[edge, 0]
    rise = end[edge, 1] - start[edge, 1]
    # First sample column at or right of the crossing: ceil((x - step / 2) / step), exact.
    numerator = (start[edge, 0] - step // 2) * rise + (sample_y[row] - start[edge, 1]) * run
    column = np.clip(-(-numerator // (step * rise)), 0, columns)

    toggles = np.zeros((rows, columns + 1), dtype=np.uint8)
    np.bitwise_xor.at(toggles, (row, column), np.uint8(1))
    inside = np.bitwise_xor.accumulate(toggles, axis=1)[:, :columns]
    # at most 16, which fits a byte; strided sums are several times faster than a sum over axes
    lines = reduce(np.add, (inside[k::SUPERSAMPLE] for k in range(SUPERSAMPLE)))
    count = reduce(np.add, (lines[:, k::SUPERSAMPLE] for k in range(SUPERSAMPLE))).astype(np.int32)
    samples = SUPERSAMPLE**2
    return ((count * OPAQUE + samples // 2) // samples).astype(np.uint8)


def resample(
    planes: np.ndarray, height: int, width: int, inverse: Sequence[Sequence[int]]
) -> np.ndarray:
    """Bilinear interpolation under an affine map, zero outside the source.

    Args:
        planes: (C, h, w) uint8 source planes.
        height, width: of the result, in pixels.
        inverse: 2 x 3 integers in 1/65536: maps result pixel indices (column, row, 1) to source
            pixel indices (column, row). Indices refer to pixel centres.

    Returns:
        (C, height, width) uint8.
    """
    (a, b, tx), (c, d, ty) = ([int(value) for value in line] for line in inverse)
    column = np.arange(width, dtype=np.int64)[None, :]
    row = np.arange(height, dtype=np.int64)[:, None]
    # 8 fractional bits suffice for 8-bit planes and keep every product below 2**24.
    x = (column * a + row * b + tx) >> 8
    y = (column * c + row * d + ty) >> 8
    # Pixels outside the source are zero.
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1))).astype(np.int32)
    limit_y, limit_x = padded.shape[1] - 2, padded.shape[2] - 2
    x = np.clip(x + 256, 0, limit_x * 256 + 255)
    y = np.clip(y + 256, 0, limit_y * 256 + 255)
    left, top = x >> 8, y >> 8
    fx, fy = (x & 255).astype(np.int32), (y & 255).astype(np.int32)
    upper = padded[:, top, left] * (256 - fx) + padded[:, top, left + 1] * fx
    lower = padded[:, top + 1, left] * (256 - fx) + padded[:, top + 1, left + 1] * fx
    return ((upper * (256 - fy) + lower * fy + 2**15) >> 16).astype(np.uint8)


def enlarge(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear enlargement of a coarse grid, with aligned corners.

    Args:
        grid: (h, w, C) integers in [0, 255], h and w at least 2.
        height, width: of the result, in pixels.

    Returns:
        (height, width, C) int32 in [0, 255].
    """

    def weights(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
        position = np.arange(size, dtype=np.int64) * ((cells - 1) * UNIT) // max(size - 1, 1)
        index = np.minimum(position // UNIT, cells - 2)
        return index, (position - index * UNIT).astype(np.int32)

    grid = grid.astype(np.int32)
    top, fy = weights(height, grid.shape[0])
    left, fx = weights(width, grid.shape[1])
    fy, fx = fy[:, None, None], fx[None, :, None]
    tall = grid[top] * (UNIT - fy) + grid[top + 1] * fy
    return (tall[:, left] * (UNIT - fx) + tall[:, left + 1] * fx) // UNIT**2


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colours between `first` and `second`: (s * second + (255 - s) * first) / 255, rounded.

    Args:
        first, second: (h, w, 3) or (3,) integers in [0, 255].
        share: (h, w) uint8, of `second`.

    Returns:
        (h, w, 3) int32.
    """
    s = share.astype(np.int32)[:, :, None]
    mixed = (OPAQUE - s) * np.asarray(first, np.int32) + s * np.asarray(second, np.int32)
    return (mixed + OPAQUE // 2) // OPAQUE


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


def paste(canvas: np.ndarray, colour: np.ndarray, alpha: np.ndarray, top: int, left: int) -> None:
    """Blends a piece into the canvas, in place; the part beyond its border is cropped.

    Args:
        canvas: (H, W, 3) uint8.
        colour: (h, w, 3) or (3,) integers in [0, 255].
        alpha: (h, w) uint8.
        top: canvas row of the piece's first row, may be negative.
        left: canvas column of the piece's first column, may be negative.
    """
    inside, piece = overlap(canvas.shape[:2], alpha.shape, top, left)
    colour = colour[piece] if colour.ndim == 3 else colour
    canvas[inside] = mix(canvas[inside], colour, alpha[piece])


def draw_texture(draws: Draws, height: int, width: int) -> np.ndarray:
    """A two-tone texture of random type, direction, period and phase.

    The period is 1/5 to 1/2 of the longer side and at least 6 pixels, so that it is visible.

    Returns:
        (height, width) uint8 tone: 0 is one colour, 255 the other.
    """
    kind = draws.choice(TEXTURES)
    angle = draws.uniform(0.0, math.pi)
    period = max(6.0, max(height, width) * draws.uniform(0.2, 0.5))
    phase_u, phase_v = draws.integer(0, 2**16), draws.integer(0, 2**16)
    if kind == "plain":
        return np.zeros((height, width), dtype=np.uint8)

    # In units of 2**-_BITS pixels; all that follows is integer arithmetic.
    cosine = math.floor(math.cos(angle) * 2**_BITS + 0.5)
    sine = math.floor(math.sin(angle) * 2**_BITS + 0.5)
    step = math.floor(period * 2**_BITS + 0.5)
    column = np.arange(width, dtype=np.int64)[None, :]
    row = np.arange(height, dtype=np.int64)[:, None]
    u = column * cosine + row * sine
    v = row * cosine - column * sine
    if kind == "gradient":
        low, high = int(u.min()), int(u.max())
        return ((u - low) * 255 // max(high - low, 1)).astype(np.uint8)

    u = (u + phase_u * step // 2**16) % step
    if kind == "stripes":
        lit = u * 2 < step
    else:
        v = (v + phase_v * step // 2**16) % step
        if kind == "checker":
            lit = (u * 2 < step) ^ (v * 2 < step)
        else:
            # dots of radius 0.32 periods cover about a third of the area
            lit = ((u - step // 2) ** 2 + (v - step // 2) ** 2) * 10 < step**2
    return np.where(lit, 255, 0).astype(np.uint8)
