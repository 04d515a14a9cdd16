from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from ws_detectron.lab.fashion_mnist.files import FASHION_CLASSES, load_fashion_mnist
from ws_detectron.lab.scenes.draws import Draws
from ws_detectron.lab.scenes.sprites import FashionSprites, article_mask


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


def test_only_scene_splits_are_known() -> None:
    with pytest.raises(ValueError, match="'test'"):
        FashionSprites("test")
