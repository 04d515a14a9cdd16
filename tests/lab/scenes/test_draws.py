import numpy as np
import pytest

from ws_detectron.lab.scenes.draws import Draws


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


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="seed words"):
        Draws()
    for word in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed words.*{word}"):
            Draws(word)
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        Draws(0).integer(3, 2)
    with pytest.raises(ValueError, match="amplitude"):
        Draws(0).noise(128, (2,))
