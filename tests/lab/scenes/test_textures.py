import numpy as np

from ws_detectron.lab.scenes.draws import Draws
from ws_detectron.lab.scenes.raster import draw_texture


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


def test_one_seed_gives_one_texture_whatever_came_before() -> None:
    first = draw_texture(Draws(9), 33, 21)
    np.testing.assert_array_equal(first, draw_texture(Draws(9), 33, 21))


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
