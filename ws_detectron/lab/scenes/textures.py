"""Two-tone textures, independent of the class of what they cover."""

import math

import numpy as np

from .draws import Draws

TEXTURES = ("plain", "gradient", "stripes", "checker", "dots")
# Fixed-point bits of the rotated coordinates.
_BITS = 10


def draw_texture(draws: Draws, height: int, width: int) -> np.ndarray:
    """A texture of random kind, direction, period and phase.

    The period is 1/5 to 1/2 of the longer side and at least 6 pixels, so that it can be seen.

    Returns:
        (height, width) uint8 tone: 0 stands for one colour, 255 for the other.
    """
    kind = draws.choice(TEXTURES)
    angle = draws.uniform(0.0, math.pi)
    period = max(6.0, max(height, width) * draws.uniform(0.2, 0.5))
    phase_u, phase_v = draws.integer(0, 2**16), draws.integer(0, 2**16)
    if kind == "plain":
        return np.zeros((height, width), dtype=np.uint8)

    # One fixed-point unit is 2**-_BITS pixels; rounding here once leaves only integers below.
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
