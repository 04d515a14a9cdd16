import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ws_detectron.lab.fashion_mnist.model import VARIANTS, build_classifier
from ws_detectron.layers import WSConv2d, standardize_weight

# The report's table of layers, and what its framework counts: 3x3 convs 1-32-32-64-64 and dense
# layers 3136-512-10, each with biases.
PARAMETERS = (
    (9 * 1 + 1) * 32 + (9 * 32 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 64
    + (7 * 7 * 64 + 1) * 512 + (512 + 1) * 10
)  # fmt: skip
NORM_CHANNELS = 32 + 32 + 64 + 64 + 512


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_has_the_reports_parameters(variant: str) -> None:
    model = build_classifier(variant)
    extra = 2 * NORM_CHANNELS if VARIANTS[variant].norm else 0
    # weight norm keeps a length for each output channel of each layer
    extra += NORM_CHANNELS + 10 if VARIANTS[variant].weight_norm else 0
    assert count(model) == PARAMETERS + extra
    assert model(torch.randn(4, 1, 28, 28)).shape == (4, 10)


def test_layers_stand_where_the_report_has_them() -> None:
    """Dropout acts in training alone, which the comparison of outputs below does not see."""
    short = {nn.BatchNorm2d: "norm", nn.BatchNorm1d: "norm", nn.Linear: "dense", nn.ReLU: "relu"}
    short |= {nn.Flatten: "flatten", nn.MaxPool2d: "pool"}
    found = [
        f"dropout {layer.p}" if isinstance(layer, nn.Dropout) else short.get(type(layer), "conv")
        for layer in build_classifier("bn")
    ]
    block = ["conv", "relu", "norm", "conv", "relu", "norm", "pool", "dropout 0.25"]
    tail = ["flatten", "dense", "relu", "norm", "dropout 0.5", "dense"]
    assert found == [*block, *block, *tail]


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"wn"}))
def test_starts_as_keras_does(variant: str) -> None:
    """Glorot-uniform weights, zero biases, and BN with eps 0.001 that keeps 0.99 of the old."""
    torch.manual_seed(0)
    for layer in build_classifier(variant).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            area = layer.weight[0, 0].numel()
            fans = (layer.weight.shape[0] + layer.weight.shape[1]) * area
            limit = (6 / fans) ** 0.5
            largest = layer.weight.abs().max().item()
            # 288 values at least: the largest is below 0.97 of the limit once in 6,000 times
            assert 0.97 * limit < largest <= limit
            assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
            assert layer.bias is not None and not layer.bias.any()
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm1d)):
            assert (layer.eps, layer.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_standardized_are_the_four_convs_of_ws_variants_and_nothing_else(variant: str) -> None:
    convs = [m for m in build_classifier(variant).modules() if isinstance(m, nn.Conv2d)]
    assert [isinstance(conv, WSConv2d) for conv in convs] == [VARIANTS[variant].ws] * 4


def reference(model: nn.Module, x: torch.Tensor, variant: str, report: bool) -> torch.Tensor:
    """The network in evaluation, written down layer by layer."""
    convs = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    dense, predictor = (layer for layer in model if isinstance(layer, nn.Linear))
    norms = (m for m in model if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d, nn.GroupNorm)))

    def norm(x: torch.Tensor) -> torch.Tensor:
        name = VARIANTS[variant].norm
        if not name:
            return x
        of = next(norms)
        if name == "BN":
            return F.batch_norm(x, of.running_mean, of.running_var, of.weight, of.bias, eps=1e-3)
        return F.group_norm(x, 32 if name == "GN" else 1, of.weight, of.bias)

    for n, conv in enumerate(convs, start=1):
        weight = conv.weight
        if VARIANTS[variant].ws:
            weight = standardize_weight(weight, mode="official")
        x = F.conv2d(x, weight, conv.bias, padding=1)
        x = norm(x.relu()) if report else norm(x).relu()
        if n % 2 == 0:
            x = F.max_pool2d(x, 2)
    x = F.linear(x.flatten(1), dense.weight, dense.bias)
    x = norm(x.relu()) if report else norm(x).relu()
    return F.linear(x, predictor.weight, predictor.bias)


@pytest.mark.parametrize("order", ["report", "detector"])
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"wn"}))
def test_outputs_are_those_of_the_report_network(variant: str, order: str) -> None:
    model = build_classifier(variant, order=order)
    for value in model.state_dict().values():  # no bias at 0, no scale at 1
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * (0.5 if value.dim() == 1 else 0.02))
    model.eval()
    x = torch.randn(6, 1, 28, 28)
    with torch.no_grad():
        expected = reference(model, x, variant, order == "report")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_weight_norm_starts_as_the_plain_network_and_keeps_lengths() -> None:
    torch.manual_seed(3)
    plain = build_classifier("none").eval()
    torch.manual_seed(3)
    normed = build_classifier("wn").eval()
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(normed(x), plain(x), rtol=1e-5, atol=1e-5)
    directions = dict(normed.named_parameters())["2.parametrizations.weight.original1"]
    with torch.no_grad():
        before = normed(x)
        directions.mul_(7.0)
    torch.testing.assert_close(normed(x), before, rtol=1e-4, atol=1e-5)


def test_groups_are_those_asked_for() -> None:
    norms = [m for m in build_classifier("gn", groups=8) if isinstance(m, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [8] * 5
