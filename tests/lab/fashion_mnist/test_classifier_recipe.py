import math

import pytest

from ws_detectron.lab.fashion_mnist.loop import Schedule, build_optimizer
from ws_detectron.lab.fashion_mnist.model import build_classifier
from ws_detectron.lab.fashion_mnist.training_settings import default_lr


def test_cosine_rises_and_falls() -> None:
    schedule = Schedule("cosine", lr=0.1, steps=100)
    assert [schedule.at(step) for step in (0, 4, 9)] == pytest.approx([0.01, 0.05, 0.1])
    assert schedule.at(10) == pytest.approx(0.1)
    assert schedule.at(55) == pytest.approx(0.05)  # half way down
    assert schedule.at(99) == pytest.approx(0.05 * (1 + math.cos(math.pi * 89 / 90)))
    assert schedule.at(99) < 1e-4


def test_one_step_and_constant() -> None:
    assert Schedule("cosine", 0.1, 1).at(0) == 0.1
    assert {Schedule("constant", 0.1, 50).at(step) for step in range(50)} == {0.1}


def test_default_lr_scales_from_the_nearest_known_batch() -> None:
    assert default_lr(4) == pytest.approx(2 * default_lr(2))
    assert default_lr(1) == pytest.approx(default_lr(2) / 2)
    assert default_lr(512) == pytest.approx(4 * default_lr(128))
    assert default_lr(40) == pytest.approx(default_lr(32) * 40 / 32)


@pytest.mark.parametrize("variant", ["gn_ws", "wn"])
def test_biases_and_norm_layers_do_not_decay(variant: str) -> None:
    model = build_classifier(variant)
    optimizer = build_optimizer(model, 0.1)
    decayed, free = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 5e-4 and free["weight_decay"] == 0
    assert all("norm" not in names[id(p)] and "bias" not in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert decayed["nesterov"] and decayed["momentum"] == 0.9
