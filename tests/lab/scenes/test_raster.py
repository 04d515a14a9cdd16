import numpy as np
import pytest

from ws_detectron.lab.scenes.raster import (
    SUPERSAMPLE,
    UNIT,
    blend,
    enlarge,
    polygon_alpha,
    resample,
    to_fixed,
)


def even_odd(polygons: list[np.ndarray], x: float, y: float) -> bool:
    """Ray casting for one point, in floats."""
    inside = False
    for polygon in polygons:
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0)):
            if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                inside = not inside
    return inside


def naive_alpha(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    alpha = np.zeros((height, width), dtype=np.uint8)
    for row in range(height):
        for column in range(width):
            hits = sum(
                even_odd(
                    polygons,
                    column + (i + 0.5) / SUPERSAMPLE,
                    row + (j + 0.5) / SUPERSAMPLE,
                )
                for i in range(SUPERSAMPLE)
                for j in range(SUPERSAMPLE)
            )
            alpha[row, column] = int(hits / SUPERSAMPLE**2 * 255 + 0.5)
    return alpha


@pytest.mark.parametrize("seed", range(4))
def test_polygon_alpha_equals_ray_casting(seed: int) -> None:
    # self-crossing, with a second polygon and corners outside the canvas
    rng = np.random.default_rng(seed)
    fixed = [to_fixed(rng.uniform(-3, 13, (n, 2))) for n in (7, 3)]
    expected = naive_alpha([polygon / UNIT for polygon in fixed], 9, 11)
    np.testing.assert_array_equal(polygon_alpha(fixed, 9, 11), expected)


def test_polygon_alpha_of_aligned_rectangle_is_exact() -> None:
    # columns 2 to 4.5, rows 1 to 3: half of column 4
    rectangle = to_fixed(np.array([(2, 1), (4.5, 1), (4.5, 3), (2, 3)]))
    expected = np.zeros((5, 6), dtype=np.uint8)
    expected[1:3, 2:4] = 255
    expected[1:3, 4] = 128  # 8 of 16 samples, rounded up: belongs to the mask
    np.testing.assert_array_equal(polygon_alpha([rectangle], 5, 6), expected)


def test_inner_polygon_is_a_hole() -> None:
    outer = to_fixed(np.array([(0, 0), (6, 0), (6, 6), (0, 6)]))
    inner = to_fixed(np.array([(2, 2), (4, 2), (4, 4), (2, 4)]))
    alpha = polygon_alpha([outer, inner], 6, 6)
    assert (alpha == 255).sum() == 32
    assert (alpha[2:4, 2:4] == 0).all()


def test_resample_with_the_identity_changes_nothing() -> None:
    planes = np.random.default_rng(0).integers(0, 256, (2, 5, 7), dtype=np.uint8)
    identity = [[2**16, 0, 0], [0, 2**16, 0]]
    np.testing.assert_array_equal(resample(planes, 5, 7, identity), planes)


def test_resample_equals_a_slow_loop() -> None:
    planes = np.random.default_rng(1).integers(0, 256, (1, 6, 5), dtype=np.uint8)
    inverse = np.array([[0.7, 0.3, -1.2], [-0.4, 0.6, 1.1]])
    result = resample(planes, 9, 8, np.floor(inverse * 2**16 + 0.5).astype(int).tolist())

    def source(row: int, column: int) -> float:
        return float(planes[0, row, column]) if 0 <= row < 6 and 0 <= column < 5 else 0.0

    for row in range(9):
        for column in range(8):
            x, y = inverse @ [column, row, 1]
            left, top = int(np.floor(x)), int(np.floor(y))
            fx, fy = x - left, y - top
            expected = (1 - fy) * (
                (1 - fx) * source(top, left) + fx * source(top, left + 1)
            ) + fy * ((1 - fx) * source(top + 1, left) + fx * source(top + 1, left + 1))
            # positions are cut to 1/256 pixel on each axis: at most 255/256 levels each, and 1/2
            # for the rounding of the result
            assert abs(int(result[0, row, column]) - expected) <= 2.5


def test_enlarge_keeps_the_corners_and_is_linear_between() -> None:
    grid = np.array([[[0], [100]], [[200], [20]]])
    result = enlarge(grid, 11, 21)[:, :, 0]
    assert (result[0, 0], result[0, -1], result[-1, 0], result[-1, -1]) == (0, 100, 200, 20)
    # rounded down at 1/256 steps, so at most 1 below the exact line
    expected = np.linspace(0, 100, 21)
    assert np.all((result[0] <= expected) & (result[0] > expected - 1.5))


def test_blend_of_the_extremes_is_exact() -> None:
    canvas = np.full((1, 3, 3), 10, dtype=np.uint8)
    alpha = np.array([[0, 255, 128]], dtype=np.uint8)
    result = blend(canvas, np.array([200, 0, 255]), alpha)
    # round((128 * c + 127 * 10) / 255)
    assert result.tolist() == [[[10, 10, 10], [200, 0, 255], [105, 5, 133]]]
