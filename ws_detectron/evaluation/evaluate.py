"""From a checkpoint to COCO predictions and metrics, in one process or several."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from ws_detectron.data import register_coco_sets
from ws_detectron.data.validate import read_json
from ws_detectron.engine import Trainer, as_flat_dict
from ws_detectron.engine.checks import Purpose, check_device, check_weights
from ws_detectron.engine.inference import load_model_for_inference
from ws_detectron.engine.prepare import prepare
from ws_detectron.errors import ConfigError, DataError
from ws_detectron.utils.io import refuse_overwrite, write_json

from .coco_curves import FILES, best_text, curve_tables, write_curves
from .coco_eval import CocoResult, check_predictions, evaluate
from .coco_report import KEYPOINTS, as_text, check_reports, write_reports
from .curves import model_name

logger = logging.getLogger(__name__)

RESULTS = "coco_instances_results.json"


class PredictionCollector(DatasetEvaluator):
    """Collects predictions as entries of a COCO results file.

    Unlike detectron2's `COCOEvaluator` it computes no metrics, which `coco_eval.evaluate` does.

    Args:
        metadata: metadata of the data set; without category ids, class numbers are kept.
    """

    def __init__(self, metadata: Metadata) -> None:
        numbers: Mapping[int, int] = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        self._category_ids = {number: category for category, number in numbers.items()}
        self.reset()

    def reset(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Adds the predictions for some images.

        Raises:
            ConfigError: the model has more classes than the data set.
        """
        for image, output in zip(inputs, outputs):
            entries = instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
            for entry in entries if self._category_ids else ():
                number, count = entry["category_id"], len(self._category_ids)
                if number not in self._category_ids:
                    raise ConfigError(
                        f"the model predicts class {number}, but the data set has the {count} "
                        f"classes 0 to {count - 1}; set MODEL.ROI_HEADS.NUM_CLASSES "
                        "(MODEL.RETINANET.NUM_CLASSES), or name weights that were trained on these "
                        "classes"
                    )
                entry["category_id"] = self._category_ids[number]
            self._entries += entries

    def evaluate(self) -> list[dict[str, Any]]:
        """The entries of all processes in the order of the data set; empty on all but the main."""
        comm.synchronize()
        gathered = comm.gather(self._entries, dst=0)
        return list(itertools.chain.from_iterable(gathered))


class ImagePredictor:
    """Predicts objects on single images.

    Args:
        cfg: names weights, image size and channel order.

    Raises:
        UserError: the device or the weights cannot work.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_device(cfg)
        check_weights(cfg)
        self.model: nn.Module = load_model_for_inference(cfg)
        self._resize = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        self._bgr = cfg.INPUT.FORMAT == "BGR"

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Entries of a COCO results file for an image of (H, W, 3) uint8, RGB.

        Their category ids are the model's class numbers, their image id is 0.
        """
        output = self.model([self.prepare(image)])[0]
        return instances_to_coco_json(output["instances"].to("cpu"), 0)

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """The model's input for an image of (H, W, 3) uint8, RGB.

        Returns:
            "image", (3, h, w) uint8, resized and in the channel order of the model; "height" and
            "width" of the image.

        Raises:
            DataError: the image is too narrow to be resized.
        """
        height, width = image.shape[:2]
        image = image[:, :, ::-1] if self._bgr else image
        try:
            resized = self._resize.get_transform(image).apply_image(image)
        except ValueError as error:  # a side of less than one pixel
            raise DataError(
                f"an image of {width} x {height} pixels cannot be resized as INPUT.MIN_SIZE_TEST "
                f"and INPUT.MAX_SIZE_TEST say: {error}"
            ) from error
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def set_up_logging() -> None:
    """Logs of detectron2 and this package on the screen, without the printed model."""
    for name in ("detectron2", "ws_detectron"):
        setup_logger(distributed_rank=comm.get_rank(), name=name)
    logging.getLogger("detectron2.engine.defaults").setLevel(logging.WARNING)


def evaluate_in_process(cfg: CfgNode, *args: Any) -> None:
    """`evaluate_checkpoint` in a process of an evaluation job, with logs on the screen."""
    set_up_logging()
    evaluate_checkpoint(cfg, *args)


def evaluate_checkpoint(
    cfg: CfgNode,
    tasks: Optional[Sequence[str]] = None,
    reference: bool = False,
    output: Optional[str] = None,
) -> dict[str, CocoResult]:
    """Evaluates MODEL.WEIGHTS on every set of DATASETS.TEST; writes and logs the results.

    Every process of a job must call it.

    Args:
        cfg: a merged config.
        tasks: see `evaluate`.
        reference: see `evaluate`.
        output: folder of the files, with a subfolder for each data set if there are several;
            default: OUTPUT_DIR/inference, as for trainings.

    Returns:
        Data set -> result; empty on processes other than the main one.

    Raises:
        UserError: weights, data or tasks cannot work.
    """
    register_coco_sets(cfg.DATASETS.get("REGISTER"))  # a started process knows none of them
    names = cfg.DATASETS.TEST
    if not names:
        raise ConfigError("DATASETS.TEST is empty; name the data sets to evaluate on")
    root = Path(output or Path(cfg.OUTPUT_DIR, "inference"))
    folders = {name: root / name if len(names) > 1 else root for name in names}
    for name, folder in folders.items():
        metadata = MetadataCatalog.get(name)
        evaluator = metadata.get("evaluator_type", "coco")
        if not metadata.get("json_file") or evaluator not in ("coco", "coco_panoptic_seg"):
            raise ConfigError(f"DATASETS.TEST names {name}, which has no COCO annotation file")
        if comm.is_main_process():
            inputs = metadata.json_file, cfg.MODEL.WEIGHTS
            check_reports(folder, *inputs)
            refuse_overwrite([folder / RESULTS, *(folder / file for file in FILES)], inputs)
    if cfg.MODEL.KEYPOINT_ON:
        logger.warning(KEYPOINTS)
    cfg = prepare(cfg, Purpose.REPORT)
    model = load_model_for_inference(cfg)
    results: dict[str, CocoResult] = {}
    for name, folder in folders.items():
        loader = Trainer.build_test_loader(cfg, name)  # also makes scenes_* data sets
        if comm.is_main_process():
            path = PathManager.get_local_path(MetadataCatalog.get(name).json_file)
            annotations = read_json(path, "annotations")  # `prepare` has validated it
            check_predictions(annotations, (), tasks, annotations_name=path)  # before predicting
        collector = PredictionCollector(MetadataCatalog.get(name))
        predictions = inference_on_dataset(model, loader, collector)
        if not comm.is_main_process():
            continue
        write_json(folder / RESULTS, predictions, indent=None)
        results[name] = evaluate(
            annotations,
            predictions,
            tasks,
            reference=reference,
            annotations_name=path,
            predictions_name=str(folder / RESULTS),
        )
        write_reports(
            results[name],
            folder,
            dataset=name,
            weights=cfg.MODEL.WEIGHTS,
            annotations_file=path,
            predictions_file=str(folder / RESULTS),
        )
        tables = curve_tables(annotations, predictions, results[name])
        write_curves(tables, folder, f"{model_name(as_flat_dict(cfg))}, {name}")
        logger.info("%s\n%s\n%s", name, as_text(results[name]), best_text(tables))
    return results
