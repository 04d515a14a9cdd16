"""Affine WS and weight files: plain ones fill its buffers, its own bring theirs."""

import copy
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone, build_model
from torch import nn
from weight_samples import small_config

from ws_detectron.checkpoint import (
    METADATA_KEY,
    WeightsError,
    WSCheckpointer,
    convert_file,
    read_weight_file,
    write_detectron2,
)
from ws_detectron.layers import WSConv2d
from ws_detectron.modeling import fold_ws

FORMS = {
    "plain": {"ws": False},
    "ws": {"ws": True},
    "affine": {"ws": True, "affine": True},
}


def model_of(ws: bool, affine: bool = False, mode: str = "aws") -> nn.Module:
    """A small Mask R-CNN with GN, and WS on 30 convs: 20 in R-18, 8 in the FPN, 1 in each head."""
    cfg = small_config(ws=ws)
    cfg.MODEL.MASK_ON, mask = True, cfg.MODEL.ROI_MASK_HEAD
    mask.NAME = "WSMaskRCNNConvUpsampleHead" if ws else "MaskRCNNConvUpsampleHead"
    mask.NORM, mask.NUM_CONV, mask.CONV_DIM, mask.POOLER_RESOLUTION = "GN", 1, 32, 7
    if affine:
        cfg.MODEL.WS.AFFINE, cfg.MODEL.WS.MODE = True, mode
    return build_model(cfg).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {name: model_of(**kwargs) for name, kwargs in FORMS.items()}
    with torch.no_grad():  # mean, scale and norms as of a trained net
        for name, parameter in made["plain"].named_parameters():
            if parameter.dim() == 4:
                per_filter = torch.randn(len(parameter), 1, 1, 1)
                parameter += 0.2 * parameter.std() * per_filter
                parameter *= torch.exp(0.3 * per_filter)
            elif ".norm." in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return made


def saved(net: nn.Module, path: Path, **entries: Any) -> Path:
    """A checkpoint with other entries; None removes one."""
    WSCheckpointer(net, str(path.parent)).save(path.stem)
    content = {**read_weight_file(path), **entries}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def loaded(model: nn.Module, path: Path, **kwargs: Any) -> nn.Module:
    model = copy.deepcopy(model)
    WSCheckpointer(model, **kwargs).load(str(path))
    return model


def refusal(model: nn.Module, path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        loaded(model, path)
    return str(caught.value)


@torch.no_grad()
def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Of backbone, box head and mask head."""
    torch.manual_seed(0)
    features = model.backbone(torch.randn(1, 3, 64, 64))
    pooled, heads = torch.randn(3, 32, 7, 7), model.roi_heads
    return [*features.values(), heads.box_head(pooled), heads.mask_head.layers(pooled)]


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(outputs(one), outputs(other)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def trained(model: nn.Module) -> nn.Module:
    """A copy whose filters differ, as after a training."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for conv in model.modules():
            if isinstance(conv, WSConv2d):
                conv.weight += 0.5 * conv.weight.std() * torch.randn_like(conv.weight)
    return model


@pytest.mark.parametrize("known", [True, False])
def test_plain_weights_give_the_plain_outputs(
    models: dict[str, nn.Module], tmp_path: Path, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(models["plain"], tmp_path / "x.pth", **({} if known else {METADATA_KEY: None}))
    with caplog.at_level(logging.INFO, logger="ws_detectron"):
        model = loaded(models["affine"], path, whole=True)
    assert "plain filters give the affine WS of 30 convs" in caplog.text
    assert ("affine WS, which takes them as plain" in caplog.text) != known
    assert_close(model, models["plain"])
    for a, b in zip(outputs(trained(model)), outputs(model)):
        assert not torch.allclose(a, b, atol=0.01)


def test_a_checkpoint_brings_its_own(models: dict[str, nn.Module], tmp_path: Path) -> None:
    """They are not taken again from filters that have been trained since, also on resume."""
    start = loaded(models["affine"], saved(models["plain"], tmp_path / "x.pth"))
    model = trained(start)
    metadata = read_weight_file(saved(model, tmp_path / "model_0000001.pth"))[METADATA_KEY]
    form = {"mode": "aws", "eps": 1e-5, "affine": True}
    assert list(metadata["ws_convs"].values()) == [form] * 30
    again = copy.deepcopy(models["affine"])
    WSCheckpointer(again, str(tmp_path)).resume_or_load("", resume=True)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    stem = "backbone.bottom_up.stem.conv1.weight"
    beta = start.state_dict()[stem].mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(again.state_dict()[f"{stem}_beta"], beta)
    without = saved(model, tmp_path / "model_0000001.pth", **{METADATA_KEY: None})
    assert_close(loaded(models["affine"], without), model)


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        ("plain", "ws", "set MODEL.WS.AFFINE True, which starts from plain weights"),
        ("ws", "affine", r"30 convs: .* in the model; set MODEL.WS.AFFINE False"),
        ("affine", "ws", r"30 convs: .* in the model; set MODEL.WS.AFFINE True"),
        ("affine", "plain", "30 convs were trained with WS and are plain in the model"),
    ],
)
def test_others_do_not_fit(
    models: dict[str, nn.Module], tmp_path: Path, file: str, model: str, message: str
) -> None:
    path = saved(models[file], tmp_path / "x.pth")
    assert re.search(message, refusal(models[model], path))
    if file == "affine":
        saved(models[file], path, **{METADATA_KEY: None})
        found = refusal(models[model], path)
        assert "30 convs have affine WS in the file only" in found
        assert "set MODEL.WS.AFFINE True" in found


def test_paper_and_official_differ_where_a_beta_is_added(
    models: dict[str, nn.Module], tmp_path: Path
) -> None:
    path = saved(models["affine"], tmp_path / "x.pth")
    metadata = read_weight_file(path)[METADATA_KEY]
    form = {"mode": "paper", "eps": 1e-5, "affine": True}
    metadata["ws_convs"] = dict.fromkeys(metadata["ws_convs"], form)
    saved(models["affine"], path, **{METADATA_KEY: metadata})
    model = model_of(ws=True, affine=True, mode="official")
    assert "another form of WS" in refusal(model, path)


def test_incomplete_affine_weights_are_refused(
    models: dict[str, nn.Module], tmp_path: Path
) -> None:
    path = saved(models["affine"], tmp_path / "x.pth")
    state = read_weight_file(path)["model"]
    beta = "backbone.fpn_lateral2.weight_beta"
    for metadata in ({}, {METADATA_KEY: None}):
        less = {key: value for key, value in state.items() if key != beta}
        saved(models["affine"], path, model=less, **metadata)
        assert "incomplete at backbone.fpn_lateral2" in refusal(models["affine"], path)
    plain = models["plain"]
    saved(plain, path, model={**plain.state_dict(), beta: state[beta]})
    assert "incomplete at backbone.fpn_lateral2" in refusal(models["affine"], path)


def test_folded_on_loading_and_by_hand(models: dict[str, nn.Module], tmp_path: Path) -> None:
    model = trained(loaded(models["affine"], saved(models["plain"], tmp_path / "x.pth")))
    path = saved(model, tmp_path / "y.pth")
    assert_close(loaded(models["plain"], path, fold=True, whole=True), model)
    folded = fold_ws(copy.deepcopy(model))
    assert_close(folded, model)
    assert_close(loaded(models["plain"], saved(folded, path)), model)


def resnet(ws: bool) -> nn.Module:
    cfg = small_config(ws=ws, norm="FrozenBN")
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("_fpn", "")
    cfg.MODEL.WS.AFFINE, cfg.MODEL.WS.MODE = ws, "aws"
    return build_backbone(cfg).eval()


def torchvision_weights() -> dict[str, torch.Tensor]:
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.state_dict()


@pytest.mark.parametrize("source", ["torchvision", "timm", "detectron2's zoo"])
def test_published_plain_resnets(source: str, tmp_path: Path) -> None:
    torch.save(torchvision_weights(), tmp_path / "resnet18.pth")
    converted = convert_file(
        tmp_path / "resnet18.pth", "timm" if source == "timm" else "torchvision"
    )
    path = tmp_path / "R-18.pkl"
    write_detectron2(converted, path)
    if source == "detectron2's zoo":  # as its convert-torchvision-to-d2.py writes them
        content = {"model": {k: v.numpy() for k, v in converted.state.items()}}
        content.update({"__author__": "torchvision", "matching_heuristics": True})
        path.write_bytes(pickle.dumps(content))
    affine, plain = resnet(ws=True), resnet(ws=False)
    for model in (affine, plain):
        WSCheckpointer(model).load(str(path))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, expected in plain(x).items():
            limit = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(affine(x)[name], expected, rtol=0, atol=limit)


def test_caffe2_style_weights(tmp_path: Path) -> None:
    """As in detectron2's MSRA files, BN is an affine layer there."""
    weight, scale = torch.randn(64, 3, 7, 7) + 0.5, torch.rand(64) + 0.5
    blobs = {"conv1_w": weight, "res_conv1_bn_s": scale, "res_conv1_bn_b": torch.zeros(64)}
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps({"blobs": {k: v.numpy() for k, v in blobs.items()}}))
    stem = loaded(resnet(ws=True), path).stem.conv1
    x = torch.randn(1, 3, 16, 16)
    expected = nn.functional.conv2d(x, weight * scale.view(-1, 1, 1, 1), stride=2, padding=3)
    torch.testing.assert_close(stem(x), expected, rtol=1e-4, atol=1e-3)
