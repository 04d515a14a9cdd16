import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist.model import ByteDropout, build_classifier
from ws_detectron.lab.fashion_mnist.training_settings import DETECTOR_ORDER, VARIANTS
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
    short = {nn.BatchNorm2d: "norm", nn.BatchNorm1d: "norm", ByteDropout: "dropout"}
    short |= {nn.Linear: "dense", nn.Flatten: "flatten", nn.ReLU: "relu"}
    found = [
        short.get(type(layer), "pool" if isinstance(layer, nn.MaxPool2d) else "conv+relu")
        + (f" {layer.p}" if isinstance(layer, ByteDropout) else "")
        for layer in build_classifier("bn")
    ]
    block = ["conv+relu", "norm", "conv+relu", "norm", "pool", "dropout 0.25"]
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
    w = dict(model.state_dict())

    def conv(x: torch.Tensor, n: int) -> torch.Tensor:
        weight = w[f"conv{n}.weight"]
        if VARIANTS[variant].ws:
            weight = standardize_weight(weight, mode="official")
        return F.conv2d(x, weight, w[f"conv{n}.bias"], padding=1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        layer = VARIANTS[variant].norm
        if layer == "BN":
            mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
            return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-3)
        if layer:
            groups = 32 if layer == "GN" else 1
            return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"])
        return x

    for n in range(1, 5):
        name = f"norm{n}" if report else f"conv{n}.norm"
        x = conv(x, n)
        x = norm(x.relu(), name) if report else norm(x, name).relu()
        if n % 2 == 0:
            x = F.max_pool2d(x, 2)
    x = F.linear(x.flatten(1), w["dense.weight"], w["dense.bias"])
    x = norm(x.relu(), "dense_norm") if report else norm(x, "dense_norm").relu()
    return F.linear(x, w["predictor.weight"], w["predictor.bias"])


@pytest.mark.parametrize("order", ["report", "detector"])
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"wn"}))
def test_outputs_are_those_of_the_report_network(variant: str, order: str) -> None:
    model = build_classifier(variant, order=order)
    for name, value in model.state_dict().items():  # no bias at 0, no scale at 1
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * (0.5 if "norm" in name else 0.02))
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
    directions = dict(normed.named_parameters())["conv2.parametrizations.weight.original1"]
    with torch.no_grad():
        before = normed(x)
        directions.mul_(7.0)
    torch.testing.assert_close(normed(x), before, rtol=1e-4, atol=1e-5)


def test_the_order_of_relu_and_norm_is_the_one_asked_for() -> None:
    """In the report's order a norm's output has both signs; in the detector's nothing has."""
    for order, signed in (("report", True), (DETECTOR_ORDER, False)):
        model = build_classifier("gn", groups=8, order=order)
        block = model[: list(dict(model.named_children())).index("pool1")]
        assert bool((block(torch.randn(2, 1, 28, 28)) < 0).any()) == signed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "in"}, "variant is 'in'; allowed: none, bn"),
        ({"variant": "gn", "order": "norm"}, "order is 'norm'; allowed: report, detector"),
        ({"variant": "gn", "groups": 24}, "groups is 24; it must divide 32"),
        ({"variant": "gn", "groups": 64}, "groups is 64; it must divide 32"),
    ],
)
def test_what_cannot_be_built_is_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_classifier(**options)


def test_works_with_a_torch_that_cannot_tell_whether_it_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.compiler has `is_compiling` from 2.3 on."""
    monkeypatch.delattr(torch.compiler, "is_compiling")
    assert build_classifier("gn_ws")(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_dropout_drops_the_share_it_says_and_keeps_the_mean() -> None:
    layer = ByteDropout(0.25)
    x = torch.ones(100, 30, 10, 11)
    y = layer(x)
    # 330,000 values: standard deviation of the share 0.00075
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.004)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(layer.eval()(x), x)


def test_dropout_is_independent_of_neighbours_and_of_memory_format() -> None:
    y = ByteDropout(0.5)(torch.ones(64, 8, 16, 16).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    kept = (y != 0).double().numpy()
    for axis in range(4):
        near = np.take(kept, range(kept.shape[axis] - 1), axis).ravel()
        far = np.take(kept, range(1, kept.shape[axis]), axis).ravel()
        # 120,000 pairs or more: standard deviation 0.003
        assert abs(np.corrcoef(near, far)[0, 1]) < 0.015


def test_dropout_passes_the_gradient_of_what_it_keeps() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    y = ByteDropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (y != 0).float() * 2)


@pytest.mark.parametrize("p", [0.3, 1.0, -0.25])
def test_dropout_refuses_what_a_byte_cannot_represent(p: float) -> None:
    with pytest.raises(ValueError, match="multiple of 1/256"):
        ByteDropout(p)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_features_stay_channels_last_so_that_no_layer_reorders_them(variant: str) -> None:
    model = build_classifier(variant)
    x = torch.randn(2, 28, 28, 1).permute(0, 3, 1, 2)  # as the data are
    for name, layer in model.named_children():
        if name == "flatten":
            break
        x = layer(x)
        assert x.is_contiguous(memory_format=torch.channels_last), name
