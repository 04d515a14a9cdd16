import numpy as np
import pytest

from ws_detectron.lab.scenes.raster import (
    SUPERSAMPLE,
    UNIT,
    Draws,
    draw_texture,
    enlarge,
    mix,
    paste,
    polygon_alpha,
    resample,
    to_fixed,
)


def test_draws_follow_from_the_seed_words_alone() -> None:
    # Pinned: these values decide every pixel of the scenes, on every machine.
    draws = Draws(1, 2, 3)
    assert [draws.integer(0, 999) for _ in range(5)] == [795, 590, 204, 608, 413]
    assert Draws(1, 2, 3).noise(14, (2, 5)).tolist() == [[6, 6, -10, 7, -12], [-10, 5, 8, -7, 6]]
    assert Draws(1, 2, 3).uniform(0.0, 1.0) == 0.7955955324543236


def test_streams_of_different_words_differ() -> None:
    streams = [Draws(*words).integer(0, 2**30) for words in ((0,), (1,), (0, 0), (0, 1), (1, 0))]
    assert len(set(streams)) == len(streams)


def test_integers_are_uniform_over_both_ends() -> None:
    draws = Draws(7)
    counts = np.bincount([draws.integer(0, 5) for _ in range(6000)], minlength=6)
    # 1000 expected each, standard deviation sqrt(6000 * 1/6 * 5/6) = 29; five of them allowed
    assert counts.sum() == 6000 and len(counts) == 6
    assert np.abs(counts - 1000).max() < 150


def test_noise_is_uniform_over_both_ends() -> None:
    values = Draws(7).noise(2, (100, 100))
    assert values.dtype == np.int16
    counts = np.bincount((values + 2).ravel(), minlength=5)
    # 2000 expected each; 256 bytes fall into 5 groups of 51 or 52, plus five standard deviations
    assert len(counts) == 5
    assert np.abs(counts - 2000).max() < 250


def test_log_uniform_doublings_are_equally_likely() -> None:
    draws = Draws(3)
    values = np.array([draws.log_uniform(1.0, 4.0) for _ in range(4000)])
    assert values.min() >= 1.0 and values.max() < 4.0
    # half of 4000 expected below 2, standard deviation 32
    assert abs(int((values < 2.0).sum()) - 2000) < 160


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


def test_mixing_is_rounded_and_exact_at_the_extremes() -> None:
    share = np.array([[0, 255, 128]], dtype=np.uint8)
    result = mix(np.array([10, 10, 10]), np.array([200, 0, 255]), share)
    # round((128 * c + 127 * 10) / 255)
    assert result.tolist() == [[[10, 10, 10], [200, 0, 255], [105, 5, 133]]]


def test_pieces_are_cropped_at_the_border() -> None:
    canvas = np.zeros((3, 4, 3), dtype=np.uint8)
    colours = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for top, left in ((-1, 3), (2, -1), (7, 7)):
        paste(canvas, colours, np.full((2, 2), 255, np.uint8), top, left)
    paste(canvas, np.array([9, 9, 9]), np.full((1, 1), 255, np.uint8), 1, 1)
    expected = np.zeros((3, 4, 3), dtype=np.uint8)
    expected[0, 3], expected[2, 0], expected[1, 1] = [6, 7, 8], [3, 4, 5], 9
    np.testing.assert_array_equal(canvas, expected)


def test_textures_of_all_types_appear_and_fill_the_frame() -> None:
    draws = Draws(4)
    plain = graded = two_toned = 0
    for _ in range(300):
        tone = draw_texture(draws, 40, 60)
        assert tone.shape == (40, 60) and tone.dtype == np.uint8
        levels = np.unique(tone)
        if len(levels) == 1:
            plain += 1
        elif len(levels) > 2:
            graded += 1
            assert levels[0] == 0 and levels[-1] == 255
        else:
            two_toned += 1
            assert levels.tolist() == [0, 255]
            # stripes and checks cover half, dots a third; frames of two to five periods vary
            assert 0.1 < (tone == 255).mean() < 0.8
    # 60, 60 and 180 expected
    assert plain > 30 and graded > 30 and two_toned > 120


def test_every_type_takes_the_same_number_of_draws() -> None:
    # what follows a texture in the stream must not depend on its type
    following = {}
    for seed in range(30):
        draws, counted = Draws(seed), Draws(seed)
        draw_texture(draws, 20, 20)
        for _ in range(5):
            counted.integer(0, 1)
        following[seed] = draws.integer(0, 2**20) == counted.integer(0, 2**20)
    assert all(following.values())
