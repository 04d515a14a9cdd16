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

from .raster import (
    OPAQUE,
    UNIT,
    Draws,
    draw_texture,
    enlarge,
    mix,
    overlap,
    paste,
    polygon_alpha,
    to_fixed,
)
from .sprites import FashionSprites, ShapeSprites, Sprite, SpriteSource, draw_colour

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
# Larger images get coarser grain, so that their files do not consist of noise.
_FINE_GRAIN = 256


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
        return ShapeSprites.classes if self.kind == "shapes" else FashionSprites.classes

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
    """
    draws = Draws(
        GENERATOR_VERSION, spec.seed, KINDS.index(spec.kind), SPLITS.index(spec.split), index
    )
    size = spec.image_size
    canvas = draw_background(draws, size)
    for _ in range(draws.integer(*spec.distractors)):
        draw_distractor(draws, canvas)

    owner = np.zeros((size, size), dtype=np.uint8)  # 0: background, n: the n-th object placed
    placed: list[Sprite] = []
    full = visible = np.zeros(0, np.int64)  # pixels of each
    for _ in range(draws.integer(*spec.objects)):
        side = math.floor(size * draws.log_uniform(*spec.object_scale) + 0.5)
        sprite = source.draw(draws, side)
        position = _find_position(draws, sprite.mask, owner, full, visible, spec.min_visible)
        if position is None:
            continue
        top, left = position
        inside, piece = overlap(owner.shape, sprite.alpha.shape, top, left)
        backdrop = canvas[inside].reshape(-1, 3).sum(axis=0, dtype=np.int64)
        red, green, blue = (int(s) // canvas[inside][:, :, 0].size for s in backdrop)
        dark, bright = map(np.array, source.palette(draws, (red, green, blue)))
        paste(canvas, mix(dark, bright, sprite.tone), sprite.alpha, top, left)

        placed.append(sprite)
        shown = sprite.mask[piece]
        visible = np.append(visible - _hidden(owner[inside][shown], len(visible)), shown.sum())
        full = np.append(full, sprite.mask.sum())
        owner[inside][shown] = len(placed)

    image = add_grain(draws, canvas, spec.noise)
    objects = [
        SceneObject(sprite.category, owner == number, int(area), sprite.source_index)
        for number, (sprite, area) in enumerate(zip(placed, full), start=1)
    ]
    return Scene(image, objects)


def _find_position(
    draws: Draws,
    mask: np.ndarray,
    owner: np.ndarray,
    full: np.ndarray,
    visible: np.ndarray,
    min_visible: float,
) -> Optional[tuple[int, int]]:
    """Row and column of a sprite's top left corner; None if all positions tried are rejected.

    The first object always gets a position.
    """
    height, width = mask.shape
    over_y, over_x = int(height * _OVERHANG), int(width * _OVERHANG)
    for _ in range(_TRIES):
        top = draws.integer(-over_y, max(len(owner) - height, 0) + over_y)
        left = draws.integer(-over_x, max(len(owner) - width, 0) + over_x)
        inside, piece = overlap(owner.shape, mask.shape, top, left)
        shown = mask[piece]
        left_visible = visible - _hidden(owner[inside][shown], len(visible))
        if shown.sum() >= min_visible * mask.sum() and (left_visible >= min_visible * full).all():
            return top, left
    if len(full):
        return None
    # No image is empty: an object that fits nowhere is centred.
    return (len(owner) - height) // 2, (len(owner) - width) // 2


def _hidden(covered: np.ndarray, count: int) -> np.ndarray:
    """Number of pixels that each of the objects placed has among `covered` ones of `owner`."""
    return np.bincount(covered, minlength=count + 1)[1:]


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
        colour, second = np.array(draw_colour(draws)), np.array(draw_colour(draws))
        if kind == "patch":
            colour = mix(colour, second, draw_texture(draws, height, width))
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
