"""The BiT backbones against a reference in other terms, and their keys."""

from typing import Any

import pytest
import torch
from bit_reference import NARROW, bit_stages, random_timm_state
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from ws_detectron import WSConv2d, add_ws_config, fold_ws
from ws_detectron.checkpoint.sources import bit_key
from ws_detectron.errors import ConfigError
from ws_detectron.layers import GroupNorm

CONVS = {50: 53, 101: 104, 152: 155}  # stem, three in each block, one projection per stage


def bit_config(*opts: Any, name: str = "build_bit_resnet_fpn_backbone") -> CfgNode:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.WS.MODE, cfg.MODEL.WS.EPS = "bit", 1e-8
    cfg.merge_from_list([*NARROW, *opts])
    return cfg


def resnet(*opts: Any) -> nn.Module:
    return build_backbone(bit_config(*opts, name="build_bit_resnet_backbone"))


def ws_names(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, WSConv2d)]


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_every_stage_equals_the_reference(eps: float) -> None:
    state = random_timm_state()
    ours = {bit_key(key): value for key, value in state.items() if not key.startswith("head.")}
    model = resnet("MODEL.WS.EPS", eps).double()
    model.load_state_dict(ours)  # strict: every tensor has a place
    x = torch.randn(1, 3, 32, 48).double()
    with torch.no_grad():
        outputs = model(x)
        expected = bit_stages({key: value.double() for key, value in state.items()}, x, eps)
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        # 50 layers of rounding in float64; outputs are of size 1
        torch.testing.assert_close(outputs[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", CONVS)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_depths_and_width_factors(depth: int, width: int) -> None:
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64 * width]
    opts += ["MODEL.RESNETS.WIDTH_PER_GROUP", 64 * width]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 256 * width]
    with torch.device("meta"):
        model = resnet(*opts)
    assert len(ws_names(model)) == CONVS[depth]
    shapes = {name: (s.channels, s.stride) for name, s in model.output_shape().items()}
    assert shapes == {f"res{i}": (64 * width * 2**i, 2**i) for i in (2, 3, 4, 5)}


def test_published_width_has_the_published_number_of_parameters() -> None:
    """timm's resnetv2_50x1_bit has 25.55 M, 2.05 M of them in the classifier of 1000 classes."""
    with torch.device("meta"):
        model = resnet(*PUBLISHED_WIDTH)
    assert sum(p.numel() for p in model.parameters()) == 25_549_352 - 2049 * 1000


PUBLISHED_WIDTH = [
    *["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 64],
    *["MODEL.RESNETS.RES2_OUT_CHANNELS", 256],
]


@pytest.mark.parametrize("name", ["fpn", "retinanet"])
def test_fpn_shapes_ws_and_gradients(name: str) -> None:
    retinanet = name == "retinanet"
    builder = f"build_bit_{'retinanet_' if retinanet else ''}resnet_fpn_backbone"
    features = ["res3", "res4", "res5"] if retinanet else ["res2", "res3", "res4", "res5"]
    model = build_backbone(bit_config("MODEL.FPN.IN_FEATURES", features, name=builder))
    names = ws_names(model)
    assert len(names) == CONVS[50] + 2 * len(features)
    assert {GroupNorm} == {type(m) for m in model.modules() if isinstance(m, nn.GroupNorm)}
    outputs = model(torch.randn(1, 3, 64, 64))
    sizes = {key: (value.shape[1], value.shape[2]) for key, value in outputs.items()}
    levels = (3, 4, 5, 6, 7) if retinanet else (2, 3, 4, 5, 6)
    assert sizes == {f"p{level}": (32, max(64 // 2**level, 1)) for level in levels}
    sum(y.square().mean() for y in outputs.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 5])
def test_freeze_at_freezes_each_norm_with_its_stage(freeze_at: int) -> None:
    model = resnet("MODEL.BACKBONE.FREEZE_AT", freeze_at)
    stages = ["stem", "res2", "res3", "res4", "res5"]
    for name, parameter in model.named_parameters():
        stage = stages.index(name.split(".")[0]) + 1
        assert parameter.requires_grad == (stage > freeze_at), name


def test_freezing_turns_batch_norm_into_frozen_bn() -> None:
    model = resnet("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 2)
    kinds = {name: type(m) for name, m in model.named_modules() if name.endswith("norm")}
    for name, kind in kinds.items():
        frozen = name.startswith(("stem.", "res2."))
        assert kind is (FrozenBatchNorm2d if frozen else nn.BatchNorm2d), name


def test_out_features_drop_later_stages_and_keep_the_values() -> None:
    x = torch.randn(1, 3, 32, 32)
    whole, part = resnet(), resnet("MODEL.RESNETS.OUT_FEATURES", ["stem", "res4"])
    assert not any(name.startswith("res5") for name, _ in part.named_parameters())
    part.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        outputs = part(x)
        assert list(outputs) == ["stem", "res4"]
        torch.testing.assert_close(outputs["res4"], whole(x)["res4"])
    assert outputs["stem"].shape == (1, 32, 8, 8) and outputs["stem"].min() == 0


def test_other_resnets_keys_act() -> None:
    model = resnet("MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.RESNETS.RES5_DILATION", 2)
    assert (model.res3[0].conv1.stride, model.res3[0].conv2.stride) == ((2, 2), (1, 1))
    assert model.res5[1].conv2.dilation == (2, 2)
    assert model(torch.randn(1, 3, 64, 64))["res5"].shape[2:] == (4, 4)
    grouped = resnet("MODEL.RESNETS.NUM_GROUPS", 2, "MODEL.RESNETS.WIDTH_PER_GROUP", 16)
    assert grouped.res2[0].conv2.weight.shape == (32, 16, 3, 3)
    norms = [m for m in resnet("MODEL.WS.GN_GROUPS", 16).modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 3 * 16 + 1 and {norm.num_groups for norm in norms} == {16}


def test_ws_can_be_switched_off_and_folded() -> None:
    plain = resnet("MODEL.WS.BACKBONE", False).double()
    assert not ws_names(plain)
    model = resnet().double()
    x = torch.randn(1, 3, 32, 32).double()
    with torch.no_grad():
        expected = model(x)
        plain.load_state_dict(fold_ws(model).state_dict())
        torch.testing.assert_close(plain(x), expected, rtol=1e-10, atol=1e-10)
    names = ws_names(build_backbone(bit_config("MODEL.WS.FPN", False)))
    assert len(names) == CONVS[50] and all(name.startswith("bottom_up.") for name in names)


@pytest.mark.parametrize("name, convs", [("resnet", CONVS[50]), ("resnet_fpn", CONVS[50] + 8)])
def test_all_filters_are_one_part(launches: list[int], name: str, convs: int) -> None:
    model = build_backbone(bit_config(name=f"build_bit_{name}_backbone"))
    model(torch.randn(1, 3, 64, 64))
    assert launches == [convs]


def test_scripted_fpn_equals_eager() -> None:
    patches = pytest.importorskip("detectron2.export.torchscript_patch", exc_type=ImportError)
    patches.patch_nonscriptable_classes()
    model = build_backbone(bit_config()).eval().double()
    x = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        # the formula of WS instead of fused kernels; rounding is 1e-16, 61 convs deep
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "opts, parts",
    [
        (["MODEL.RESNETS.DEPTH", 18], ["MODEL.RESNETS.DEPTH is 18", "50, 101, 152"]),
        (["MODEL.RESNETS.NORM", ""], ["MODEL.RESNETS.NORM", '"GN"']),
        (["MODEL.RESNETS.NORM", "gn"], ["MODEL.RESNETS.NORM", "'gn'"]),
        (["MODEL.FPN.NORM", ""], ["MODEL.FPN.NORM", "norm layer"]),
        (["MODEL.FPN.NORM", "gn"], ["MODEL.FPN.NORM", "'gn'"]),
        (
            ["MODEL.WS.GN_GROUPS", 24],
            ["MODEL.WS.GN_GROUPS is 24", "32 channels of backbone.bottom_up.stem.out.norm"],
        ),
        (
            ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]],
            ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "all False"],
        ),
    ],
)
def test_refuses_by_key(opts: list, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_backbone(bit_config(*opts))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
