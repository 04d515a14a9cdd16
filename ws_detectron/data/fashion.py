"""Fashion-MNIST articles as sprites: real pictures of ten classes of clothing."""

import math
from pathlib import Path
from typing import Optional, Union

import cv2
import numpy as np

from .draws import Draws
from .fashion_mnist import FASHION_CLASSES, load_fashion_mnist
from .raster import OPAQUE, resample
from .sprites import Colour, Sprite, draw_colour, trim

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
