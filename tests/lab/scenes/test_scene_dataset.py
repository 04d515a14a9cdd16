import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path
from threading import Thread
from typing import Any, Callable

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ws_detectron.errors import UserError
from ws_detectron.lab.scenes import dataset
from ws_detectron.lab.scenes.dataset import (
    ANNOTATIONS,
    FINGERPRINT,
    IMAGES,
    ensure_scenes,
    find_damage,
    scene_folder,
    summarize,
)
from ws_detectron.lab.scenes.scene import SceneSpec, make_scene
from ws_detectron.lab.scenes.sprites import ShapeSprites

SPEC = SceneSpec(image_size=64, num_images=4, object_scale=(0.3, 0.6), min_visible=0.4)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def digest(folder: Path) -> str:
    return str(json.loads((folder / FINGERPRINT).read_text())["digest"])


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return ensure_scenes(SPEC, tmp_path)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one entry with each set that is built."""
    calls: list[Path] = []
    write_set = dataset._write_set

    def counted(spec: SceneSpec, folder: Path, workers: int) -> None:
        calls.append(folder)
        write_set(spec, folder, workers)

    monkeypatch.setattr(dataset, "_write_set", counted)
    return calls


def test_pycocotools_reads_back_what_the_scenes_hold(finished: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(finished / ANNOTATIONS))
    assert coco.dataset["info"]["description"] and coco.dataset["licenses"]
    names = [category["name"] for category in coco.loadCats(coco.getCatIds())]
    assert coco.getCatIds() == list(range(1, 7)) and tuple(names) == ShapeSprites.classes
    assert coco.getImgIds() == [1, 2, 3, 4]
    assert len(set(coco.anns)) == len(coco.dataset["annotations"])
    for index in range(4):
        scene = make_scene(SPEC, index, ShapeSprites())
        (entry,) = coco.loadImgs([index + 1])
        assert (entry["height"], entry["width"]) == (64, 64)
        assert not os.path.isabs(entry["file_name"])
        image = cv2.imread(str(finished / IMAGES / entry["file_name"]))
        np.testing.assert_array_equal(image[:, :, ::-1], scene.image)

        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[index + 1]))
        assert len(annotations) == len(scene.objects)
        for annotation, item in zip(annotations, scene.objects):
            mask = coco.annToMask(annotation).astype(bool)
            np.testing.assert_array_equal(mask, item.mask)
            assert isinstance(annotation["segmentation"]["counts"], str)
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == mask_util.toBbox(annotation["segmentation"]).tolist()
            assert annotation["iscrowd"] == 0
            assert annotation["category_id"] == item.category + 1
            assert annotation["area"] >= 0.4 * annotation["full_area"]


def test_same_parameters_give_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    again = ensure_scenes(SPEC, tmp_path / "again")
    assert contents(again) == contents(finished)


def test_workers_do_not_change_the_result(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", 1)
    shared = ensure_scenes(SPEC, tmp_path / "shared", workers=2)
    assert contents(shared) == contents(finished)


@pytest.mark.parametrize("changes", [{"seed": 5}, {"split": "val"}, {"noise": 5}])
def test_other_parameters_go_to_another_folder(
    changes: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    before = contents(finished)
    other = ensure_scenes(dataclasses.replace(SPEC, **changes), tmp_path)
    assert other != finished and contents(finished) == before
    assert digest(other) != digest(finished)


def test_new_generator_version_goes_to_another_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "GENERATOR_VERSION", 999)
    assert scene_folder(SPEC, tmp_path) != finished
    assert "other parameters" in str(find_damage(SPEC, finished))


def test_finished_set_is_used_as_it_is(finished: Path, tmp_path: Path, builds: list[Path]) -> None:
    assert ensure_scenes(SPEC, tmp_path) == finished
    assert builds == []


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "report"),
    [
        (lambda f: (f / IMAGES / "000003.png").unlink(), "000003.png is missing"),
        (lambda f: halve(f / IMAGES / "000002.png"), "000002.png has .* bytes, expected"),
        (lambda f: halve(f / ANNOTATIONS), "annotations.json has"),
        (lambda f: (f / ANNOTATIONS).unlink(), "annotations.json is missing"),
        (lambda f: (f / FINGERPRINT).unlink(), "fingerprint.json is missing"),
        (lambda f: halve(f / FINGERPRINT), "fingerprint.json cannot be read"),
        (lambda f: (f / FINGERPRINT).write_text("[]"), "fingerprint.json cannot be read"),
        (lambda f: shutil.rmtree(f / IMAGES), "000001.png is missing"),
    ],
)
def test_damaged_set_is_named_and_made_again(
    damage: Callable[[Path], None],
    report: str,
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = contents(finished)
    damage(finished)
    with caplog.at_level("WARNING"):
        assert ensure_scenes(SPEC, tmp_path) == finished
    assert contents(finished) == before
    (record,) = caplog.records
    assert re.search(f"making .* again: .*{report}", record.getMessage())
    assert sorted(p.name for p in finished.parent.iterdir()) == [
        finished.name,
        f"{finished.name}.lock",
    ]


def test_interrupted_build_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(spec: SceneSpec, index: int, source: object) -> None:
        if index == 2:
            raise KeyboardInterrupt
        return make_scene(spec, index, source)  # type: ignore[arg-type, return-value]

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "make_scene", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_scenes(SPEC, tmp_path)
    folder = scene_folder(SPEC, tmp_path)
    assert [p.name for p in folder.parent.iterdir()] == [f"{folder.name}.lock"]
    assert find_damage(SPEC, ensure_scenes(SPEC, tmp_path)) is None


def test_remains_of_a_killed_build_are_cleared(tmp_path: Path) -> None:
    folder = scene_folder(SPEC, tmp_path)
    remains = folder.parent / f".{folder.name}.abc123" / IMAGES
    remains.mkdir(parents=True)
    (remains / "000001.png").write_bytes(b"half")
    ensure_scenes(SPEC, tmp_path)
    assert not remains.parent.exists()


def test_concurrent_requests_build_a_set_once(tmp_path: Path, builds: list[Path]) -> None:
    # The lock is on the open file, so threads exclude each other as processes do.
    found: list[Path] = []
    threads = [Thread(target=lambda: found.append(ensure_scenes(SPEC, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [scene_folder(SPEC, tmp_path)] * 4
    assert len(builds) == 1 and find_damage(SPEC, found[0]) is None


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    # a file where the folder should be: refused for every user, root included
    (tmp_path / "occupied").write_text("")
    with pytest.raises(UserError, match="cannot write scenes to .*occupied.*WS_DETECTRON_CACHE"):
        ensure_scenes(SPEC, tmp_path / "occupied")


def test_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device.*WS_DETECTRON_CACHE"):
        ensure_scenes(SPEC, tmp_path)
    folder = scene_folder(SPEC, tmp_path)
    assert [p.name for p in folder.parent.iterdir()] == [f"{folder.name}.lock"]


def test_missing_fashion_mnist_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nothing"))
    monkeypatch.setenv("WS_DETECTRON_CACHE", str(tmp_path / "cache"))
    nowhere = [(tmp_path / "no-mirror").as_uri() + "/"]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", nowhere)
    spec = dataclasses.replace(SPEC, kind="fashion")
    with pytest.raises(UserError, match="Fashion-MNIST .*DETECTRON2_DATASETS"):
        ensure_scenes(spec)
    assert not scene_folder(spec).exists()


def test_summary_states_what_the_set_holds(finished: Path) -> None:
    data = json.loads((finished / ANNOTATIONS).read_text())
    text = summarize(finished)
    assert "images    4," in text
    assert f"objects   {len(data['annotations'])}:" in text
    assert digest(finished) in text
    arches = sum(
        a["category_id"] == 1 + ShapeSprites.classes.index("arch") for a in data["annotations"]
    )
    assert f"arch {arches}" in text


def test_workers_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers must be at least 1, got 0"):
        ensure_scenes(SPEC, tmp_path, workers=0)
