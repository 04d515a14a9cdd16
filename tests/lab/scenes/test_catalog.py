from collections.abc import Iterator
from functools import partial
from pathlib import Path

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

from ws_detectron.lab.scenes.dataset import (
    ANNOTATIONS,
    IMAGES,
    builtin_scenes,
    register_builtin_scenes,
    register_scenes,
    scene_folder,
)
from ws_detectron.lab.scenes.scene import SceneSpec

NAME = "scenes_of_a_test"
SPEC = SceneSpec(image_size=64, num_images=4, object_scale=(0.3, 0.6), split="val")


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[str]:
    register_scenes(NAME, SPEC, tmp_path)
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
    folder = scene_folder(SPEC, tmp_path)
    assert metadata.json_file == str(folder / ANNOTATIONS)
    assert metadata.image_root == str(folder / IMAGES)
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == list(SPEC.classes)
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
    # the same list a second time, as the catalog demands
    assert DatasetCatalog.get(registered) == records


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
    register_scenes(registered, SPEC, tmp_path)
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
        register_scenes("coco_2017_val", SPEC)


def test_builtin_scenes_are_registered_by_the_import() -> None:
    import ws_detectron  # noqa: F401

    register_builtin_scenes()
    specs = builtin_scenes()
    assert len(specs) == 2 * 4 * 2
    for name, spec in specs.items():
        assert name == f"scenes_{spec.kind}_{spec.image_size}_{spec.split}"
        assert name in DatasetCatalog
        assert MetadataCatalog.get(name).thing_classes == list(spec.classes)
        assert str(scene_folder(spec)) in MetadataCatalog.get(name).json_file
