"""BiT's published formats: every tensor gets its place, and the model the settings it needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bit_reference import INPUT, NARROW, as_google, bit_stages, random_timm_state, timm_shapes
from detectron2.modeling import build_model
from hostile_weights import safetensors
from weight_samples import as_state, small_config, torchvision_keys

from ws_detectron.checkpoint import (
    WeightsError,
    WSCheckpointer,
    WSForm,
    convert_file,
    describe_file,
    write_detectron2,
    write_mmdet,
)

Save = Callable[..., Path]


def save_safetensors(state: dict[str, torch.Tensor], path: Path) -> None:
    entries, data = {}, b""
    for key, value in state.items():
        end = len(data) + value.nbytes
        shape = list(value.shape)
        entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), end]}
        data += value.contiguous().numpy().tobytes()
    path.write_bytes(safetensors(entries, data))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return random_timm_state()


@pytest.fixture(scope="module")
def files(state: dict[str, torch.Tensor], tmp_path_factory: Any) -> dict[str, Path]:
    """The same weights in all published formats."""
    folder = tmp_path_factory.mktemp("bit")
    torch.save(state, folder / "pytorch_model.bin")
    save_safetensors(state, folder / "model.safetensors")
    np.savez(folder / "BiT-M-R50x1.npz", **as_google(state))
    return {path.suffix: path for path in folder.iterdir()}


def bit_model(*opts: Any) -> torch.nn.Module:
    cfg = small_config(ws=True, depth=50)
    cfg.MODEL.BACKBONE.NAME = "build_bit_resnet_fpn_backbone"
    cfg.MODEL.WS.MODE, cfg.MODEL.WS.EPS = "bit", 1e-8
    cfg.merge_from_list([*NARROW, *INPUT, *opts])
    return build_model(cfg).eval()


@pytest.mark.parametrize(
    ("ending", "eps"), [(".bin", 1e-8), (".safetensors", 1e-8), (".npz", 1e-10)]
)
def test_a_converted_file_computes_what_the_reference_does(
    files: dict[str, Path],
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    ending: str,
    eps: float,
) -> None:
    converted = convert_file(files[ending])
    metadata = converted.metadata
    assert metadata.source == ("google-bit" if ending == ".npz" else "timm-bit")
    assert (metadata.architecture, metadata.norm, metadata.gn_groups) == ("BiT R-50x0.5", "GN", 32)
    assert metadata.stride_in_1x1 is False and converted.record.to_check == []
    assert len(metadata.ws_convs) == 53
    assert set(metadata.ws_convs.values()) == {WSForm("bit", eps)}
    # 53 convs, 48 norms in blocks and the final one; the classifier is left out
    assert len(converted.state) == 53 + 2 * 49
    left_out = [entry for entry in converted.record.entries if entry.target is None]
    assert len(left_out) == 2 and all("classifier" in entry.note for entry in left_out)

    write_detectron2(converted, tmp_path / "bit.pth")
    model = bit_model("MODEL.WS.EPS", eps)
    WSCheckpointer(model).load(str(tmp_path / "bit.pth"))
    image = torch.randint(0, 256, (1, 3, 32, 32)).double()
    double = {key: value.double() for key, value in state.items()}
    with torch.no_grad():
        x = (image.float() - model.pixel_mean) / model.pixel_std
        torch.testing.assert_close(x.double(), image / 127.5 - 1, rtol=0, atol=1e-6)
        outputs = model.double().backbone.bottom_up(image / 127.5 - 1)
        expected = bit_stages(double, image / 127.5 - 1, eps)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-10)


def test_published_shapes_are_recognized(save: Save) -> None:
    converted = convert_file(save(as_state(timm_shapes(width=64, classes=21843))))
    assert converted.metadata.architecture == "BiT R-50x1"
    assert converted.needs() == {
        "MODEL.BACKBONE.NAME": "build_bit_*",
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NUM_GROUPS": 1,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.WS.MODE": "bit",
        "MODEL.WS.EPS": 1e-8,
        "MODEL.WS.GN_GROUPS": 32,
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [127.5] * 3,
        "MODEL.PIXEL_STD": [127.5] * 3,
    }
    wide = convert_file(save(as_state(timm_shapes(width=192))))
    assert wide.metadata.architecture == "BiT R-50x3"
    assert wide.resnet["MODEL.RESNETS.STEM_OUT_CHANNELS"] == 192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages.3.blocks.2.norm1.weight": None}, "missing: res5.2.preact.norm.weight"),
        ({"stages.2.blocks.0.norm1.bias": None}, "missing: res3.out.norm.bias"),
        ({"norm.weight": None}, "missing: res5.out.norm.weight"),
        ({"stages.1.blocks.0.downsample.conv.weight": None}, "missing: res3.0.shortcut.weight"),
        ({"norm.weight": (7,)}, r"wrong shape: res5.out.norm.weight \(7,\) instead of \(1024,\)"),
        ({"stages.1.blocks.4.conv1.weight": (64, 256, 1, 1)}, "17 bottleneck blocks"),
        ({"stages.0.blocks.0.attn.weight": (4,)}, "has no keys stages.0.blocks.0.attn.weight"),
        ({"stages.0.blocks.0.conv1.bias": (32,)}, "unexpected: res2.0.conv1.bias"),
    ],
)
def test_files_that_are_not_whole_are_refused(save: Save, change: dict, message: str) -> None:
    shapes = {**timm_shapes(), **change}
    state = as_state({key: shape for key, shape in shapes.items() if shape})
    with pytest.raises(WeightsError, match=message):
        convert_file(save(state))


def test_bit_has_ws(files: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match="says with WS, you say the opposite"):
        convert_file(files[".bin"], ws=False)


@pytest.mark.parametrize(
    ("opts", "key"),
    [
        (["MODEL.WS.MODE", "official"], "MODEL.WS.MODE and MODEL.WS.EPS"),
        (["MODEL.WS.EPS", 1e-5], "MODEL.WS.MODE and MODEL.WS.EPS"),
        (["MODEL.WS.GN_GROUPS", 16], "MODEL.WS.GN_GROUPS"),
        (["MODEL.PIXEL_STD", [58.395, 57.12, 57.375]], "MODEL.PIXEL_STD"),
        (["MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]], "MODEL.PIXEL_MEAN"),
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", True], "MODEL.RESNETS.STRIDE_IN_1X1"),
        (["MODEL.RESNETS.DEPTH", 101], "MODEL.RESNETS.DEPTH"),
        (["MODEL.WS.BACKBONE", False], "trained with WS and are plain"),
        (["MODEL.RESNETS.NORM", "BN"], "MODEL.RESNETS.NORM"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    files: dict[str, Path], tmp_path: Path, opts: list, key: str
) -> None:
    write_detectron2(convert_file(files[".bin"]), tmp_path / "bit.pth")
    with pytest.raises(WeightsError, match=key):
        WSCheckpointer(bit_model(*opts)).load(str(tmp_path / "bit.pth"))


@pytest.mark.parametrize("bit_file", [True, False])
def test_norms_before_and_behind_the_convs_do_not_fit(
    save: Save, files: dict[str, Path], tmp_path: Path, bit_file: bool
) -> None:
    """The convs have the same names and shapes in both, and the same form of WS here."""
    cfg = small_config(ws=True, depth=50)
    cfg.merge_from_list([*NARROW, *INPUT, "MODEL.WS.MODE", "bit", "MODEL.WS.EPS", 1e-8])
    if bit_file:
        write_detectron2(convert_file(files[".bin"]), tmp_path / "x.pth")
        model = build_model(cfg)
    else:
        torch.manual_seed(0)
        other = build_model(cfg)
        WSCheckpointer(other, str(tmp_path)).save("x")
        model = bit_model()
    with pytest.raises(WeightsError, match="MODEL.BACKBONE.NAME.*build_bit_"):
        WSCheckpointer(model).load(str(tmp_path / "x.pth"))


def test_mmdetection_has_no_bit(files: dict[str, Path], tmp_path: Path) -> None:
    write_detectron2(convert_file(files[".bin"]), tmp_path / "bit.pth")
    with pytest.raises(WeightsError, match="ConvWS"):
        write_mmdet(tmp_path / "bit.pth", tmp_path / "mmdet.pth")
    with pytest.raises(WeightsError, match=r"has no keys .*preact|has no keys .*out\.norm"):
        write_mmdet(tmp_path / "bit.pth", tmp_path / "mmdet.pth", allow=["ws"])
    assert not (tmp_path / "mmdet.pth").exists()


def test_description_of_a_file(files: dict[str, Path], save: Save, tmp_path: Path) -> None:
    text = describe_file(files[".safetensors"])
    assert "model.safetensors: a BiT ResNet of timm" in text
    assert "whole: all 151 tensors of BiT R-50x0.5, no NaN" in text
    assert "not one known here" in text and "needs: MODEL.WS.EPS 1e-08" in text
    # the same of the converted file, which convert_file refuses to convert again
    write_detectron2(convert_file(files[".npz"]), tmp_path / "bit.pth")
    text = describe_file(tmp_path / "bit.pth")
    assert "converted from BiT-M-R50x1.npz" in text and "needs: MODEL.WS.EPS 1e-10" in text
    assert "whole: all 151 tensors of BiT R-50x0.5" in text
    # a file that does not say whether it has WS is described, too
    text = describe_file(save(as_state(torchvision_keys("resnet18", "gn")), "gn.pth"))
    assert "needs: MODEL.RESNETS.DEPTH 18" in text and "Pass --ws" in text
    assert "MODEL.WS.MODE" not in text
