"""The order of the images: what detectron2's samplers mean, for any processes, parts and start."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetFromList

from ws_detectron.data import training_order
from ws_detectron.data.training_order import (
    MappedImages,
    TrainingBatches,
    epochs,
    repeat_factors,
    seed_step,
)
from ws_detectron.errors import ConfigError, DataError

ORIENTATIONS = [0, 0, 1, 0, 1, 1, 1, 0, 1, 1]


def batches(number: int, *, start: int = 0, seed: int = 3, size: int = 10, **options) -> list:
    options.setdefault("images", 4)
    sampler = TrainingBatches(lambda seed: torch.ones(size), **options)
    sampler.seed, sampler.start = seed, start
    return list(itertools.islice(sampler, number))


def flat(some: list) -> list:
    return [drawn for batch in some for drawn in batch]


def test_each_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    drawn = flat(batches(10))
    assert [position for position, _ in drawn] == list(range(40))
    orders = [[index for _, index in drawn[e : e + 10]] for e in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({*map(tuple, orders)}) == 4
    assert flat(batches(10, seed=4)) != drawn and flat(batches(10)) == drawn


@pytest.mark.parametrize("start", [0, 1, 4, 13])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("groups", [None, ORIENTATIONS])
def test_a_sequence_continues_from_any_batch(start: int, parts: int, groups: object) -> None:
    options = {"parts": parts, "groups": groups}
    assert batches(9, start=start, **options) == batches(30, **options)[start : start + 9]


@pytest.mark.parametrize("groups", [None, ORIENTATIONS])
def test_processes_and_parts_divide_the_images_of_a_step_alike(groups: object) -> None:
    whole = batches(6, groups=groups)
    in_parts = batches(24, parts=4, groups=groups)
    assert [flat(in_parts[s : s + 4]) for s in range(0, 24, 4)] == whole
    ranks = [batches(6, processes=4, rank=r, groups=groups) for r in range(4)]
    assert [batch for step in zip(*ranks) for batch in step] == in_parts
    both = [batches(12, processes=2, rank=r, parts=2, groups=groups) for r in range(2)]
    assert [batch for part in zip(*both) for batch in part] == in_parts


def test_step_and_share_of_a_batch_are_those_of_its_images() -> None:
    def share(number: int, **options: int) -> tuple:
        sampler = TrainingBatches(lambda seed: torch.ones(10), 4, **options)
        return sampler.place(number), next(iter(batches(1, start=number, **options)))

    alone = {share(number, parts=4)[0]: share(number, parts=4)[1] for number in range(12)}
    assert list(alone) == [(step, share) for step in range(3) for share in range(4)]
    for rank, number in itertools.product(range(2), range(6)):
        place, images = share(number, processes=2, rank=rank, parts=2)
        assert alone[place] == images


def test_images_of_a_step_have_one_orientation_and_none_is_lost() -> None:
    some = batches(60, groups=ORIENTATIONS)
    assert all(len({ORIENTATIONS[index] for _, index in step}) == 1 for step in some)
    positions = [position for position, _ in flat(some)]
    assert len({*positions}) == 240
    # at most 3 of each orientation wait for others
    assert len({*range(max(positions))} - {*positions}) <= 6
    assert all(step == sorted(step) for step in some)
    completed = [step[-1][0] for step in some]
    assert completed == sorted(completed)


def test_repeat_factors_are_met_on_average() -> None:
    drawn = np.concatenate([*itertools.islice(epochs(torch.tensor([1.0, 2.25, 0.5]), 0), 2000)])
    counts = Counter(drawn.tolist())
    assert counts[0] == 2000
    # standard deviations of 2000 draws: 19 and 22
    assert abs(counts[1] - 4500) < 80 and abs(counts[2] - 1000) < 90


def test_samplers_of_the_config() -> None:
    cfg = get_cfg()
    common, rare = {"category_id": 0}, {"category_id": 1}
    records = [{"annotations": [common]}] * 9 + [{"annotations": [common, rare]}]
    assert repeat_factors(cfg, records)(0).tolist() == [1.0] * 10
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.4
    # sqrt(0.4 / 0.1), as one of ten images has the rare class
    assert repeat_factors(cfg, records)(0).tolist() == [1.0] * 9 + [2.0]
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.35
    subsets = [*map(repeat_factors(cfg, records), (0, 0, 1))]
    assert [subset.sum() for subset in subsets] == [3, 3, 3]
    assert torch.equal(subsets[0], subsets[1]) and not torch.equal(subsets[0], subsets[2])
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.05
    with pytest.raises(ConfigError, match="RANDOM_SUBSET_RATIO is 0.05, which makes 0 of 10 im"):
        repeat_factors(cfg, records)
    cfg.DATALOADER.SAMPLER_TRAIN = "SomebodysSampler"
    assert repeat_factors(cfg, records) is None


def draw(record: dict) -> tuple:
    return record["i"], random.random(), float(np.random.rand()), torch.rand(1).item()


def test_what_a_mapper_draws_is_that_of_the_position() -> None:
    records = DatasetFromList([{"i": i} for i in range(5)])
    images = MappedImages(records, draw, seed=3)
    expected = {drawn: images[drawn] for drawn in [(0, 4), (1, 2), (2, 2)]}
    random.random(), np.random.rand(), torch.rand(1)
    for drawn in [(2, 2), (0, 4), (1, 2)]:
        assert images[drawn] == expected[drawn]
    numbers = [n for found in expected.values() for n in found[1:]]
    assert len({*numbers}) == 9 and numbers != [
        n for drawn in expected for n in MappedImages(records, draw, seed=4)[drawn][1:]
    ]


def test_a_skipped_image_is_replaced_by_one_of_the_position() -> None:
    records = DatasetFromList([{"i": i} for i in range(50)])
    images = MappedImages(records, lambda r: draw(r) if r["i"] >= 10 else None, seed=3)
    found = [images[position, 0] for position in range(20)]
    assert found == [images[position, 0] for position in range(20)]
    assert len({i for i, *_ in found}) > 10 and min(i for i, *_ in found) >= 10
    none = MappedImages(records, lambda record: None, seed=3)
    with pytest.raises(DataError, match="mapper returned None, .* 100 times in a row"):
        none[0, 0]


def test_steps_seed_all_generators() -> None:
    def drawn(*numbers: int) -> tuple:
        seed_step(*numbers)
        return draw({"i": 0})

    found = [drawn(*n) for n in [(3, 1, 0), (3, 2, 0), (3, 1, 1), (4, 1, 0), (3, 1, 0)]]
    assert found[0] == found[-1] and len({*found}) == 4
    assert all(len({row[n] for row in found}) == 4 for n in (1, 2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_seed_the_gpu() -> None:
    torch.zeros(1, device="cuda")
    found = []
    for step in (1, 2, 1):
        seed_step(3, step, 0)
        found.append(torch.rand(1, device="cuda").item())
    assert found[0] == found[2] != found[1]


def test_uses_of_a_seed_share_no_numbers() -> None:
    uses = ("_EPOCH", "_SUBSET", "_IMAGE", "_STEP")
    numbers = {training_order._bits(1, getattr(training_order, use), 2, 3) for use in uses}
    assert len(numbers) == 4 and training_order._bits(1, "a", 23) != training_order._bits(
        12, "a", 3
    )
