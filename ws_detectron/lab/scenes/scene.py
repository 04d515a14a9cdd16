"""Scenes: images with several objects whose masks are exact to the pixel.

A scene depends only on its `SceneSpec` and its index, so scenes can be made in any order and by any
number of processes. Colours and masks come from integer arithmetic on random numbers that numpy
keeps stable; sines, cosines and powers are rounded before they affect a pixel.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist.files import FASHION_CLASSES

from .backgrounds import (
    add_grain,
    draw_background,
    draw_distractor,
    mix,
    overlap,
    paste,
)
from .draws import Draws
from .sprites import SHAPE_CLASSES, FashionSprites, ShapeSprites, Sprite, SpriteSource

# Part of the fingerprint of every set: raise it with any change to pixels or annotations.
GENERATOR_VERSION = 7

KINDS = ("shapes", "fashion")
SPLITS = ("train", "val")
# Pixels; the outlines of smaller objects do not show their class.
LEAST_OBJECT = 12
# Number of positions tried for an object before it is dropped.
_TRIES = 20
# An object may extend beyond the image border by this share of its own side.
_OVERHANG = 0.15
# Least image size, objects per image, least visible share, training images, validation images.
_BY_SIZE: tuple[tuple[int, tuple[int, int], float, int, int], ...] = (
    (800, (4, 16), 0.8, 4000, 500),
    (512, (3, 12), 0.8, 4000, 500),
    (256, (2, 8), 0.8, 2000, 200),
    (0, (3, 6), 0.9, 2000, 200),
)


@dataclass(frozen=True)
class SceneSpec:
    """All parameters of a set of scenes.

    Raises:
        UserError: a value is outside its range; names the field.
    """

    kind: str = "shapes"  # "shapes" (drawn) or "fashion" (Fashion-MNIST articles)
    split: str = "train"  # "train" or "val": different seeds and, for fashion, different articles
    image_size: int = 128  # height and width, pixels
    num_images: int = 2000
    # Least and most objects per image; fewer if there is no room for more.
    objects: tuple[int, int] = (3, 6)
    # Longer side of an object as a share of the image size, log-uniform.
    object_scale: tuple[float, float] = (0.21875, 0.5)
    # Least share of an object's pixels that other objects and the image border leave visible.
    min_visible: float = 0.9
    distractors: tuple[int, int] = (1, 4)  # least and most per image, never annotated
    noise: int = 10  # largest absolute value of the grain, grey levels
    seed: int = 0

    def __post_init__(self) -> None:
        def check(field: str, fine: bool, allowed: str) -> None:
            if not fine:
                raise UserError(f"scenes: {field} must be {allowed}, got {getattr(self, field)!r}")

        check("kind", self.kind in KINDS, f"one of {', '.join(KINDS)}")
        check("split", self.split in SPLITS, f"one of {', '.join(SPLITS)}")
        check("image_size", 32 <= self.image_size <= 4096, "in [32, 4096] pixels")
        check("num_images", 1 <= self.num_images <= 999_999, "in [1, 999999]")
        low, high = self.objects
        check("objects", 1 <= low <= high <= 255, "least and most, 1 <= least <= most <= 255")
        small, large = self.object_scale
        least = LEAST_OBJECT / self.image_size
        check(
            "object_scale",
            least <= small <= large <= 1.0,
            f"least and most, {least:.3g} ({LEAST_OBJECT} pixels) <= least <= most <= 1",
        )
        check("min_visible", 0.0 < self.min_visible <= 1.0, "in (0, 1]")
        low, high = self.distractors
        check("distractors", 0 <= low <= high <= 255, "least and most, 0 <= least <= most <= 255")
        check("noise", 0 <= self.noise <= 127, "in [0, 127]")
        check("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")

    @classmethod
    def for_size(
        cls, kind: str = "shapes", image_size: int = 128, split: str = "train", **changes: Any
    ) -> "SceneSpec":
        """A spec with defaults for the image size.

        The smallest objects are 28 pixels or 3.5 % of the image, whichever is larger: as in
        photographs, larger images have a wider range of scales and more objects. At 128 pixels, a
        small detector learns the shapes from scratch within minutes on a CPU.

        Args:
            kind: `"shapes"` or `"fashion"`.
            image_size: height and width, pixels.
            split: `"train"` or `"val"`.
            changes: values of other fields.

        Raises:
            UserError: a value is outside its range.
        """
        objects, visible, train, val = next(row[1:] for row in _BY_SIZE if image_size >= row[0])
        defaults: dict[str, Any] = {
            "num_images": val if split == "val" else train,
            "objects": objects,
            "object_scale": (min(0.5, max(0.035, 28 / max(image_size, 1))), 0.5),
            "min_visible": visible,
        }
        return cls(kind=kind, image_size=image_size, split=split, **{**defaults, **changes})

    @property
    def classes(self) -> tuple[str, ...]:
        return SHAPE_CLASSES if self.kind == "shapes" else FASHION_CLASSES

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


@dataclass(frozen=True)
class SceneObject:
    """One annotated object."""

    category: int  # index into the classes of the spec
    mask: np.ndarray  # (H, W) bool, the visible pixels
    full_area: int  # pixels of the whole object, including those hidden or beyond the border
    source_index: Optional[int] = None  # of the article in its split of Fashion-MNIST, if any

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x, y, width, height in pixels: the tightest box around the visible pixels.

        It encloses whole pixels: that of a single pixel at column 3, row 5 is (3, 5, 1, 1).
        """
        columns = np.flatnonzero(self.mask.any(axis=0))
        rows = np.flatnonzero(self.mask.any(axis=1))
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y

    @property
    def area(self) -> int:
        """The number of visible pixels."""
        return int(np.count_nonzero(self.mask))


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (H, W, 3) uint8, RGB
    objects: list[SceneObject]  # from back to front


@dataclass
class _Placed:
    sprite: Sprite
    full_area: int
    visible: int


def sprite_source(spec: SceneSpec) -> SpriteSource:
    """The source of a spec's sprites.

    Raises:
        UserError: Fashion-MNIST is needed, but missing or damaged.
    """
    return ShapeSprites() if spec.kind == "shapes" else FashionSprites(spec.split)


def make_scene(spec: SceneSpec, index: int, source: SpriteSource) -> Scene:
    """Makes one scene.

    Objects are drawn one over the other. A position is rejected if less than `min_visible` of the
    new object or of an earlier one would be visible.

    Args:
        spec: parameters of the set.
        index: of the scene, in [0, num_images).
        source: as returned by `sprite_source(spec)`.

    Raises:
        ValueError: index out of range.
    """
    if not 0 <= index < spec.num_images:
        raise ValueError(f"index must be in [0, {spec.num_images}), got {index}")
    draws = Draws(
        GENERATOR_VERSION, spec.seed, KINDS.index(spec.kind), SPLITS.index(spec.split), index
    )
    size = spec.image_size
    canvas = draw_background(draws, size)
    for _ in range(draws.integer(*spec.distractors)):
        draw_distractor(draws, canvas)

    owner = np.zeros((size, size), dtype=np.uint8)  # 0: background, n: the n-th object placed
    placed: list[_Placed] = []
    for _ in range(draws.integer(*spec.objects)):
        side = math.floor(size * draws.log_uniform(*spec.object_scale) + 0.5)
        sprite = source.draw(draws, side)
        position = _find_position(draws, sprite, owner, placed, spec.min_visible)
        if position is None:
            continue
        top, left = position
        inside, piece = overlap(owner.shape, sprite.alpha.shape, top, left)
        backdrop = canvas[inside].reshape(-1, 3).sum(axis=0, dtype=np.int64)
        red, green, blue = (int(s) // canvas[inside][:, :, 0].size for s in backdrop)
        first, second = source.palette(draws, (red, green, blue))
        paste(canvas, mix(first, second, sprite.tone), sprite.alpha, top, left)

        mask = sprite.mask
        hidden = np.bincount(owner[inside][mask[piece]], minlength=len(placed) + 1)
        for number, earlier in enumerate(placed, start=1):
            earlier.visible -= int(hidden[number])
        owner[inside][mask[piece]] = len(placed) + 1
        placed.append(_Placed(sprite, int(mask.sum()), int(mask[piece].sum())))

    image = add_grain(draws, canvas, spec.noise)
    objects = [
        SceneObject(p.sprite.category, owner == number, p.full_area, p.sprite.source_index)
        for number, p in enumerate(placed, start=1)
    ]
    return Scene(image, objects)


def _find_position(
    draws: Draws, sprite: Sprite, owner: np.ndarray, placed: list[_Placed], min_visible: float
) -> Optional[tuple[int, int]]:
    """Row and column of the sprite's top left corner; None if all positions tried are rejected.

    The first object always gets a position.
    """
    mask = sprite.mask
    height, width = mask.shape
    full_area = int(mask.sum())
    over_y, over_x = int(height * _OVERHANG), int(width * _OVERHANG)
    for _ in range(_TRIES):
        top = draws.integer(-over_y, max(len(owner) - height, 0) + over_y)
        left = draws.integer(-over_x, max(len(owner) - width, 0) + over_x)
        inside, piece = overlap(owner.shape, mask.shape, top, left)
        shown = mask[piece]
        if shown.sum() < min_visible * full_area:
            continue
        hidden = np.bincount(owner[inside][shown], minlength=len(placed) + 1)
        if all(
            earlier.visible - hidden[number] >= min_visible * earlier.full_area
            for number, earlier in enumerate(placed, start=1)
        ):
            return top, left
    if placed:
        return None
    # No image is empty: an object that fits nowhere is centred.
    return (len(owner) - height) // 2, (len(owner) - width) // 2
