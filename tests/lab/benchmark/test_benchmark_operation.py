from collections import Counter
from functools import partial

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
        "ws_detectron, aws": standardize_weight(weight, 1e-5, "aws"),
        "authors' operations": official,
        "mmcv's operations": official,
        "timm's operations": standardize_weight(weight, 1e-6, "bit"),
        "BiT's operations": standardize_weight(weight, 1e-10, "bit"),
    }
    found = operation.FORMULAS
    assert set(found) == {*forms, "layer norm, without affine"}
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
    names = {operation.COPY, *operation.FORMULAS}
    assert set(part["seconds"]) == set(part["peak_bytes"]) == names
    assert all(len(values) == 2 for values in part["seconds"].values())
    assert part["peak_bytes"][operation.COPY] < 1000
    # W_hat of all filters and their gradient
    ours, values = part["peak_bytes"]["ws_detectron, official"], part["facts"]["values"]
    assert 8 * values <= ours < 8.2 * values + 2 * 4 * 512 * 512 * 9


def test_group_norm_is_measured_for_all_images_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter = Counter()

    def count(name: str, norm, x, groups, *affine) -> torch.Tensor:
        counts[(name, *x.shape[:2], groups)] += 1
        return norm(x, groups, *affine)

    norms = {name: partial(count, name, norm) for name, norm in operation.GROUP_NORMS.items()}
    monkeypatch.setattr(operation, "GROUP_NORMS", norms)
    monkeypatch.setattr(operation, "SIZE", (32, 32))
    parts = list(operation.measure_group_norm("cpu", 1, 0))
    measured = [(part["facts"]["images"], part["facts"]["groups"]) for part in parts]
    assert measured == [(n, g) for n in (1, 2, 4, 8) for g in (8, 32)]
    assert all(s > 0 for part in parts for of in part["seconds"].values() for s in of)
    # in one round; of the 60 norms of R-50-FPN those of the four shortcuts share their shape
    for name in norms:
        found = sum(
            number for (of, images, *_), number in counts.items() if (of, images) == (name, 2)
        )
        assert found == 2 * (1 + 2 * 16 + 16 + 4 + 8)
    assert counts["nn.GroupNorm", 1, 2048, 32] == 3 + 1
