import pytest
import torch

from ws_detectron.lab.benchmark import operation
from ws_detectron.layers import standardize_weight


def test_every_implementation_gives_the_values_of_its_form() -> None:
    """A comparison of times makes sense only between equal results."""
    weight = 0.05 * torch.randn(8, 4, 3, 3)
    official = standardize_weight(weight, 1e-5, "official")
    forms = {
        "ws_detectron, paper": standardize_weight(weight, 1e-5, "paper"),
        "ws_detectron, official": official,
        "ws_detectron, bit": standardize_weight(weight, 1e-5, "bit"),
        "authors' operations": official,
        "mmcv's operations": official,
        "timm's operations": standardize_weight(weight, 1e-6, "bit"),
        "BiT's operations": standardize_weight(weight, 1e-10, "bit"),
    }
    found = operation.formulas()
    assert set(found) == {*forms, operation.LAYER_NORM}
    for name, expected in forms.items():
        leaf = weight.clone().requires_grad_()
        result = found[name](leaf)
        torch.testing.assert_close(result, expected, msg=lambda text, name=name: f"{name}: {text}")
        result.square().sum().backward()
        assert leaf.grad is not None
    rows = operation._layer_norm(weight).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(8), atol=1e-6, rtol=0)


def test_filters_are_those_of_the_backbone() -> None:
    weights = operation.backbone_filters(50, "cpu")
    # torchvision's ResNet-50 has as many
    assert len(weights) == 53 and sum(weight.numel() for weight in weights) == 23_454_912


def test_measurement_is_complete() -> None:
    (part,) = operation.measure_operation("cpu", rounds=2, warmup=0)
    names = {operation.COPY, *operation.formulas()}
    assert set(part["seconds"]) == set(part["peak_bytes"]) == names
    assert all(len(values) == 2 for values in part["seconds"].values())
    assert part["peak_bytes"][operation.COPY] < 1000
    # W_hat of all filters and their gradient
    ours, values = part["peak_bytes"]["ws_detectron, official"], part["facts"]["values"]
    assert 8 * values <= ours < 8.2 * values + 2 * 4 * 512 * 512 * 9


def test_group_norm_is_measured_for_all_images_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "interleave", lambda *a, **k: {  # seconds of one norm, 3 rounds
        operation.STOCK_NORM: [1.0, 2.0, 4.0], operation.SPLIT_NORM: [3.0, 1.0, 1.0]
    })  # fmt: skip
    parts = list(
        operation.measure_group_norm("cpu", 3, 0, images=(1, 2), groups=(8, 32), size=(64, 96))
    )
    measured = [(p["facts"]["images"], p["facts"]["groups"]) for p in parts]
    assert measured == [(1, 8), (1, 32), (2, 8), (2, 32)]
    # of the 60 norms of R-50-FPN those of the four shortcuts share their shape with others
    norms = 1 + 2 * 16 + 16 + 4 + 8
    assert sum(number for *_, number, _ in parts[0]["shapes"]) == norms
    assert parts[0]["seconds"][operation.STOCK_NORM] == [norms, 2 * norms, 4 * norms]
    medians = {operation.STOCK_NORM: 2.0, operation.SPLIT_NORM: 1.0}
    assert parts[0]["shapes"][0] == [64, 32, 48, 1, medians]


def test_group_norm_runs_on_small_features() -> None:
    (part,) = operation.measure_group_norm("cpu", 2, 0, images=[1], groups=[8], size=(64, 64))
    assert all(s > 0 for values in part["seconds"].values() for s in values)
