import copy
import logging
import os
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_resnet_backbone
from torch import nn
from weight_samples import other_detector, small_config, small_model

from ws_detectron.checkpoint import (
    METADATA_KEY,
    WeightsError,
    WSCheckpointer,
    check_fit,
    convert_file,
    describe_model,
    read_weight_file,
    write_detectron2,
)
from ws_detectron.checkpoint.fit import outputs_differ
from ws_detectron.checkpoint.metadata import WSForm
from ws_detectron.layers import WSConv2d
from ws_detectron.modeling import REGISTRATIONS, fold_ws


@pytest.fixture(scope="module")
def ws_model() -> nn.Module:
    torch.manual_seed(0)
    return small_model(ws=True)


@pytest.fixture(scope="module")
def plain_model() -> nn.Module:
    torch.manual_seed(1)
    return small_model(ws=False)


@pytest.fixture
def ws_file(ws_model: nn.Module, tmp_path: Path) -> Path:
    return saved(ws_model, tmp_path / "ws")


@pytest.fixture
def plain_file(plain_model: nn.Module, tmp_path: Path) -> Path:
    return saved(plain_model, tmp_path / "plain")


def saved(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    WSCheckpointer(model, str(folder)).save("model")
    return folder / "model.pth"


def changed(path: Path, **entries: Any) -> Path:
    """The file with other entries; None removes one."""
    content = {**read_weight_file(path), **entries}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def refusal(model: nn.Module, path: Path, **kwargs: Any) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        WSCheckpointer(model, **kwargs).load(str(path))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "nothing was loaded"
    return str(caught.value)


def test_save_and_load(ws_model: nn.Module, ws_file: Path) -> None:
    other = copy.deepcopy(ws_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    WSCheckpointer(other).load(str(ws_file))
    for key, value in ws_model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_saved_file_says_what_it_needs(ws_model: nn.Module, ws_file: Path) -> None:
    metadata = read_weight_file(ws_file)[METADATA_KEY]
    names = [name for name, m in ws_model.named_modules() if isinstance(m, WSConv2d)]
    assert list(metadata["ws_convs"]) == names
    assert len(names) == 20 + 8 + 1
    assert metadata["norm"] == "GN"
    assert metadata["gn_groups"] == 32
    assert metadata["preprocessing"]["input_format"] == "RGB"
    # R-18 has no bottlenecks, so the key does not apply
    assert metadata["stride_in_1x1"] is None


def test_plain_weights_in_a_ws_model(ws_model: nn.Module, plain_file: Path) -> None:
    message = refusal(ws_model, plain_file)
    assert "29 convs are WS in the model and were trained without it" in message
    assert "backbone.bottom_up.stem.conv1" in message or "fpn_lateral2" in message


def test_ws_weights_in_a_plain_model(plain_model: nn.Module, ws_file: Path) -> None:
    message = refusal(plain_model, ws_file)
    assert "29 convs were trained with WS and are plain in the model" in message
    assert all(row.key in message for row in REGISTRATIONS)


def test_ws_weights_are_folded_on_request(
    ws_model: nn.Module, plain_model: nn.Module, ws_file: Path
) -> None:
    model = copy.deepcopy(plain_model)
    WSCheckpointer(model, fold=True).load(str(ws_file))
    folded = fold_ws(copy.deepcopy(ws_model))
    for key, value in folded.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone(image)["p3"], ws_model.backbone(image)["p3"], rtol=1e-4, atol=1e-4
        )


def test_check_can_be_turned_off(
    ws_model: nn.Module, plain_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(ws_model)
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        WSCheckpointer(model, check=False).load(str(plain_file))
    assert "does not fit" in caplog.text
    plain = read_weight_file(plain_file)["model"]
    assert torch.equal(
        model.state_dict()["backbone.fpn_lateral2.weight"], plain["backbone.fpn_lateral2.weight"]
    )


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("ws", ("bit", 1e-5), "MODEL.WS.MODE"),
        ("ws", ("official", 1e-3), "MODEL.WS.EPS"),
        ("gn_groups", 16, "GN_GROUPS.* is 32; the weights were trained with 16"),
        ("input_format", "BGR", "INPUT.FORMAT is RGB; the weights were trained with BGR"),
        ("pixel_mean", [103.53, 116.28, 123.675], "MODEL.PIXEL_MEAN"),
        ("pixel_std", [1.0, 1.0, 1.0], "MODEL.PIXEL_STD"),
        ("norm", "BN", ""),
    ],
)
def test_settings_that_do_not_fit(
    ws_model: nn.Module, ws_file: Path, entry: str, value: Any, message: str
) -> None:
    metadata = read_weight_file(ws_file)[METADATA_KEY]
    if entry == "ws":
        form = {"mode": value[0], "eps": value[1]}
        metadata["ws_convs"] = dict.fromkeys(metadata["ws_convs"], form)
    elif entry in metadata["preprocessing"]:
        metadata["preprocessing"][entry] = value
    else:
        metadata[entry] = value
    changed(ws_file, **{METADATA_KEY: metadata})
    if not message:  # the norm is judged by the tensors
        WSCheckpointer(copy.deepcopy(ws_model)).load(str(ws_file))
        return
    assert re.search(message, refusal(ws_model, ws_file))


def test_paper_form_is_a_constant_factor(
    ws_model: nn.Module, ws_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = read_weight_file(ws_file)[METADATA_KEY]
    metadata["ws_convs"] = {name: {"mode": "paper", "eps": 1e-5} for name in metadata["ws_convs"]}
    changed(ws_file, **{METADATA_KEY: metadata})
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        WSCheckpointer(copy.deepcopy(ws_model)).load(str(ws_file))
    assert caplog.text.count("a constant factor") == 1


def test_stride_in_the_other_conv() -> None:
    # one stage is enough, and R-50's is small
    def backbone(in_1x1: bool) -> nn.Module:
        cfg = small_config(ws=False, depth=50)
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = in_1x1
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3"]
        return build_resnet_backbone(cfg, ShapeSpec(channels=3))

    here, there = backbone(False), backbone(True)
    (problem,) = check_fit(here, there.state_dict(), describe_model(there)).problems
    assert "MODEL.RESNETS.STRIDE_IN_1X1 is False; the weights were trained with True" in problem
    assert not check_fit(here, here.state_dict(), describe_model(here)).problems


def test_other_depth_is_refused(plain_model: nn.Module, tmp_path: Path) -> None:
    path = saved(small_model(ws=False, depth=34), tmp_path)
    message = refusal(plain_model, path)
    assert "3 blocks in the file and 2" in message
    assert "MODEL.RESNETS.DEPTH" in message


def test_other_width_is_refused(plain_model: nn.Module, plain_file: Path) -> None:
    state = read_weight_file(plain_file)["model"]
    state["backbone.bottom_up.res2.0.conv1.weight"] = torch.ones(32, 64, 3, 3)
    assert "(32, 64, 3, 3) instead of (64, 64, 3, 3)" in refusal(
        plain_model, changed(plain_file, model=state)
    )


def test_other_classes_are_no_misfit(ws_model: nn.Module, ws_file: Path) -> None:
    state = read_weight_file(ws_file)["model"]
    state["roi_heads.box_predictor.cls_score.weight"] = torch.ones(5, 32)
    WSCheckpointer(copy.deepcopy(ws_model)).load(str(changed(ws_file, model=state)))


def test_bn_weights_in_a_gn_model_and_back(
    plain_model: nn.Module, plain_file: Path, tmp_path: Path
) -> None:
    bn_model = small_model(ws=False, norm="BN")
    bn_file = saved(bn_model, tmp_path)
    assert "the file has BN statistics" in refusal(plain_model, bn_file)
    assert "were trained with GN" in refusal(bn_model, plain_file)
    state = {k: v for k, v in bn_model.state_dict().items() if ".running_" not in k}
    assert "the file has no BN statistics for" in "".join(check_fit(bn_model, state, None).warnings)


def test_nan_weights(ws_model: nn.Module, ws_file: Path) -> None:
    state = read_weight_file(ws_file)["model"]
    state["backbone.fpn_lateral2.weight"][0, 0] = float("nan")
    assert "backbone.fpn_lateral2.weight" in refusal(ws_model, changed(ws_file, model=state))


def test_file_of_another_model(ws_model: nn.Module, ws_file: Path) -> None:
    message = refusal(ws_model, changed(ws_file, model={"encoder.weight": torch.ones(1)}))
    assert "no tensor of the file has a name in the model" in message


def test_without_metadata_there_is_a_warning(
    ws_model: nn.Module, plain_model: nn.Module, ws_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed(ws_file, **{METADATA_KEY: None})
    for model in (ws_model, plain_model):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="ws_detectron"):
            WSCheckpointer(copy.deepcopy(model)).load(str(ws_file))
        assert "does not say whether its convs were trained with WS" in caplog.text


def test_known_plain_author_in_a_ws_model(ws_model: nn.Module, plain_file: Path) -> None:
    changed(plain_file, **{METADATA_KEY: None, "__author__": "torchvision"})
    assert "weights of torchvision were trained without it" in refusal(ws_model, plain_file)


def test_caffe2_file_in_a_ws_model_and_a_plain_one(
    ws_model: nn.Module, plain_model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "R-18.pkl"
    blobs = {"conv1_w": np.full((64, 3, 7, 7), 0.5, "f4"), "conv1_gn_s": np.ones(64, "f4")}
    path.write_bytes(pickle.dumps({"blobs": {**blobs, "conv1_w_momentum": blobs["conv1_w"]}}))
    assert "ws-authors-caffe2" in refusal(ws_model, path)
    model = copy.deepcopy(plain_model)
    WSCheckpointer(model).load(str(path))
    assert bool((model.state_dict()["backbone.bottom_up.stem.conv1.weight"] == 0.5).all())


def test_converted_backbone_by_the_endings_of_its_keys(
    ws_model: nn.Module, plain_model: nn.Module, tmp_path: Path
) -> None:
    body = ws_model.backbone.bottom_up.state_dict()
    theirs = {}
    for key, value in body.items():
        key = key.replace("stem.", "").replace("shortcut.norm", "downsample.1")
        key = key.replace("shortcut", "downsample.0")
        for stage in range(2, 6):
            key = key.replace(f"res{stage}.", f"layer{stage - 1}.")
        for k in "12":
            key = key.replace(f"conv{k}.norm", f"gn{k}")
        theirs[key] = value + 1
    torch.save(theirs, tmp_path / "resnet18_gn_ws.pth")
    write_detectron2(convert_file(tmp_path / "resnet18_gn_ws.pth", ws=True), tmp_path / "d2.pth")
    model = copy.deepcopy(ws_model)
    WSCheckpointer(model).load(str(tmp_path / "d2.pth"))
    for key, value in model.backbone.bottom_up.state_dict().items():
        assert torch.equal(value, body[key] + 1), key
    assert "20 convs were trained with WS" in refusal(plain_model, tmp_path / "d2.pth")
    # without conversion detectron2 would load nothing and train from random weights
    assert "tools/convert_weights.py" in refusal(ws_model, tmp_path / "resnet18_gn_ws.pth")


def test_payload_in_a_checkpoint(ws_model: nn.Module, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path}/code_was_run",))

    for path in (tmp_path / "x.pkl", tmp_path / "x.pth"):
        content = {"model": {}, "__author__": Payload()}
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
        assert "system" in refusal(ws_model, path)
    assert not (tmp_path / "code_was_run").exists()


def test_missing_file_and_empty_path(ws_model: nn.Module) -> None:
    assert "there is no weight file /nowhere/model.pth" in refusal(
        ws_model, Path("/nowhere/model.pth")
    )
    assert WSCheckpointer(ws_model).load("") == {}


def test_numpy_numbers_are_read_as_plain_ones(ws_model: nn.Module, tmp_path: Path) -> None:
    metrics = {"bbox": {"AP": np.float64(1.5)}, "list": [np.int64(2)]}
    WSCheckpointer(ws_model, str(tmp_path)).save("model", iteration=np.int64(3), metrics=metrics)
    content = read_weight_file(tmp_path / "model.pth")
    assert content["iteration"] == 3
    assert content["metrics"] == {"bbox": {"AP": 1.5}, "list": [2]}
    assert type(content["iteration"]) is int and type(content["metrics"]["bbox"]["AP"]) is float


def test_a_save_that_is_cut_short_leaves_the_old_file(
    ws_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = WSCheckpointer(ws_model, str(tmp_path), save_to_disk=True)
    checkpointer.save("model_best", iteration=1)

    def half(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    for name in ("model_best", "model_0000009"):
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(name, iteration=2)
    assert read_weight_file(tmp_path / "model_best.pth")["iteration"] == 1
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_best.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"model_best.pth", "last_checkpoint"}


def test_checkpoint_of_the_default_trainer_resumes(tmp_path: Path) -> None:
    class Trainer(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return [[]]

        @classmethod
        def build_model(cls, cfg: Any) -> nn.Module:
            return nn.Sequential(nn.Conv2d(1, 2, 1))

    cfg = small_config(ws=False)
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = str(tmp_path), "", ()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True

    def trainer() -> Any:
        made = Trainer(cfg)
        made.checkpointer = WSCheckpointer(
            made.model,
            cfg.OUTPUT_DIR,
            trainer=weakref.proxy(made),
            # detectron2 0.5 leaves it out of the trainer's state
            optimizer=made._trainer.optimizer,
        )
        return made

    first = trainer()
    (first.model[0].weight.sum() + first.model[0].bias.sum()).backward()
    first._trainer.optimizer.step()
    first.scheduler.step()
    first._trainer.iter = first.iter = 7
    first.checkpointer.save("model_0000007", iteration=7)

    second = trainer()
    second.resume_or_load(resume=True)
    assert second.start_iter == 8
    assert torch.equal(second.model[0].weight, first.model[0].weight)
    optimizer = second._trainer.optimizer.state_dict()["state"]
    assert optimizer
    assert torch.equal(
        optimizer[0]["momentum_buffer"],
        first._trainer.optimizer.state_dict()["state"][0]["momentum_buffer"],
    )


@pytest.mark.parametrize("library", ["torchvision", "torchvision retinanet", "maskrcnn-benchmark"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_detector_of_another_library(
    plain_model: nn.Module, tmp_path: Path, library: str, wrapped: bool
) -> None:
    state = other_detector(library)
    content = {"model": {f"module.{key}": value for key, value in state.items()}}
    torch.save(content if wrapped else state, tmp_path / "x.pth")
    message = refusal(plain_model, tmp_path / "x.pth")
    assert "no weights for the backbone" in message or "no tensor of the file has" in message
    assert "tools/convert_weights.py" in message


def test_file_without_any_weights_of_the_backbone(plain_model: nn.Module, plain_file: Path) -> None:
    state = read_weight_file(plain_file)["model"]
    heads = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    message = refusal(plain_model, changed(plain_file, model=heads))
    assert "no weights for the backbone, which would stay random" in message
    assert "proposal_generator.rpn_head.conv.weight" in message
    one = {**heads, "backbone.fpn_lateral2.weight": state["backbone.fpn_lateral2.weight"]}
    WSCheckpointer(copy.deepcopy(plain_model)).load(str(changed(plain_file, model=one)))


@pytest.mark.parametrize(
    "kept, parts",
    [
        (r"backbone\.", ["proposal_generator (6)", "roi_heads.box_head ("]),
        (
            r"(?!backbone\.fpn_output5\.weight)",
            ["lacks tensors of backbone (1): backbone.fpn_output5.wei"],
        ),
        (r"(?!roi_heads)", ["roi_heads.box_predictor (4)", "The file has backbone ("]),
    ],
)
def test_whole_model_is_needed_on_request(
    plain_model: nn.Module, plain_file: Path, kept: str, parts: list[str]
) -> None:
    state = read_weight_file(plain_file)["model"]
    changed(plain_file, model={k: v for k, v in state.items() if re.match(kept, k)})
    WSCheckpointer(copy.deepcopy(plain_model)).load(str(plain_file))
    with pytest.raises(WeightsError) as caught:
        WSCheckpointer(copy.deepcopy(plain_model), whole=True).load(str(plain_file))
    message = str(caught.value)
    assert "does not contain the whole model" in message and "\n" not in message
    assert all(part in message for part in parts), message


def test_shared_parameters_and_missing_buffers_are_no_missing_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.register_buffer("anchors", torch.ones(3))
    state = {key: value for key, value in model.state_dict().items() if key != "0.weight"}
    del state["anchors"]
    torch.save({"model": state}, tmp_path / "x.pth")
    WSCheckpointer(model, whole=True).load(str(tmp_path / "x.pth"))
    bn = nn.Sequential(nn.BatchNorm2d(2))
    torch.save({"model": dict(bn.named_parameters())}, tmp_path / "x.pth")
    with pytest.raises(
        WeightsError, match=r"lacks tensors of 0 \(2\): 0.running_mean, 0.running_var"
    ):
        WSCheckpointer(bn, whole=True).load(str(tmp_path / "x.pth"))


def test_resume_with_other_classes_names_the_key(tmp_path: Path) -> None:
    cfg = small_config(ws=False)
    model = build_model(cfg)
    WSCheckpointer(model, str(tmp_path)).save("model_0000004")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    other = WSCheckpointer(build_model(cfg), str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        other.resume_or_load("", resume=True)
    message = str(caught.value)
    assert f"{tmp_path}/model_0000004.pth does not contain the whole model" in message
    assert "box_predictor.cls_score.weight is (81, 32) in the file and (5, 32) in the" in message
    assert "(check MODEL.ROI_HEADS.NUM_CLASSES)" in message and "lacks" not in message
    other.resume_or_load(str(tmp_path / "model_0000004.pth"), resume=False)  # fine-tuning may


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"model_0000009.pth", "names 'model_0000009.pth', which does not exist"),
        (b"\xff\x00\x1b[2J", "names "),
        (b"../", "names '../'"),
    ],
)
def test_last_checkpoint_that_names_no_file(
    plain_model: nn.Module, tmp_path: Path, content: bytes, found: str
) -> None:
    (tmp_path / "last_checkpoint").write_bytes(content)
    checkpointer = WSCheckpointer(plain_model, str(tmp_path))
    for files, remedy in (
        ((), f"{tmp_path} has none"),
        (["model_0000004.pth"], "(model_0000004.pth"),
    ):
        for name in files:
            (tmp_path / name).touch()
        with pytest.raises(WeightsError) as caught:
            checkpointer.resume_or_load("weights.pth", resume=True)
        message = str(caught.value)
        assert f"{tmp_path}/last_checkpoint {found}" in message and remedy in message
        assert "or delete it to start from MODEL.WEIGHTS" in message and message.isprintable()


@pytest.mark.parametrize(
    "content",
    [
        {"model_state": [1]},
        {"model_state": {1: torch.ones(1)}},
        {"model": 5},
        {"model": {"a": {"b": torch.ones(1)}}},
        {"blobs": 5},
        {"blobs": {1: np.ones(1, "f4")}},
        {"conv1_w": 3},
        {"blobs": {"conv1_w": np.ones(2, "f4"), "res2_0_branch2a_w": np.ones((1, 1, 1, 1), "f4")}},
        {"model": {"weight": torch.ones(1)}, "matching_heuristics": True, "__author__": "Caffe2"},
        {"model": {"a\x1b[2J": torch.ones(1)}},
        {METADATA_KEY: 5, "model": {"backbone.fpn_lateral2.weight": torch.ones(1)}},
    ],
)
def test_content_of_another_form(plain_model: nn.Module, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "x.pkl"
    if "model" in content or "model_state" in content:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert str(path) in refusal(plain_model, path)


@pytest.mark.parametrize(
    "other, differ", [("official", False), ("paper", False), ("bit", True), ("one_more", True)]
)
def test_forms_of_ws_whoseoutputs_differ(other: str, differ: bool) -> None:
    """A mode that is added later is not taken to give the same outputs."""
    assert outputs_differ(WSForm("official", 1e-5), WSForm(other, 1e-5)) is differ
    assert outputs_differ(WSForm(other, 1e-5), WSForm(other, 1e-6))
