"""Drawing in integer arithmetic.

Exact integer comparison decides whether a pixel belongs to a mask, so the same input gives the same
pixels with every build of every library. Drawing routines of image libraries change between
versions and instruction sets.

Coordinates are fixed-point, `UNIT` steps per pixel; pixel (row r, column c) covers
[c, c + 1) x [r, r + 1) pixels, with its centre at (c + 1/2, r + 1/2).
"""

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from .draws import Draws

UNIT = 256
# Samples per pixel and axis; the alpha of an edge pixel has SUPERSAMPLE**2 + 1 levels.
SUPERSAMPLE = 4
OPAQUE = 255

TEXTURES = ("plain", "gradient", "stripes", "checker", "dots")
# Fractional bits of rotated texture coordinates.
_BITS = 10


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


def blend(canvas: np.ndarray, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blends `colours` over `canvas`: (a * colour + (255 - a) * canvas) / 255, rounded.

    Args:
        canvas: (H, W, 3) uint8.
        colours: (H, W, 3) or (3,) integers in [0, 255].
        alpha: (H, W) uint8.

    Returns:
        (H, W, 3) uint8.
    """
    a = alpha.astype(np.int32)[:, :, None]
    mixed = a * colours.astype(np.int32) + (OPAQUE - a) * canvas.astype(np.int32)
    return ((mixed + OPAQUE // 2) // OPAQUE).astype(np.uint8)


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
