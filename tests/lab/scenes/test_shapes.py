import numpy as np
import pytest

from ws_detectron.lab.scenes.draws import Draws
from ws_detectron.lab.scenes.sprites import SHAPE_CLASSES, ShapeSprites, distance, outline


def polygon_area(points: np.ndarray) -> float:
    """Shoelace formula."""
    x, y = points.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


# Areas in closed form: a disc of radius 1; that less one of radius 0.5; an equilateral triangle
# within the unit circle; half of a square of side 2; five of its nine ninths; half of a disc of
# radius 1 less half of one of radius 0.4.
AREAS = {
    "circle": np.pi,
    "ring": np.pi * (1 - 0.5**2),
    "triangle": 3 * np.sqrt(3) / 4,
    "bar": 2.0,
    "cross": 4 * 5 / 9,
    "arch": np.pi / 2 * (1 - 0.4**2),
}


@pytest.mark.parametrize("name", sorted(AREAS))
def test_outlines_have_the_area_of_their_form(name: str) -> None:
    outer, *holes = outline(name)
    area = polygon_area(outer) - sum(polygon_area(hole) for hole in holes)
    # 64 corners fall short of a circle's area by 1 - sin(2 pi / 64) / (2 pi / 64) = 0.16 %
    assert area == pytest.approx(AREAS[name], rel=2e-3)


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="circle.*'hexagon'"):
        outline("hexagon")


@pytest.mark.parametrize("size", [12, 37, 200])
def test_sprites_have_the_size_asked_for_and_are_tight(size: int) -> None:
    source, draws = ShapeSprites(), Draws(5, size)
    for _ in range(40):
        sprite = source.draw(draws, size)
        assert sprite.alpha.dtype == sprite.tone.dtype == np.uint8
        assert sprite.alpha.shape == sprite.tone.shape
        # the corner of a triangle may cover too little of the last pixel
        assert size - 2 <= max(sprite.alpha.shape) <= size
        for edge in (sprite.alpha[0], sprite.alpha[-1], sprite.alpha[:, 0], sprite.alpha[:, -1]):
            assert edge.any()


def test_stretch_is_mild() -> None:
    # the axes of an ellipse are to each other as the square roots of its principal moments
    source, draws, ratios = ShapeSprites(), Draws(6), []
    while len(ratios) < 60:
        sprite = source.draw(draws, 60)
        if SHAPE_CLASSES[sprite.category] == "circle":
            short, long = np.linalg.eigvalsh(np.cov(np.nonzero(sprite.mask)))
            ratios.append(np.sqrt(long / short))
    assert min(ratios) < 1.05 and 1.2 < max(ratios) < 1.32


def test_every_class_appears_and_tone_does_not_depend_on_it() -> None:
    source, draws = ShapeSprites(), Draws(11)
    sprites = [source.draw(draws, 40) for _ in range(600)]
    counts = np.bincount([s.category for s in sprites], minlength=len(SHAPE_CLASSES))
    # 75 expected, standard deviation 8
    assert counts.min() > 35 and counts.max() < 115
    for category in range(len(SHAPE_CLASSES)):
        plain = [not s.tone.any() for s in sprites if s.category == category]
        # one texture in five is plain; at least one of each sort in 35 but for 1 case in 2000
        assert 0 < sum(plain) < len(plain)


def test_outline_stands_out_more_than_texture() -> None:
    source, draws = ShapeSprites(), Draws(2)
    shades = []
    for backdrop in ((0, 0, 0), (128, 128, 128), (255, 255, 255), (255, 0, 128)):
        for _ in range(50):
            first, second = source.palette(draws, backdrop)
            assert distance(first, backdrop) >= 170
            assert distance(second, backdrop) >= 110
            assert max(abs(p - q) for p, q in zip(first, second)) <= 60
            shades.append(distance(first, second))
    # three channels that differ by 30 on average
    assert 70 < np.mean(shades) < 110
