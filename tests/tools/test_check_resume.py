"""What tools/check_resume.py calls equal; a killed training itself is in tests/engine."""

import pytest
import torch
from check_resume import differences, report

STATE = {
    "model": {"weight": torch.tensor([1.0, 0.0]), "count": torch.tensor(3)},
    "trainer": {"iteration": 5, "values": [(0.5, 3), (float("nan"), 4)]},
}


def changed(**values: object) -> dict:
    model, trainer = STATE["model"], STATE["trainer"]
    return {
        "model": {**model, **{k: v for k, v in values.items() if k in model}},
        "trainer": {**trainer, **{k: v for k, v in values.items() if k not in model}},
    }


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, []),
        ({"weight": torch.tensor([1.0, 0.0]), "values": [(0.5, 3), (float("nan"), 4)]}, []),
        ({"weight": torch.tensor([1.0, 1e-45])}, ["model.weight"]),
        ({"weight": torch.tensor([1.0, -0.0])}, ["model.weight"]),
        ({"weight": torch.tensor([[1.0, 0.0]])}, ["model.weight"]),
        ({"count": torch.tensor(3.0)}, ["model.count"]),
        ({"iteration": 6, "more": 1}, ["trainer.iteration", "trainer.more"]),
        ({"values": [(0.5, 3), (0.25, 4)]}, ["trainer.values[1][0]"]),
        ({"values": [(0.5, 3)]}, ["trainer.values"]),
    ],
)
def test_every_bit_counts(values: dict, names: list[str]) -> None:
    assert differences(STATE, changed(**values)) == names


def test_report_counts_the_kills_of_equal_runs() -> None:
    rows = [{"run": "a", "kills": 3, "different": ""}, {"run": "b", "kills": 2, "different": "x"}]
    text = report({"torch": "2.11.0"}, rows)
    assert "**3 of 5 kills: the run ends equal**" in text and "(1 of 2 runs)" in text
    assert "torch 2.11.0." in text
