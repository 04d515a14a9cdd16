from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Boxes, Instances

from ws_detectron.engine import load_config
from ws_detectron.errors import ConfigError
from ws_detectron.evaluation import evaluate
from ws_detectron.evaluation.coco_eval import load_predictions
from ws_detectron.evaluation.evaluate import (
    ImagePredictor,
    PredictionCollector,
    evaluate_checkpoint,
)


def output(classes: list[int]) -> dict[str, Any]:
    instances = Instances((40, 60))
    number = len(classes)
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 5.0, 30.0, 20.0]] * number))
    instances.scores = torch.linspace(0.9, 0.5, number)
    instances.pred_classes = torch.tensor(classes)
    masks = torch.zeros(number, 40, 60, dtype=torch.bool)
    masks[:, 5:20, 10:30] = True
    instances.pred_masks = masks
    return {"instances": instances}


def collected(metadata: Metadata, *outputs: tuple[int, list[int]]) -> list[dict[str, Any]]:
    """The entries for some image ids and the classes predicted there."""
    collector = PredictionCollector(metadata)
    for image_id, classes in outputs:
        collector.process([{"image_id": image_id}], [output(classes)])
    return collector.evaluate()


def test_classes_become_category_ids() -> None:
    metadata = Metadata(thing_dataset_id_to_contiguous_id={17: 0, 99: 1})
    entries = collected(metadata, (5, [1, 0]), (8, []), (3, [0]))
    assert [entry["category_id"] for entry in entries] == [99, 17, 17]
    assert [entry["image_id"] for entry in entries] == [5, 5, 3]
    assert entries[0]["bbox"] == [10, 5, 20, 15]
    assert entries[0]["segmentation"]["size"] == [40, 60]
    assert [entry["category_id"] for entry in collected(Metadata(), (5, [4]))] == [4]
    with pytest.raises(ConfigError, match="class 2, .* classes 0 to 1; set MODEL.ROI_HEADS.NUM"):
        collected(metadata, (5, [2]))


def test_predictions_are_forgotten_at_reset() -> None:
    collector = PredictionCollector(Metadata())
    collector.process([{"image_id": 8}], [output([0])])
    collector.reset()
    assert collector.evaluate() == []


@pytest.fixture
def cfg(dataset: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """A config on `dataset` whose model finds the bright pixels and remembers what it was given."""
    cfg = load_config("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml")
    cfg.DATASETS.TEST = (dataset,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.FORMAT = "RGB"
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    monkeypatch.setattr(evaluate, "load_model_for_inference", lambda cfg: FindBright())
    return cfg


class FindBright(torch.nn.Module):
    """Stands in for a trained model: one object, of class 1, on the bright pixels."""

    def forward(self, inputs: list[dict]) -> list[dict]:
        self.given = inputs
        results = []
        for image in inputs:
            bright = image["image"][0] > 150
            rows, columns = torch.nonzero(bright, as_tuple=True)
            size = image["height"], image["width"]
            scale = size[0] / bright.shape[0]
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found = Instances(size)
            found.pred_boxes = Boxes(torch.tensor([[float(side) * scale for side in box]]))
            found.scores, found.pred_classes = torch.tensor([0.75]), torch.tensor([0])
            x0, y0, x1, y1 = found.pred_boxes.tensor[0].round().int().tolist()
            found.pred_masks = torch.zeros(1, *size, dtype=torch.bool)
            found.pred_masks[0, y0:y1, x0:x1] = True
            results.append({"instances": found})
        return results


def test_a_checkpoint_is_evaluated_and_everything_written(cfg: CfgNode, tmp_path: Any) -> None:
    [(name, result)] = evaluate_checkpoint(cfg).items()
    assert name == cfg.DATASETS.TEST[0] and result.predictions == 3
    # of three objects of class 1, the one that is alone on its image is found
    assert result.metrics["segm"]["AR100"] == pytest.approx(100 / 9)
    folder = tmp_path / "run" / "inference"
    assert [e["image_id"] for e in load_predictions(folder / evaluate.RESULTS)] == [1, 2, 3]
    assert (folder / "coco_evaluation.json").is_file()
    evaluate_checkpoint(cfg, ["bbox"], output=str(tmp_path / "other"))
    assert (tmp_path / "other" / "coco_evaluation.csv").is_file()


def test_nothing_to_evaluate_on_is_an_error(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ()
    with pytest.raises(ConfigError, match="DATASETS.TEST is empty"):
        evaluate_checkpoint(cfg)
    MetadataCatalog.get("no_annotations").set(thing_classes=["a"])
    cfg.DATASETS.TEST = ("no_annotations",)
    with pytest.raises(ConfigError, match="no_annotations, which has no COCO annotation file"):
        evaluate_checkpoint(cfg)


def test_single_images_are_resized_and_given_in_the_right_order(cfg: CfgNode) -> None:
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 80, 400
    image = np.full((40, 60, 3), 60, np.uint8)
    image[10:20, 30:50, 0] = 200  # red
    predict = ImagePredictor(cfg)
    [entry] = predict(image)
    assert entry["category_id"] == 0 and entry["score"] == 0.75
    np.testing.assert_allclose(entry["bbox"], [30, 10, 20, 10], atol=1.5)
    given = predict.model.given[0]
    assert given["image"].shape == (3, 80, 120)
    assert (given["height"], given["width"]) == (40, 60)
    cfg.INPUT.FORMAT = "BGR"
    predict = ImagePredictor(cfg)
    with pytest.raises(RuntimeError):  # nothing in the first channel, blue, is bright
        predict(image)
    assert predict.model.given[0]["image"][2].max() == 200
