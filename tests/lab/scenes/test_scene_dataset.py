import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Callable

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ws_detectron.errors import UserError
from ws_detectron.lab.scenes import dataset
from ws_detectron.lab.scenes.dataset import (
    ANNOTATIONS,
    FINGERPRINT,
    IMAGES,
    builtin_scenes,
    contact_sheet,
    ensure_scenes,
    find_damage,
    register_scenes,
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
        (lambda f: (f / FINGERPRINT).unlink(), "fingerprint.json cannot be read"),
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
    assert find_damage(ensure_scenes(SPEC, tmp_path)) is None


def test_remains_of_a_killed_build_are_cleared(tmp_path: Path) -> None:
    folder = scene_folder(SPEC, tmp_path)
    remains = folder.parent / f".{folder.name}" / IMAGES
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
    assert len(builds) == 1 and find_damage(found[0]) is None


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


NAME = "scenes_of_a_test"
VAL = SceneSpec(image_size=64, num_images=4, object_scale=(0.3, 0.6), split="val")


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[str]:
    register_scenes(NAME, VAL, tmp_path)
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TRAIN = 64
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_registration_writes_nothing(registered: str, tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []
    metadata = MetadataCatalog.get(registered)
    folder = scene_folder(VAL, tmp_path)
    assert metadata.json_file == str(folder / ANNOTATIONS)
    assert metadata.image_root == str(folder / IMAGES)
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == list(VAL.classes)
    assert metadata.thing_dataset_id_to_contiguous_id == {n: n - 1 for n in range(1, 7)}


def test_records_follow_detectron2s_standard(registered: str, tmp_path: Path) -> None:
    records = DatasetCatalog.get(registered)
    assert [record["image_id"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert Path(record["file_name"]).is_file()
        assert (record["height"], record["width"]) == (64, 64)
        for annotation in record["annotations"]:
            assert 0 <= annotation["category_id"] < 6
            assert mask_util.decode(annotation["segmentation"]).shape == (64, 64)


def test_bitmask_loader_gives_the_exact_masks_and_polygons_are_refused(registered: str) -> None:
    record = DatasetCatalog.get(registered)[0]
    mapper = partial(
        DatasetMapper,
        is_train=True,
        augmentations=[T.NoOpTransform()],
        image_format="RGB",
        use_instance_mask=True,
    )
    instances = mapper(instance_mask_format="bitmask")(record)["instances"]
    expected = [mask_util.decode(a["segmentation"]) for a in record["annotations"]]
    np.testing.assert_array_equal(instances.gt_masks.tensor.numpy(), np.array(expected, bool))
    # a box around a mask is what the annotation states
    torch.testing.assert_close(
        instances.gt_masks.get_bounding_boxes().tensor, instances.gt_boxes.tensor
    )

    polygons = mapper(instance_mask_format="polygon")
    with pytest.raises(ValueError, match="mask_format=='polygon'"):
        polygons(record)


def test_evaluator_gives_100_for_the_truth(registered: str, cfg: CfgNode, tmp_path: Path) -> None:
    # The order of DefaultTrainer.test: the loader makes the files that the evaluator reads.
    loader = build_detection_test_loader(cfg, registered)
    evaluator = COCOEvaluator(registered, ("bbox", "segm"), False, str(tmp_path / "out"))
    evaluator.reset()
    truth = {record["image_id"]: record for record in DatasetCatalog.get(registered)}
    for inputs in loader:
        outputs = []
        for image in inputs:
            annotations = truth[image["image_id"]]["annotations"]
            boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32)
            boxes[:, 2:] += boxes[:, :2]
            masks = [mask_util.decode(a["segmentation"]) for a in annotations]
            instances = Instances((64, 64))
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.ones(len(annotations))
            instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
            instances.pred_masks = torch.from_numpy(np.array(masks, dtype=bool))
            outputs.append({"instances": instances})
        evaluator.process(inputs, outputs)
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_registering_twice_is_harmless(registered: str, tmp_path: Path) -> None:
    metadata, function = MetadataCatalog.get(registered), DatasetCatalog[registered]
    register_scenes(registered, VAL, tmp_path)
    assert MetadataCatalog.get(registered) is metadata
    assert DatasetCatalog[registered] is function


def test_registering_anew_replaces_the_set(registered: str, tmp_path: Path) -> None:
    DatasetCatalog.get(registered)
    other = SceneSpec(image_size=64, num_images=2, object_scale=(0.3, 0.6))
    register_scenes(registered, other, tmp_path / "other")
    assert len(DatasetCatalog.get(registered)) == 2
    assert MetadataCatalog.get(registered).json_file.startswith(str(tmp_path / "other"))


def test_name_of_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'coco_2017_val' is taken"):
        register_scenes("coco_2017_val", VAL)


def test_builtin_scenes_are_registered_by_the_import() -> None:
    specs = builtin_scenes()
    assert len(specs) == 2 * 4 * 2
    for name, spec in specs.items():
        assert name == f"scenes_{spec.kind}_{spec.image_size}_{spec.split}"
        register_scenes(name, spec)  # the cache may be another one since
        assert name in DatasetCatalog
        assert MetadataCatalog.get(name).thing_classes == list(spec.classes)
        assert str(scene_folder(spec)) in MetadataCatalog.get(name).json_file


def test_sheet_has_a_cell_per_image_and_the_rest_white(registered: str) -> None:
    records = DatasetCatalog.get(registered)[:3]
    sheet = contact_sheet(registered, records, columns=2, longer_side=100)
    assert sheet.shape == (200, 200, 3) and sheet.dtype == np.uint8
    assert (sheet[100:, 100:] == 255).all()
    for top, left in ((0, 0), (0, 100), (100, 0)):
        assert sheet[top : top + 100, left : left + 100].std() > 5


def test_only_masks_boxes_and_labels_are_coloured(registered: str) -> None:
    record = DatasetCatalog.get(registered)[0]
    drawn = contact_sheet(registered, [record], longer_side=256).astype(int)
    image = cv2.imread(record["file_name"])[:, :, ::-1].repeat(4, axis=0).repeat(4, axis=1)
    changed = np.abs(drawn - image).max(axis=2) > 8
    near_box = np.zeros((256, 256), dtype=bool)
    covered = np.zeros((256, 256), dtype=bool)
    for annotation in record["annotations"]:
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        mask = mask.repeat(4, axis=0).repeat(4, axis=1)
        assert changed[mask].mean() > 0.8
        covered |= mask
        # labels are within 30 pixels of their box
        x, y, width, height = (int(4 * value) for value in annotation["bbox"])
        near_box[max(y - 30, 0) : y + height + 30, max(x - 30, 0) : x + width + 30] = True
    assert not changed[~near_box].any()
    assert covered.any()
