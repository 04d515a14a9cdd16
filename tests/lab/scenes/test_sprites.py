from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from ws_detectron.lab.fashion_mnist.files import FASHION_CLASSES, load_fashion_mnist
from ws_detectron.lab.scenes.raster import Draws
from ws_detectron.lab.scenes.sprites import (
    OUTLINES,
    FashionSprites,
    ShapeSprites,
    article_mask,
    distance,
)


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
    outer, *holes = OUTLINES[name]
    area = polygon_area(outer) - sum(polygon_area(hole) for hole in holes)
    # 64 corners fall short of a circle's area by 1 - sin(2 pi / 64) / (2 pi / 64) = 0.16 %
    assert area == pytest.approx(AREAS[name], rel=2e-3)


@pytest.mark.parametrize("size", [12, 37, 200])
def test_shapes_have_the_size_asked_for_and_are_tight(size: int) -> None:
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
        if ShapeSprites.classes[sprite.category] == "circle":
            short, long = np.linalg.eigvalsh(np.cov(np.nonzero(sprite.mask)))
            ratios.append(np.sqrt(long / short))
    assert min(ratios) < 1.05 and 1.2 < max(ratios) < 1.32


def test_every_class_appears_and_tone_does_not_depend_on_it() -> None:
    source, draws = ShapeSprites(), Draws(11)
    sprites = [source.draw(draws, 40) for _ in range(600)]
    counts = np.bincount([s.category for s in sprites], minlength=len(ShapeSprites.classes))
    # 75 expected, standard deviation 8
    assert counts.min() > 35 and counts.max() < 115
    for category in range(len(ShapeSprites.classes)):
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


def flood(grid: np.ndarray, row: int, column: int) -> set[tuple[int, int]]:
    """The 4-connected piece of true pixels that holds a given one."""
    piece, edge = set(), [(row, column)]
    while edge:
        r, c = edge.pop()
        inside = 0 <= r < grid.shape[0] and 0 <= c < grid.shape[1]
        if inside and grid[r, c] and (r, c) not in piece:
            piece.add((r, c))
            edge += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
    return piece


def pieces(grid: np.ndarray) -> list[set[tuple[int, int]]]:
    found: list[set[tuple[int, int]]] = []
    for row, column in zip(*np.nonzero(grid)):
        if not any((row, column) in piece for piece in found):
            found.append(flood(grid, int(row), int(column)))
    return found


def naive_mask(grey: np.ndarray) -> Optional[np.ndarray]:
    lit = grey >= 16
    largest = max(pieces(lit), key=len)
    if len(largest) < 0.8 * lit.sum():
        return None
    mask = np.zeros_like(lit)
    mask[tuple(zip(*largest))] = True
    for hole in pieces(~np.pad(mask, 1)):
        if (0, 0) not in hole and len(hole) <= 16:
            for row, column in hole:
                mask[row - 1, column - 1] = True
    return mask


@pytest.fixture(scope="module")
def articles(datasets_root: Path) -> tuple[np.ndarray, np.ndarray]:
    folder = datasets_root / "FashionMNIST" / "raw"
    if not folder.is_dir():
        pytest.skip(f"needs data: no Fashion-MNIST in {folder}")
    return load_fashion_mnist("test", folder)


@pytest.fixture(scope="module")
def source(articles: tuple[np.ndarray, np.ndarray]) -> FashionSprites:
    return FashionSprites("val")


def test_mask_is_the_largest_piece_with_small_holes_filled() -> None:
    grey = np.zeros((28, 28), dtype=np.uint8)
    grey[2:20, 3:23] = 100
    grey[4:8, 5:9] = 0  # 16 pixels: a print
    grey[10:14, 5:10] = 15  # 20 pixels: an opening
    grey[25, 25] = 200  # a speck
    expected = np.zeros((28, 28), dtype=bool)
    expected[2:20, 3:23] = True
    expected[10:14, 5:10] = False
    np.testing.assert_array_equal(article_mask(grey), expected)


def test_article_in_pieces_has_no_mask() -> None:
    grey = np.zeros((28, 28), dtype=np.uint8)
    assert article_mask(grey) is None
    grey[0:10] = grey[18:28] = 100
    assert article_mask(grey) is None


def test_masks_of_real_articles_equal_a_flood_fill(
    articles: tuple[np.ndarray, np.ndarray],
) -> None:
    skipped = 0
    for grey in articles[0][:150]:
        expected, found = naive_mask(grey), article_mask(grey)
        if expected is None:
            assert found is None
            skipped += 1
        else:
            np.testing.assert_array_equal(found, expected)
    assert skipped < 10


@pytest.mark.parametrize("size", [16, 40, 150])
def test_sprites_show_their_article(
    size: int, source: FashionSprites, articles: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = articles
    draws = Draws(1, size)
    for _ in range(30):
        sprite = source.draw(draws, size)
        assert sprite.source_index is not None
        assert sprite.category == labels[sprite.source_index]
        assert max(sprite.alpha.shape) <= size + 2
        grey, mask = images[sprite.source_index], article_mask(images[sprite.source_index])
        assert mask is not None
        # rotation and scaling keep the share of the frame that is filled; the frame of a rotated
        # article is larger than the article by up to |sin 20| + |cos 20| = 1.28
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        longest = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        scale = np.sqrt(sprite.mask.sum() / mask.sum())
        assert 0.74 * size <= scale * longest <= 1.06 * size
        # and the mean tone is that of the article
        if size >= 40:
            assert sprite.tone[sprite.mask].mean() == pytest.approx(grey[mask].mean(), abs=8)


def test_articles_are_rotated_mildly_in_both_directions(source: FashionSprites) -> None:
    # Trousers are long and straight: their principal axis gives the rotation.
    draws, angles = Draws(3), []
    while len(angles) < 40:
        sprite = source.draw(draws, 60)
        if FASHION_CLASSES[sprite.category] == "Trouser":
            row, column = np.nonzero(sprite.mask)
            values, vectors = np.linalg.eigh(np.cov(column, row))
            x, y = vectors[:, 1]
            angles.append(np.degrees(np.arctan(x / y)))
    assert min(angles) < -8 and max(angles) > 8
    assert max(map(abs, angles)) < 27  # 20 degrees, and trousers whose legs differ


def test_tint_is_bright_and_its_shadow_darker(source: FashionSprites) -> None:
    draws = Draws(8)
    for _ in range(50):
        shadow, tint = source.palette(draws, (90, 90, 90))
        assert sum(tint) >= 330
        assert shadow == tuple(channel // 4 for channel in tint)
