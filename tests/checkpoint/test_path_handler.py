import hashlib
import urllib.error
from collections.abc import Callable, Iterator
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bit_reference import as_google, random_timm_state
from detectron2.utils.file_io import PathManager
from weight_samples import as_state, torchvision_keys

from ws_detectron.checkpoint import (
    FOLDER_VARIABLE,
    METADATA_KEY,
    PUBLISHED,
    WeightsError,
    read_weight_file,
    register_weight_names,
)
from ws_detectron.checkpoint.sources import PublishedFile

NAME = "ws://jhu/resnet50_gn_ws"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A separate cache, and no network."""

    def no_network(request: Any) -> Any:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    register_weight_names()
    yield


@pytest.fixture
def published(save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the layout of a published one, registered with its hash."""
    path = save(as_state(torchvision_keys("resnet18", "gn")), "raw.pth")
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    name = f"resnet50_gn_ws-{digits}.pth"
    file = PublishedFile(f"https://example.org/{name}", name, digits)
    monkeypatch.setitem(PUBLISHED, "jhu/resnet50_gn_ws", file)
    (tmp_path / "folder").mkdir()
    return path.rename(tmp_path / "folder" / name)


def test_file_from_the_folder(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(published.parent))
    local = PathManager.get_local_path(NAME)
    content = read_weight_file(local)
    assert len(content[METADATA_KEY]["ws_convs"]) == 20
    assert content[METADATA_KEY]["origin"] == published.name
    published.unlink()
    assert PathManager.get_local_path(NAME) == local, "the converted file is kept"
    with PathManager.open(NAME, "rb") as file:
        assert file.read(2) == b"PK"


@pytest.mark.parametrize("whole", [True, False])
def test_download(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    class Response(BytesIO):
        def info(self) -> Message:
            return Message()

    asked = []

    def urlopen(request: Any) -> Response:
        asked.append(request.full_url)
        return Response(published.read_bytes()[: None if whole else 1000])

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    for _ in range(2):
        if whole:
            PathManager.get_local_path(NAME)
        else:
            with pytest.raises(WeightsError, match="could not be downloaded .*invalid hash value"):
                PathManager.get_local_path(NAME)
    assert asked == [PUBLISHED["jhu/resnet50_gn_ws"].url] * (1 if whole else 2)
    assert len(list((tmp_path / "cache").rglob("*resnet50*.pth"))) == (2 if whole else 0)


def test_without_network_the_message_says_what_to_do() -> None:
    with pytest.raises(WeightsError) as caught:
        PathManager.get_local_path(NAME)
    message = str(caught.value)
    assert "https://download.openmmlab.com/pretrain/third_party/resnet50_gn_ws-15beedd8.pth" in (
        message
    )
    assert FOLDER_VARIABLE in message
    assert "no network in tests" in message


def test_folder_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(WeightsError, match="has no file resnet50_gn_ws-15beedd8.pth"):
        PathManager.get_local_path(NAME)


def test_file_with_another_hash(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.write_bytes(published.read_bytes() + b"x")
    monkeypatch.setenv(FOLDER_VARIABLE, str(published.parent))
    with pytest.raises(WeightsError, match="is not the published file"):
        PathManager.get_local_path(NAME)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="ws://jhu/resnext101_32x4d_gn_ws"):
        PathManager.get_local_path("ws://jhu/resnet34_gn_ws")
    with pytest.raises(WeightsError, match="read only"):
        PathManager.open(NAME, "w")


def test_names_are_consistent() -> None:
    assert len(PUBLISHED) == 4 + 12 + 12 + 12
    for name, (url, file, sha256) in PUBLISHED.items():
        assert name.split("/")[1] in url and name.split("/")[1] in file
        assert not sha256 or int(sha256, 16) >= 0
        if not name.startswith("bit/"):  # mmdetection's file names end in the digits
            assert url.endswith(f"/{file}") and file.endswith(f"-{sha256}.pth")
    files = [file for _, file, _ in PUBLISHED.values()]
    assert len({file.partition(".pth")[0] for file in files}) == len(files)
    assert (
        PUBLISHED["mmdet/mask_rcnn_r50_fpn_gn_ws-all_2x_coco"].url
        == "https://download.openmmlab.com/mmdetection/v2.0/gn%2Bws/"
        "mask_rcnn_r50_fpn_gn_ws-all_2x_coco/"
        "mask_rcnn_r50_fpn_gn_ws-all_2x_coco_20200226-16acb762.pth"
    )


def test_bit_from_the_folder_under_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        PathManager.get_local_path("ws://bit/resnetv2_50x1_bit.goog_in21k")
    message = str(caught.value)
    assert "has no file resnetv2_50x1_bit.goog_in21k.safetensors" in message
    url = "https://huggingface.co/timm/resnetv2_50x1_bit.goog_in21k/resolve/main/model.safetensors"
    assert f"{url} under this name" in message

    # without a known hash, the format and the keys say whether the file is whole
    arrays = as_google(random_timm_state())
    np.savez(tmp_path / "BiT-M-R50x1.npz", **arrays)
    content = read_weight_file(PathManager.get_local_path("ws://bit/BiT-M-R50x1"))
    assert content[METADATA_KEY]["architecture"] == "BiT R-50x0.5"
    (tmp_path / "resnetv2_101x1_bit.goog_in21k.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="is not the published file.* expected 89c645b9"):
        PathManager.get_local_path("ws://bit/resnetv2_101x1_bit.goog_in21k")
    del arrays["resnet/block4/unit03/c/standardized_conv2d/kernel"]
    np.savez(tmp_path / "BiT-M-R50x3.npz", **arrays)
    with pytest.raises(WeightsError, match="not a whole BiT R-50x0.5; missing: res5.2.conv3"):
        PathManager.get_local_path("ws://bit/BiT-M-R50x3")
