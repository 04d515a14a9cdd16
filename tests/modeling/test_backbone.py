"""The registered WS backbones, over every RESNETS setting that detectron2 accepts."""

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from torch import nn

from ws_detectron import WSConv2d, add_ws_config
from ws_detectron.errors import ConfigError
from ws_detectron.layers import GroupNorm

CONVS_OF_DEPTH = {  # stem + convs of the blocks + shortcuts (none in res2 of)
    18: 1 + 16 + 3,
    34: 1 + 32 + 3,
    50: 1 + 48 + 4,
    101: 1 + 99 + 4,
    152: 1 + 150 + 4,
}


def ws_config(*opts: Any, name: str = "build_ws_resnet_fpn_backbone") -> CfgNode:
    cfg = get_cfg()
    add_ws_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(list(opts))
    return cfg


def bottleneck(*opts: Any, depth: int = 50, **kwargs: Any) -> CfgNode:
    return ws_config(
        "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, *opts, **kwargs
    )


def ws_names(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, WSConv2d)]


@pytest.mark.parametrize("depth", CONVS_OF_DEPTH)
def test_every_conv_of_every_depth_is_standardized(depth: int) -> None:
    cfg = ws_config("MODEL.RESNETS.DEPTH", depth) if depth < 50 else bottleneck(depth=depth)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    names = ws_names(backbone)
    assert sum(name.startswith("bottom_up.") for name in names) == CONVS_OF_DEPTH[depth]
    assert sorted(name for name in names if not name.startswith("bottom_up.")) == sorted(
        f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)
    )


VARIANTS = {
    "R-18": ws_config,
    "R-50": bottleneck,
    "X-50-32x4d": lambda: bottleneck(
        "MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 4
    ),
    "stride in 3x3": lambda: bottleneck("MODEL.RESNETS.STRIDE_IN_1X1", False),
    "res5 dilation": lambda: bottleneck(
        "MODEL.RESNETS.RES5_DILATION",
        2,
        "MODEL.RESNETS.OUT_FEATURES",
        ["res5"],
        name="build_ws_resnet_backbone",
    ),
    "BN": lambda: ws_config("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"),
    "FrozenBN": lambda: ws_config("MODEL.RESNETS.NORM", "FrozenBN"),
    "RetinaNet": lambda: ws_config(
        "MODEL.FPN.IN_FEATURES",
        ["res3", "res4", "res5"],
        name="build_ws_retinanet_resnet_fpn_backbone",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tree_and_shapes_as_stock_and_trains(variant: str) -> None:
    """The stock builder with the same keys gives the same parameters and output shapes."""
    cfg = VARIANTS[variant]()
    torch.manual_seed(0)
    backbone = build_backbone(cfg)
    stock_cfg = cfg.clone()
    stock_cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("_ws_", "_")
    torch.manual_seed(0)
    stock = build_backbone(stock_cfg)
    assert ws_names(backbone) and not ws_names(stock)
    torch.testing.assert_close(backbone.state_dict(), stock.state_dict())

    for conv in backbone.modules():
        if isinstance(conv, WSConv2d) and isinstance(conv.norm, FrozenBatchNorm2d):
            # As in a trained net: standardized filters scale unit-variance inputs by sqrt(fan-in),
            # which initial statistics, frozen at 1, would not undo.
            conv.norm.running_var.fill_(conv.weight[0].numel())
    x = torch.randn(2, 3, 64, 64)
    outputs = backbone(x)
    assert {k: v.shape for k, v in outputs.items()} == {k: v.shape for k, v in stock(x).items()}
    sum(y.pow(2).mean() for y in outputs.values()).backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_sync_bn_builds() -> None:
    names = ws_names(build_backbone(ws_config("MODEL.RESNETS.NORM", "SyncBN")))
    assert len(names) == CONVS_OF_DEPTH[18] + 8


@pytest.mark.parametrize("freeze_at, trainable", [(0, 20), (1, 19), (2, 15), (3, 10), (5, 0)])
def test_freeze_at_freezes_the_same_stages_as_stock(freeze_at: int, trainable: int) -> None:
    """R-18: 1 stem conv, 4 convs in res2, 5 in each further stage."""
    backbone = build_backbone(ws_config("MODEL.BACKBONE.FREEZE_AT", freeze_at)).bottom_up
    convs = [m for m in backbone.modules() if isinstance(m, WSConv2d)]
    assert sum(conv.weight.requires_grad for conv in convs) == trainable


def test_freeze_at_turns_batch_norm_of_frozen_stages_into_frozen_bn() -> None:
    backbone = build_backbone(
        ws_config("MODEL.BACKBONE.FREEZE_AT", 1, "MODEL.RESNETS.NORM", "BN")
    ).bottom_up
    assert isinstance(backbone.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(backbone.stem.conv1, WSConv2d)


@pytest.mark.parametrize("key, part, others", [("BACKBONE", 20, 8), ("FPN", 8, 20)])
def test_each_part_can_be_switched_off(key: str, part: int, others: int) -> None:
    backbone = build_backbone(ws_config(f"MODEL.WS.{key}", False))
    assert len(ws_names(backbone)) == others
    in_bottom_up = any(name.startswith("bottom_up.") for name in ws_names(backbone))
    assert in_bottom_up == (key == "FPN")


def test_mode_and_eps_reach_every_conv() -> None:
    backbone = build_backbone(ws_config("MODEL.WS.MODE", "bit", "MODEL.WS.EPS", 1e-6))
    convs = [m for m in backbone.modules() if isinstance(m, WSConv2d)]
    assert {(conv.ws_mode, conv.ws_eps) for conv in convs} == {("bit", 1e-6)}


def test_affine_reaches_every_conv_and_starts_alike_in_every_process() -> None:
    """Filters are initialized by other seeds there; detectron2's DDP does not broadcast buffers."""
    backbone = build_backbone(ws_config("MODEL.WS.AFFINE", True))
    convs = [m for m in backbone.modules() if isinstance(m, WSConv2d)]
    assert len(convs) == CONVS_OF_DEPTH[18] + 8
    for conv in convs:
        gamma, beta = conv.affine()
        assert (gamma == 1).all() and not beta.any()


def test_group_count_reaches_every_group_norm() -> None:
    for groups in (32, 16):
        backbone = build_backbone(ws_config("MODEL.WS.GN_GROUPS", groups))
        norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm)]
        assert len(norms) == 28 and {type(norm) for norm in norms} == {GroupNorm}
        assert {norm.num_groups for norm in norms} == {groups}


def test_group_count_that_does_not_divide_names_layer_channels_and_groups() -> None:
    cfg = ws_config("MODEL.WS.GN_GROUPS", 48, name="build_ws_resnet_backbone")
    with pytest.raises(ConfigError) as caught:
        build_backbone(cfg)
    for part in ("MODEL.WS.GN_GROUPS", "48", "64 channels", "backbone.stem.conv1.norm"):
        assert part in str(caught.value)
    cfg = ws_config("MODEL.FPN.OUT_CHANNELS", 48, "MODEL.WS.GN_GROUPS", 64)
    with pytest.raises(ConfigError, match="48 channels of backbone.fpn_lateral2.norm"):
        build_backbone(cfg)


def test_all_filters_of_an_fpn_are_one_part(launches: list[int]) -> None:
    backbone = build_backbone(ws_config())
    convs = [module for module in backbone.modules() if isinstance(module, WSConv2d)]
    backbone(torch.randn(1, 3, 64, 64))
    assert launches == [len(convs)]


def test_compiled_fpn_equals_eager() -> None:
    backbone = build_backbone(ws_config())
    compiled = torch.compile(backbone, backend="eager", dynamic=False)
    x = torch.randn(1, 3, 64, 64)
    results = [sum(y.square().mean() for y in model(x).values()) for model in (backbone, compiled)]
    weights = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(result, weights) for result in results]
    torch.testing.assert_close(*results)
    # the formula of WS instead of fused kernels, 28 convs deep
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)


def test_scripted_fpn_equals_eager() -> None:
    # detectron2's own way of making its backbones scriptable; its module imports caffe2 in 0.6
    patches = pytest.importorskip("detectron2.export.torchscript_patch", exc_type=ImportError)
    patches.patch_nonscriptable_classes()
    backbone = build_backbone(ws_config()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # Scripts take the formula of WS, eager the fused kernels: rounding differs, 28 convs deep.
        torch.testing.assert_close(torch.jit.script(backbone)(x), backbone(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "opts, parts",
    [
        (["MODEL.RESNETS.DEPTH", 42], ["MODEL.RESNETS.DEPTH", "42", "50"]),
        (["MODEL.RESNETS.NORM", "GroupNorm"], ["MODEL.RESNETS.NORM", "GroupNorm", '"GN"']),
        (["MODEL.FPN.NORM", "gn"], ["MODEL.FPN.NORM", "'gn'", '"GN"']),
        (["MODEL.RESNETS.NORM", ""], ["MODEL.RESNETS.NORM", "norm layer"]),
        (["MODEL.FPN.NORM", ""], ["MODEL.FPN.NORM", "norm layer"]),
        (
            ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]],
            ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "all False"],
        ),
    ],
)
def test_refuses_by_key(opts: list, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_backbone(bottleneck(*opts))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_registered_under_the_function_names() -> None:
    for name in ("resnet", "resnet_fpn", "retinanet_resnet_fpn"):
        assert f"build_ws_{name}_backbone" in BACKBONE_REGISTRY
