import pytest
import torch

from ws_detectron.lab.benchmark import timing


def test_candidates_run_interleaved() -> None:
    log: list[str] = []
    candidates = {name: lambda name=name: log.append(name) for name in "abc"}
    seconds = timing.interleave(candidates, rounds=4, warmup=1, device="cpu")
    assert "".join(log) == "abc" + "abc" + "bca" + "cab" + "cba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.interleave(candidates, rounds=0, warmup=0, device="cpu")
    assert timing.interleave({}, rounds=1, warmup=0, device="cpu") == {}


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcde"])
def test_every_candidate_is_at_every_position_equally_often(names: str) -> None:
    cycles = range(2 * len(names))
    orders = [timing.round_order(list(names), number) for number in cycles]
    for place in range(len(names)):
        assert sorted(order[place] for order in orders) == sorted(2 * names)
    pairs = [pair for order in orders for pair in zip(order, order[1:])]
    assert all(pairs.count((a, b)) == pairs.count((b, a)) for a in names for b in names)


def test_spread_is_median_and_quartiles() -> None:
    assert timing.spread([2.0, 3.0, 2.0, 4.0, 1.0]) == (2.0, 2.0, 3.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_peak_is_the_most_held_at_one_time() -> None:
    kept = []

    def action() -> None:
        first = torch.ones(1000)  # 4,000 bytes
        second = first + 1
        del first
        kept.append(second * 2)  # second and this
        kept.clear()

    # torch holds a few bytes of its own for a moment
    assert timing.peak_bytes(action, "cpu") == pytest.approx(8000, abs=100)


def test_memory_held_before_is_not_counted() -> None:
    weight = torch.ones(5000, requires_grad=True)
    assert timing.peak_bytes(lambda: (weight * 2).detach(), "cpu") == pytest.approx(20000, abs=100)
