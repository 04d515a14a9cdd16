import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weight_samples import as_state, constant, mmdet_keys, other_detector, torchvision_keys

from ws_detectron.checkpoint import (
    METADATA_KEY,
    WeightMetadata,
    WeightsError,
    WSForm,
    convert_file,
    read_weight_file,
    write_detectron2,
    write_mmdet,
)
from ws_detectron.checkpoint.conversion import sha256_of
from ws_detectron.checkpoint.sources import PUBLISHED, mmdet_key

Save = Callable[..., Path]


def mmdet_file(save: Save, **changes: Any) -> Path:
    return save(as_state(mmdet_keys(**changes)), "mask_rcnn.pth", meta={"cfg": "model = ..."})


def test_published_detector_gets_every_tensor_and_its_settings(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = mmdet_keys()
    state = as_state(keys)
    path = save(state, "mask.pth")
    name = "mmdet/mask_rcnn_r50_fpn_gn_ws-all_2x_coco"
    file = PUBLISHED[name]._replace(sha256=sha256_of(path)[:8])
    monkeypatch.setitem(PUBLISHED, name, file)
    converted = convert_file(path)
    assert len(converted.state) == len(keys)
    for key, value in state.items():
        target = converted.state[str(mmdet_key(key))]
        assert target.shape == value.shape
        assert target.flatten()[0] == value.flatten()[0]
    metadata = converted.metadata
    # 20 convs in the ResNet, 8 in the FPN, 4 in each head
    assert len(metadata.ws_convs) == 36
    assert set(metadata.ws_convs.values()) == {WSForm("official", 1e-5)}
    assert "proposal_generator.rpn_head.conv" not in metadata.ws_convs
    assert (metadata.source, metadata.architecture) == ("mmdet", "R-18")
    assert (metadata.norm, metadata.gn_groups) == ("GN", 32)
    assert metadata.stride_in_1x1 is False
    assert metadata.preprocessing is not None
    assert metadata.preprocessing.input_format == "RGB"
    assert metadata.preprocessing.pixel_mean == (123.675, 116.28, 103.53)
    assert not converted.matching_heuristics
    assert converted.record.to_check == []


@pytest.mark.parametrize("masks", [True, False])
def test_round_trip_is_the_identity(save: Save, tmp_path: Path, masks: bool) -> None:
    original = mmdet_file(save, masks=masks)
    write_detectron2(convert_file(original, ws=True), tmp_path / "d2.pth")
    write_mmdet(tmp_path / "d2.pth", tmp_path / "back.pth")
    before = read_weight_file(original)["state_dict"]
    after = read_weight_file(tmp_path / "back.pth")["state_dict"]
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("letters", ["gn", "bn"])
def test_round_trip_of_a_resnet_alone(save: Save, tmp_path: Path, letters: str) -> None:
    state = as_state(torchvision_keys("resnet18", letters))
    converted = convert_file(save(state), ws=letters == "gn")
    assert converted.matching_heuristics
    write_detectron2(converted, tmp_path / "d2.pth")
    write_mmdet(tmp_path / "d2.pth", tmp_path / "back.pth")
    after = read_weight_file(tmp_path / "back.pth")["state_dict"]
    assert after.keys() == state.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_file_for_detectron2_says_what_it_is(save: Save, tmp_path: Path) -> None:
    state = as_state(torchvision_keys("resnet18", "bn"))
    state["fc.weight"], state["fc.bias"] = constant(1, (1000, 512)), constant(1, (1000,))
    state["bn1.num_batches_tracked"] = torch.tensor(7)
    path = save(state, "resnet18.pth")
    converted = convert_file(path)
    write_detectron2(converted, tmp_path / "out.pkl")
    with open(tmp_path / "out.pkl", "rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True
    assert "resnet18.pth" in content["__author__"]
    assert all(isinstance(value, np.ndarray) for value in content["model"].values())
    metadata = WeightMetadata.from_dict(content[METADATA_KEY], "out.pkl")
    assert metadata == converted.metadata
    assert metadata.ws_convs == {}
    ignored = {e.source: e.note for e in converted.record.entries if e.target is None}
    assert set(ignored) == {"fc.weight", "fc.bias", "bn1.num_batches_tracked"}
    assert all(ignored.values()), "each has a reason"
    with pytest.raises(WeightsError, match=r"\.pth or \.pkl"):
        write_detectron2(converted, tmp_path / "out.bin")


def test_authors_file(save: Save) -> None:
    state = {
        f"module.{key}": value
        for key, value in as_state(torchvision_keys("resnet50", "gn")).items()
        for key in [key.replace("gn", "bn")]
    }
    converted = convert_file(save(state, "R-50-GN-WS.pth.tar", epoch=90, arch="resnet50"))
    assert converted.metadata.source == "ws-authors"
    assert len(converted.metadata.ws_convs) == 53
    assert "stem.conv1" in converted.metadata.ws_convs


def test_gn_under_torchvision_names_is_ambiguous(save: Save) -> None:
    keys = torchvision_keys("resnet18", "gn")
    path = save(as_state({key.replace("gn", "bn"): shape for key, shape in keys.items()}))
    with pytest.raises(WeightsError, match="--source ws-authors or --source timm"):
        convert_file(path)
    assert convert_file(path, "timm").metadata.ws_convs == {}
    assert len(convert_file(path, "ws-authors").metadata.ws_convs) == 20


def test_caffe2_pickle(tmp_path: Path) -> None:
    blobs = {"pred_w": np.zeros((1000, 512), "f4"), "pred_b": np.zeros(1000, "f4")}
    endings = {".conv.weight": "_w", ".gn.weight": "_gn_s", ".gn.bias": "_gn_b"}
    for key, shape in torchvision_keys("resnet18", "gn").items():
        name = re.sub(r"^(conv|gn)1\.", r"conv1.\1.", key)
        name = re.sub(r"layer(\d)\.(\d)\.downsample\.0", r"res\1_\2_branch1.conv", name)
        name = re.sub(r"layer(\d)\.(\d)\.downsample\.1", r"res\1_\2_branch1.gn", name)
        name = re.sub(r"layer(\d)\.(\d)\.(conv|gn)1", r"res\1_\2_branch2a.\3", name)
        name = re.sub(r"layer(\d)\.(\d)\.(conv|gn)2", r"res\1_\2_branch2b.\3", name)
        name = re.sub(r"^res(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        for ending, blob in endings.items():
            name = name.replace(ending, blob)
        blobs[name] = np.ones(shape, "f4")
    path = tmp_path / "R-18.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    with pytest.raises(WeightsError, match="--source ws-authors-caffe2"):
        convert_file(path)
    converted = convert_file(path, "ws-authors-caffe2")
    preprocessing = converted.metadata.preprocessing
    assert preprocessing is not None
    assert preprocessing.input_format == "BGR"
    assert preprocessing.pixel_std == (1.0, 1.0, 1.0)
    assert len(converted.metadata.ws_convs) == 20
    named = path.rename(tmp_path / "R-18-GN-WS.pkl")
    assert convert_file(named).metadata.source == "ws-authors-caffe2"


def test_unknown_ws_must_be_said(save: Save) -> None:
    path = save(as_state(mmdet_keys()), "mask.pth")
    with pytest.raises(WeightsError, match="--ws"):
        convert_file(path)
    assert convert_file(path, ws=False).metadata.ws_convs == {}
    assert len(convert_file(path, ws=True).metadata.ws_convs) == 36
    converted = convert_file(path, ws=True)
    # nothing is recorded that the file does not tell; the user is told what to check
    metadata = converted.metadata
    assert (metadata.preprocessing, metadata.stride_in_1x1, metadata.gn_groups) == (None,) * 3
    summary = converted.record.summary()
    for key in ("INPUT.FORMAT", "STRIDE_IN_1X1", "GN_GROUPS", "ANCHOR_GENERATOR", "BBOX_REG"):
        assert re.search(rf"  to check: .*{key}", summary)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("backbone.layer1.0.se.fc1.weight", "attention"),
        ("backbone.layer1.0.conv1.weight_gamma", "ConvAWS"),
        ("backbone.layer2.0.conv2_offset.weight", "deformable"),
        ("backbone.layer1.7.conv1.weight", "9 basic blocks in its ResNet; supported: R-18, R-34"),
        ("backbone.layer1.0.conv1.bias", "unexpected: .*res2.0.conv1.bias"),
        ("roi_head.semantic_head.convs.weight", "has no keys roi_head.semantic"),
        ("neck.lateral_convs.4.conv.weight", "has no keys neck.lateral_convs.4"),
    ],
)
def test_unexpected_tensors_are_errors(save: Save, key: str, message: str) -> None:
    path = save(as_state({**mmdet_keys(), key: (64, 64, 3, 3)}), "mask.pth")
    with pytest.raises(WeightsError, match=message):
        convert_file(path, ws=True)


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("rpn_head.rpn_cls.weight", (9, 256, 1, 1), (3, 256, 1, 1)),
        ("rpn_head.rpn_reg.weight", (24, 256, 1, 1), (12, 256, 1, 1)),
        ("roi_head.bbox_head.fc_reg.weight", (77, 1024), (320, 1024)),
        ("roi_head.mask_head.conv_logits.weight", (7, 256, 1, 1), (80, 256, 1, 1)),
        ("roi_head.bbox_head.shared_fcs.0.weight", (1024, 50176), (1024, 12544)),
        ("neck.fpn_convs.1.conv.weight", (128, 256, 3, 3), (256, 256, 3, 3)),
        ("backbone.layer1.0.conv1.weight", (64, 64, 1, 1), (64, 64, 3, 3)),
        ("backbone.gn1.weight", (32,), (64,)),
    ],
)
def test_other_shapes_are_errors(
    save: Save, key: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    path = save(as_state({**mmdet_keys(), key: shape}), "mask.pth")
    with pytest.raises(WeightsError) as caught:
        convert_file(path, ws=True)
    assert f"wrong shape: {mmdet_key(key)} {shape} instead of {expected}" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "backbone.layer4.1.conv2.weight",
        "backbone.gn1.bias",
        "neck.fpn_convs.2.conv.weight",
        "rpn_head.rpn_cls.weight",
        "roi_head.bbox_head.fc_cls.weight",
    ],
)
def test_missing_tensors_are_errors(save: Save, key: str) -> None:
    keys = mmdet_keys()
    del keys[key]
    with pytest.raises(WeightsError, match=f"missing: {mmdet_key(key)}"):
        convert_file(save(as_state(keys), "mask.pth"), ws=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(save: Save, value: float) -> None:
    state = as_state(mmdet_keys())
    state["rpn_head.rpn_cls.bias"] = torch.tensor([0.0, value, 0.0])
    with pytest.raises(WeightsError, match="NaN or infinite.*objectness_logits.bias"):
        convert_file(save(state, "mask.pth"))


def test_allowed_key_is_left_out(save: Save) -> None:
    state = {**as_state(torchvision_keys("resnet18", "bn")), "extra.weight": torch.ones(1)}
    path = save(state)
    with pytest.raises(WeightsError, match="--allow"):
        convert_file(path)
    converted = convert_file(path, allow=["extra.*"])
    assert "extra.weight" not in converted.state
    (entry,) = [e for e in converted.record.entries if e.source == "extra.weight"]
    assert (entry.target, entry.note) == (None, "unexpected, allowed by name")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["root.conv.weight", "body.block1.unit01.conv1.weight"], "layout of bit_pytorch"),
        (
            ["stem.conv.weight"]
            + [f"stages.0.blocks.0.norm1.{name}" for name in ("weight", "running_mean")],
            "ResNetV2 that is not BiT",
        ),
        (["stem.conv1.weight", "stages.0.blocks.0.norm1.weight"], "ResNetV2 that is not BiT"),
        (
            ["stem.conv.weight", "stem.norm.weight", "stages.0.blocks.0.norm1.weight"],
            "ResNetV2 that is not BiT",
        ),
        (["conv1.0.weight", "layer1.0.conv1.weight"], "three 3x3 convs"),
        (["bbox_head.shared_fcs.0.weight", "rpn_head.rpn_conv.weight"], "1.x"),
        (["encoder.weight"], "has an unknown format"),
    ],
)
def test_models_that_cannot_be_are_refused_with_the_reason(
    save: Save, keys: list[str], reason: str
) -> None:
    with pytest.raises(WeightsError, match=reason):
        convert_file(save({key: torch.ones(1) for key in keys}))


def test_half_precision_becomes_single(save: Save) -> None:
    state = as_state(torchvision_keys("resnet18", "bn"))
    state["conv1.weight"] = torch.full((), 0.5, dtype=torch.float16).expand(64, 3, 7, 7)
    converted = convert_file(save(state))
    assert converted.state["stem.conv1.weight"].dtype == torch.float32
    (note,) = [e.note for e in converted.record.entries if e.source == "conv1.weight"]
    assert "float16" in note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "no tensors"),
        ({"state_dict": {"conv1.weight": "text"}}, "is a str"),
        ({"state_dict": {1: torch.ones(1)}}, "not a tensor"),
        ({}, "no tensors"),
    ],
)
def test_files_without_weights(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        convert_file(tmp_path / "x.pth")


def test_own_file_gets_metadata(save: Save, tmp_path: Path) -> None:
    state = {"backbone.bottom_up.stem.conv1.weight": torch.ones(64, 3, 7, 7)}
    state["backbone.bottom_up.stem.conv1.norm.weight"] = torch.ones(64)
    path = tmp_path / "model_final.pth"
    torch.save({"model": state, "iteration": 5}, path)
    with pytest.raises(WeightsError, match="--ws"):
        convert_file(path)
    converted = convert_file(path, ws=True)
    assert list(converted.metadata.ws_convs) == ["backbone.bottom_up.stem.conv1"]
    write_detectron2(converted, tmp_path / "tagged.pth")
    with pytest.raises(WeightsError, match="needs no conversion"):
        convert_file(tmp_path / "tagged.pth")


def test_mmdet_has_no_place_for_other_models_or_forms_of_ws(tmp_path: Path) -> None:
    path, out = tmp_path / "model.pth", tmp_path / "out.pth"
    state = {"backbone.bottom_up.stem.conv1.weight": torch.ones(64, 3, 7, 7)}
    torch.save({"model": {**state, "head.cls_score.weight": torch.ones(1)}}, path)
    with pytest.raises(WeightsError, match=r"head\.cls_score\.weight"):
        write_mmdet(path, out)
    metadata = WeightMetadata("training", ws_convs={"stem.conv1": WSForm("bit", 1e-6)})
    torch.save({"model": state, METADATA_KEY: metadata.as_dict()}, path)
    with pytest.raises(WeightsError, match="ConvWS"):
        write_mmdet(path, out)
    assert not out.exists()
    write_mmdet(path, out, allow=["ws"])
    assert list(read_weight_file(out)["state_dict"]) == ["backbone.conv1.weight"]


@pytest.mark.parametrize("values", [None, {}, {"version": 1}, "text", [1, 2]])
def test_metadata_of_another_form_names_the_file(values: Any) -> None:
    with pytest.raises(WeightsError, match=r"file\.pth"):
        WeightMetadata.from_dict(values, "file.pth")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("version", 99, "another version"),
        ("ws_convs", {"a": {"mode": "wrong", "eps": 1e-5}}, "mode must be one of"),
        ("ws_convs", {"a": {"mode": "bit", "eps": -1}}, "eps must be a number > 0"),
        ("ws_convs", {"a": {"mode": "bit"}}, "eps"),
        ("ws_convs", {"a": {"mode": "bit", "eps": 1e-5, "affine": "yes"}}, "affine is .yes"),
        ("preprocessing", {"input_format": "RGB"}, "pixel_mean"),
        ("surplus", 1, "surplus"),
    ],
)
def test_unusable_metadata_says_what_is_wrong(entry: str, value: Any, message: str) -> None:
    values = WeightMetadata("training").as_dict()
    assert WeightMetadata.from_dict(values, "file.pth") == WeightMetadata("training")
    with pytest.raises(WeightsError, match=message):
        WeightMetadata.from_dict({**values, entry: value}, "file.pth")


@pytest.mark.parametrize("source", ["auto", "detectron2", "torchvision", "mmdet"])
@pytest.mark.parametrize("library", ["torchvision", "torchvision retinanet", "maskrcnn-benchmark"])
def test_detector_of_another_library_is_named(tmp_path: Path, library: str, source: str) -> None:
    state: dict[str, Any] = other_detector(library)
    if library == "maskrcnn-benchmark":  # as its checkpointer saves them
        state = {"model": {f"module.{key}": value for key, value in state.items()}}
    path = tmp_path / "x.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError, match=f"is a {library.split()[0]} detector .*backbone would"):
        convert_file(path, source, ws=False)


@pytest.mark.parametrize(
    "model, letters, name, convs",
    [
        ("resnet18", "bn", "R-18", 20),
        ("resnet34", "gn", "R-34", 36),
        ("resnet101", "gn", "R-101", 104),
        ("resnet152", "bn", "R-152", 155),
        ("resnext50_32x4d", "bn", "X-50-32x4d", 53),
        ("wide_resnet50_2", "bn", "R-50-width128", 53),
    ],
)
def test_architecture_is_inferred(
    save: Save, model: str, letters: str, name: str, convs: int
) -> None:
    path = save(as_state(torchvision_keys(model, letters)))
    converted = convert_file(path, ws=letters == "gn")
    assert converted.metadata.architecture == name
    assert len([key for key, value in converted.state.items() if value.dim() == 4]) == convs


def test_detector_with_bn_and_another_head(save: Save) -> None:
    """As mmdetection's mask_rcnn_r50_fpn, and class-agnostic."""
    body = {f"backbone.{key}": s for key, s in torchvision_keys("resnet18", "bn").items()}
    other = re.compile(r"backbone\.|.*\.gn\.|.*\.shared_convs\.")
    keys = {key: shape for key, shape in mmdet_keys().items() if not other.match(key)}
    convs = [key for key in keys if key.endswith(".conv.weight")]
    keys |= {key.replace(".weight", ".bias"): (256,) for key in convs}
    fc = "roi_head.bbox_head.shared_fcs.1"
    keys |= {f"{fc}.weight": (1024, 1024), f"{fc}.bias": (1024,)}
    fc = "roi_head.bbox_head.fc_reg"
    keys |= {f"{fc}.weight": (4, 1024), f"{fc}.bias": (4,)}
    converted = convert_file(save(as_state({**body, **keys}), "mask.pth"))
    assert converted.metadata.norm == "BN" and not converted.metadata.ws_convs
    assert len(converted.state) == len(body) + len(keys)
