from pathlib import Path

import pytest
import torch

from ws_detectron.errors import UserError
from ws_detectron.lab.benchmark import operation
from ws_detectron.layers import standardize_weight


def test_every_implementation_gives_the_values_of_its_form() -> None:
    """What is timed beside ours must compute the same, or its time says nothing."""
    weight = 0.05 * torch.randn(8, 4, 3, 3)
    forms = {
        "authors' operations": standardize_weight(weight, 1e-5, "official"),
        "mmcv conv_ws_2d": standardize_weight(weight, 1e-5, "official"),
        "timm StdConv2d": standardize_weight(weight, 1e-6, "bit"),
        "BiT's operations": standardize_weight(weight, 1e-10, "bit"),
    }
    found = operation.formulas()
    assert {"authors' operations", "BiT's operations"} <= set(found) <= set(forms)
    for name, standardize in found.items():
        leaf = weight.clone().requires_grad_()
        result = standardize(leaf)
        torch.testing.assert_close(
            result, forms[name], msg=lambda text, name=name: f"{name}: {text}"
        )
        result.square().sum().backward()
        assert leaf.grad is not None
    rows = operation._layer_norm(weight).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(8), atol=1e-6, rtol=0)


def test_another_packages_code_is_run_and_its_filters_taken() -> None:
    """By a stand-in for a package that calls F.conv2d as timm and mmcv do."""

    def run(module: object, weight: torch.Tensor) -> None:
        torch.nn.functional.conv2d(weight, weight * 3, None)

    weight = torch.ones(2, 1, 1, 1)
    assert operation._handed_to_conv2d(run, None, weight).flatten().tolist() == [3.0, 3.0]
    assert torch.nn.functional.conv2d(weight, weight[:1]).flatten().tolist() == [1.0, 1.0]


def test_filters_are_those_of_the_backbone() -> None:
    weights = operation.backbone_filters(50, "cpu")
    # torchvision's ResNet-50 has as many
    assert len(weights) == 53 and sum(weight.numel() for weight in weights) == 23_454_912


def test_measurement_has_every_figure() -> None:
    figures = operation.measure_operation("cpu", rounds=2, warmup=0)
    names = set(operation.OURS.values()) | {operation.LAYER_NORM, *operation.formulas()}
    assert set(figures["peak_bytes"]) == names
    assert set(figures["seconds"]) == names | {operation.COPY}
    copies = figures["seconds"][operation.COPY]
    floor = [2.5 * value for value in copies]
    expected = sorted(b / a for a, b in zip(floor, figures["seconds"]["BiT's operations"]))
    median = figures["times_floor"]["BiT's operations"]["median"]
    assert median == pytest.approx(sum(expected) / 2)
    # W_hat of all filters and their gradient
    ours = figures["peak_bytes"]["ws_detectron, official"]
    assert 8 * figures["values"] <= ours < 8.2 * figures["values"] + 2 * 4 * 512 * 512 * 9


def test_group_norm_is_measured_for_all_images_and_groups() -> None:
    figures = operation.measure_group_norm(
        "cpu", 3, 0, images=(1, 2), groups=(8, 32), size=(64, 96)
    )
    assert [(p["images"], p["groups"]) for p in figures["parts"]] == [
        (1, 8),
        (1, 32),
        (2, 8),
        (2, 32),
    ]
    part = figures["parts"][0]
    # of the 60 norms of R-50-FPN those of the four shortcuts share their shape with others
    assert sum(often for *_, often in part["shapes"]) == 1 + 2 * 16 + 16 + 4 + 8
    seconds = part["seconds"][operation.SPLIT_NORM]
    expected = sum(c * sorted(s)[1] for (*_, c), s in zip(part["shapes"], seconds))
    assert part["network"][operation.SPLIT_NORM] == pytest.approx(expected)


def test_host_time_leaves_all_as_it_was() -> None:
    weight = torch.randn(2, 3, 3, 3)
    expected = standardize_weight(weight)
    found = operation.host_milliseconds(rounds=3)
    assert set(found) == {"forward", "backward"} and set(found["forward"]) == {"least", "median"}
    assert torch.cat([weight, weight]).shape == (4, 3, 3, 3)
    torch.testing.assert_close(standardize_weight(weight), expected)


def test_a_broken_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="half_installed is installed but cannot be imported: No mod"
    ):
        operation._imported("half_installed")
    assert operation._imported("a_package_that_is_not_there") is None
