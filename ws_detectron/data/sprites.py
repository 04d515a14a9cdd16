"""Sprites: the single objects that scenes are made of."""

from dataclasses import dataclass
from typing import Optional, Protocol

import numpy as np

from .draws import Draws

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
