"""convert_to_ws and fold_ws: which convs change, and what must not change."""

import copy

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torchvision.models import resnet18

from ws_detectron import convert_to_ws, fold_ws, with_ws
from ws_detectron.layers import WS_MODES, WSConv2d
from ws_detectron.modeling import folded_copy


class Block(nn.Module):
    """One conv for each case that conversion distinguishes."""

    def __init__(self) -> None:
        super().__init__()
        self.with_norm = Conv2d(4, 8, 3, padding=1, norm=nn.GroupNorm(4, 8))
        self.without_norm = Conv2d(8, 8, 1)
        self.sequence = nn.Sequential(
            Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), Conv2d(8, 8, 1), nn.ReLU()
        )
        self.torch_conv = nn.Conv2d(8, 8, 1)
        self.deconv = nn.ConvTranspose2d(8, 8, 2)
        self.aliases = [self.with_norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.sequence(self.without_norm(self.aliases[0](x)))
        return self.deconv(self.torch_conv(x))


def test_converts_exactly_the_convs_that_a_norm_follows() -> None:
    block = Block()
    report = convert_to_ws(block, eps=1e-4, mode="bit")
    assert report.converted == ["with_norm", "sequence.0"]
    assert set(report.skipped) == {"without_norm", "sequence.3", "torch_conv", "deconv"}
    assert "norm" in report.skipped["without_norm"]
    assert "not a detectron2 Conv2d" in report.skipped["torch_conv"]
    assert {type(block.with_norm), type(block.sequence[0])} == {WSConv2d}
    assert (block.with_norm.ws_eps, block.with_norm.ws_mode) == (1e-4, "bit")
    assert type(block.without_norm) is Conv2d
    assert "2 convolutions standardized, 4 left plain" in str(report)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8), FrozenBatchNorm2d(8), nn.SyncBatchNorm(8), nn.GroupNorm(2, 8)]
)
def test_every_norm_layer_counts(norm: nn.Module) -> None:
    assert convert_to_ws(Conv2d(4, 8, 1, norm=norm)).converted == [""]
    assert convert_to_ws(nn.Sequential(Conv2d(4, 8, 1), norm)).converted == ["0"]


def test_activation_between_conv_and_norm_is_not_followed_by_a_norm() -> None:
    sequence = nn.Sequential(Conv2d(4, 8, 1, activation=nn.ReLU()), nn.GroupNorm(2, 8))
    assert convert_to_ws(sequence).converted == []


def test_keeps_objects_parameters_requires_grad_and_hooks() -> None:
    block = Block()
    conv, weight = block.with_norm, block.with_norm.weight
    weight.requires_grad_(False)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append("forward"))
    convert_to_ws(block)
    assert block.with_norm is conv and block.aliases[0] is conv and conv.weight is weight
    assert not conv.weight.requires_grad
    expected = WSConv2d(4, 8, 3, padding=1, norm=conv.norm)
    expected.load_state_dict(conv.state_dict())
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(conv(x), expected(x))
    assert calls == ["forward"]


def test_with_ws_works_in_a_lazy_config() -> None:
    model = instantiate(LazyCall(with_ws)(module=LazyCall(Block)(), eps=1e-3, mode="bit"))
    assert isinstance(model, Block) and isinstance(model.with_norm, WSConv2d)
    assert (model.with_norm.ws_eps, model.with_norm.ws_mode) == (1e-3, "bit")


def test_what_is_converted_standardizes_together_and_folding_undoes_it() -> None:
    part = nn.Sequential(Conv2d(3, 4, 1, norm=nn.GroupNorm(2, 4)))
    assert type(with_ws(part)) is not nn.Sequential
    assert type(fold_ws(part)) is nn.Sequential
    unchanged = nn.Sequential(Conv2d(3, 4, 1))
    assert type(with_ws(unchanged)) is nn.Sequential


def test_a_model_in_which_nothing_is_converted_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    convert_to_ws(resnet18())
    for part in ("Conv2d is not a detectron2 Conv2d (20)", "detectron2.layers.Conv2d with `norm`"):
        assert part in caplog.text
    caplog.clear()
    convert_to_ws(nn.Linear(1, 1))
    assert "there is none" in caplog.text
    caplog.clear()
    convert_to_ws(Block())
    assert not caplog.records


@pytest.mark.parametrize("mode", WS_MODES)
def test_affine_keeps_the_outputs_of_a_trained_model_and_standardizes_from_then_on(
    mode: str,
) -> None:
    block = Block().eval()
    x = torch.randn(2, 4, 6, 6)
    expected = block(x)
    convert_to_ws(block, mode=mode, affine=True)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # mean and scale of a filter no longer matter
        block.with_norm.weight.mul_(3).add_(1)
    # but for eps, which was 1e-4 of a deviation
    torch.testing.assert_close(block(x), expected, rtol=1e-2, atol=1e-3)
    copied = copy.deepcopy(block)
    torch.testing.assert_close(fold_ws(copied)(x), block(x), rtol=1e-5, atol=1e-5)
    assert list(copied.state_dict()) == list(Block().state_dict())


def test_affine_of_a_ws_conv_keeps_its_outputs_and_its_buffers() -> None:
    conv = Conv2d(4, 8, 3, norm=nn.GroupNorm(4, 8))
    x = torch.randn(1, 4, 6, 6)
    convert_to_ws(conv)
    expected = conv(x)
    convert_to_ws(conv, affine=True)  # the filters of a WS conv have any mean and scale
    torch.testing.assert_close(conv(x), expected)
    conv.weight_gamma.copy_(torch.rand(8, 1, 1, 1))
    convert_to_ws(conv, affine=True)
    assert conv.weight_gamma.max() < 1
    convert_to_ws(conv)
    torch.testing.assert_close(conv(x), expected)
    assert not [name for name in conv.state_dict() if name.startswith("weight_")]


def test_converting_again_sets_the_new_mode() -> None:
    conv = Conv2d(4, 8, 1, norm=nn.GroupNorm(2, 8))
    convert_to_ws(conv, mode="paper")
    assert convert_to_ws(conv, mode="bit").converted == [""]
    assert conv.ws_mode == "bit"


def test_leaves_subclasses_and_other_paddings_alone() -> None:
    class OwnConv(Conv2d):
        pass

    own = OwnConv(4, 8, 1, norm=nn.GroupNorm(2, 8))
    circular = Conv2d(4, 8, 3, padding_mode="circular", norm=nn.GroupNorm(2, 8))
    report = convert_to_ws(nn.ModuleList([own, circular]))
    assert report.converted == []
    assert "OwnConv" in report.skipped["0"] and "circular" in report.skipped["1"]


def test_refuses_wrong_arguments_before_it_changes_anything() -> None:
    block = Block()
    with pytest.raises(ValueError, match="mode must be one of"):
        convert_to_ws(block, mode="ws")
    assert type(block.with_norm) is Conv2d


@pytest.mark.parametrize("mode", WS_MODES)
def test_fold_keeps_the_outputs(mode: str) -> None:
    block = Block().eval()
    convert_to_ws(block, mode=mode)
    x = torch.randn(2, 4, 6, 6)
    expected = block(x)
    folded = fold_ws(block)
    assert folded is block and not any(isinstance(m, WSConv2d) for m in block.modules())
    assert type(block.with_norm) is Conv2d and not hasattr(block.with_norm, "ws_mode")
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_fold_of_a_copy_leaves_the_original_training() -> None:
    block = Block()
    convert_to_ws(block)
    weight = block.with_norm.weight.detach().clone()
    fold_ws(copy.deepcopy(block))
    assert isinstance(block.with_norm, WSConv2d)
    torch.testing.assert_close(block.with_norm.weight, weight)


def test_fold_of_convs_that_share_a_parameter() -> None:
    first, second = (Conv2d(4, 4, 1, norm=nn.GroupNorm(2, 4)) for _ in range(2))
    second.weight = first.weight
    pair = nn.Sequential(first, second)
    convert_to_ws(pair, eps=0.1)
    x = torch.randn(1, 4, 5, 5)
    expected = pair(x)
    torch.testing.assert_close(fold_ws(pair)(x), expected, rtol=1e-5, atol=1e-5)


def test_fold_keeps_requires_grad() -> None:
    conv = Conv2d(4, 8, 1, norm=nn.GroupNorm(2, 8))
    convert_to_ws(conv)
    conv.weight.requires_grad_(False)
    assert not fold_ws(conv).weight.requires_grad


def test_folded_copy_leaves_the_model_alone_and_gives_its_outputs() -> None:
    block = Block()
    assert folded_copy(block) is block
    convert_to_ws(block)
    block.train()
    x = torch.randn(2, 4, 6, 6)
    expected = copy.deepcopy(block).eval()(x)
    weight = block.with_norm.weight
    twin = folded_copy(block).eval()
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
    assert block.training and block.with_norm.weight is weight
    assert isinstance(block.with_norm, WSConv2d)


def test_folded_copy_of_a_wrapped_model_is_not_wrapped() -> None:
    block = Block()
    convert_to_ws(block)
    twin = folded_copy(nn.DataParallel(block))
    assert isinstance(twin, Block) and type(twin.with_norm) is Conv2d
