"""What the patches promise, on the installed pure-Python build."""

import copy
import importlib
import importlib.metadata
import inspect
import json
import pickle
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import detectron2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, BoxMode, Instances
from install_detectron2 import RELEASES, metadata
from PIL import Image

try:
    INSTALLED = importlib.metadata.version("detectron2")
except importlib.metadata.PackageNotFoundError:
    INSTALLED = "of no distribution"
BUILDS = {release.version: release for release in RELEASES.values()}
pytestmark = pytest.mark.skipif(
    INSTALLED not in BUILDS, reason=f"the installed detectron2 is {INSTALLED}, not a build of ours"
)
FOLDER = Path(detectron2.__file__).parent


def test_installed_build_has_the_present_patches() -> None:
    installed = importlib.metadata.distribution("detectron2").read_text("METADATA")
    assert installed == metadata(BUILDS[INSTALLED]), "run `make set-up`"


def test_every_module_imports_except_caffe2_export() -> None:
    failed = {}
    for module in pkgutil.walk_packages(detectron2.__path__, "detectron2."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            failed[module.name] = error.name
    without_caffe2 = {f"detectron2.export.{name}" for name in ("api", "c10", "shared")}
    without_caffe2 |= {
        f"detectron2.export.caffe2_{name}" for name in ("export", "inference", "modeling", "patch")
    }
    assert set(failed) <= without_caffe2
    assert set(failed.values()) <= {"caffe2", "onnx"}


def test_no_file_uses_what_was_removed() -> None:
    removed = re.compile(
        r"\bnp\.(int|float|bool|str|object|complex)\b|Image\.LINEAR|pkg_resources|ByteStorage"
    )
    found = []
    for path in FOLDER.rglob("*.py"):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if removed.search(line.split("#")[0]):
                found.append(f"{path.relative_to(FOLDER)}:{number}: {line.strip()}")
    assert found == []


def test_missing_op_says_what_is_missing() -> None:
    from detectron2 import _C
    from detectron2.layers import nms_rotated
    from detectron2.structures import RotatedBoxes, pairwise_iou_rotated

    with pytest.raises(NotImplementedError, match="_C.some_op .* pure-Python build"):
        _ = _C.some_op
    boxes = torch.rand(2, 5)
    with pytest.raises(NotImplementedError, match="box_iou_rotated"):
        pairwise_iou_rotated(RotatedBoxes(boxes), RotatedBoxes(boxes))
    with pytest.raises(NotImplementedError, match="nms_rotated"):
        nms_rotated(boxes, torch.rand(2), 0.5)


def test_placeholder_answers_the_questions_of_the_import_system() -> None:
    from detectron2 import _C

    assert not hasattr(_C, "__path__")
    assert inspect.getmodule(_C) is _C
    assert importlib.reload(_C) is _C


def test_environment_report_needs_no_ops() -> None:
    from detectron2.utils.collect_env import collect_env_info

    report = collect_env_info()
    assert re.search(r"detectron2\._C +not built: pure-Python build", report)
    assert torch.__version__ in report


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ],
    ids=["StepLR", "ReduceLROnPlateau"],
)
def test_torch_scheduler_goes_on_after_a_resume(make) -> None:
    from detectron2.engine.hooks import LRScheduler

    def build() -> LRScheduler:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return LRScheduler(optimizer, make(optimizer))

    first, second = build(), build()
    first.scheduler.last_epoch = 7
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.scheduler.last_epoch == 7


def test_gathered_bytes_are_the_pickled_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.utils import comm

    monkeypatch.setattr(comm.dist, "get_backend", lambda group: "gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = comm._serialize_to_tensor({"rank": 3}, None)
    assert tensor.dtype == torch.uint8
    assert pickle.loads(tensor.numpy().tobytes()) == {"rank": 3}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_annotated_boxes_become_float_boxes_without_a_warning(count: int) -> None:
    from detectron2.data.detection_utils import annotations_to_instances

    box = np.array([1.0, 2.0, 30.0, 40.0])
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for _ in range(count)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        instances = annotations_to_instances(annotations, (50, 50))
    expected = torch.tensor([[1.0, 2.0, 30.0, 40.0]]).expand(count, 4)
    torch.testing.assert_close(instances.gt_boxes.tensor, expected)


def test_anchor_grid_makes_torch_warn_of_nothing() -> None:
    from detectron2.modeling.anchor_generator import _create_grid_offsets

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = _create_grid_offsets((2, 3), 4, 0.5, torch.device("cpu"))
    torch.testing.assert_close(x, torch.tensor([2.0, 6, 10, 2, 6, 10]))
    torch.testing.assert_close(y, torch.tensor([2.0, 2, 2, 6, 6, 6]))


def test_panoptic_deeplab_groups_pixels_by_the_nearest_center() -> None:
    from detectron2.projects.panoptic_deeplab.post_processing import group_pixels

    centers = torch.tensor([[0, 0], [0, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = group_pixels(centers, torch.zeros(2, 2, 4))
    assert groups.tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2]]]


def test_panoptic_deeplab_mapper_reads_ids_with_panopticapi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detectron2.projects.panoptic_deeplab import PanopticDeeplabDatasetMapper

    colors = np.array([[[1, 2, 0], [3, 0, 0]]], dtype=np.uint8)
    Image.fromarray(colors).save(tmp_path / "1.png")
    mapper = PanopticDeeplabDatasetMapper(
        augmentations=[],
        image_format="RGB",
        panoptic_target_generator=lambda ids, info: {"ids": ids.tolist()},
    )
    path = str(tmp_path / "1.png")
    record = {"file_name": path, "pan_seg_file_name": path, "segments_info": []}
    monkeypatch.setitem(sys.modules, "panopticapi.utils", None)
    with pytest.raises(ModuleNotFoundError, match="panopticapi"):
        mapper(record)
    utils = SimpleNamespace(rgb2id=lambda color: color[..., 0] + 256 * color[..., 1].astype(int))
    monkeypatch.setitem(sys.modules, "panopticapi", SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "panopticapi.utils", utils)
    assert mapper(record)["ids"] == [[513, 3]]


def test_extent_transform_interpolates_linearly_by_default() -> None:
    from detectron2.data.transforms import ExtentTransform

    image = np.array([[0, 100]], dtype=np.uint8).repeat(2, axis=0)
    halved = ExtentTransform((0.5, 0, 1.5, 2), (2, 1)).apply_image(image)
    np.testing.assert_array_equal(halved, [[50], [50]])


def test_model_zoo_finds_its_configs_without_setuptools() -> None:
    from detectron2 import model_zoo

    path = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    assert Path(path).is_file()
    assert model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.RETINANET


def test_profiler_hook_saves_one_trace(tmp_path: Path) -> None:
    from detectron2.engine import SimpleTrainer
    from detectron2.engine.hooks import TorchProfiler

    class Model(torch.nn.Linear):
        def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(batch).sum()}

    model = Model(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [torch.ones(1, 2)] * 3, optimizer)
    activities = [torch.profiler.ProfilerActivity.CPU]
    trainer.register_hooks([TorchProfiler(lambda t: t.iter == 1, tmp_path, activities=activities)])
    trainer.train(0, 3)
    assert len(list((tmp_path / "log").rglob("*.json"))) == 1


@pytest.fixture
def coco_like(tmp_path: Path):
    """The name of a registered data set of one image with two squares."""
    squares = [[8, 8, 20, 20], [40, 30, 25, 25]]
    annotations = [
        {
            "id": number + 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for number, (x, y, w, h) in enumerate(squares)
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 64, "width": 96}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "square"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    from detectron2.data.datasets import register_coco_instances

    name = "installed_detectron2_squares"
    register_coco_instances(name, {}, str(tmp_path / "a.json"), str(tmp_path))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("arguments", [{}, {"use_fast_impl": True}])
def test_coco_evaluator_works_as_its_users_call_it(coco_like: str, arguments: dict) -> None:
    from detectron2.evaluation import COCOEvaluator, coco_evaluation

    function = coco_evaluation._evaluate_predictions_on_coco
    assert inspect.signature(function).parameters["use_fast_impl"].default is False
    (record,) = DatasetCatalog.get(coco_like)
    truth = Instances((64, 96))
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], 0) for a in record["annotations"]]
    truth.pred_boxes = Boxes(torch.tensor(boxes))
    truth.scores = torch.ones(2)
    truth.pred_classes = torch.zeros(2, dtype=torch.int64)
    truth.pred_masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(truth.pred_masks, boxes):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    evaluator = COCOEvaluator(coco_like, ("bbox", "segm"), False, **arguments)
    evaluator.reset()
    evaluator.process([record], [{"instances": truth}])
    results = evaluator.evaluate()
    assert (results["bbox"]["AP"], results["segm"]["AP"]) == pytest.approx((100, 100))


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_clipping_passes_over_parameters_without_gradient(clip_type: str) -> None:
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1.0, 0.0
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in range(2)])
    optimizer = build_optimizer(cfg, model)
    before = [layer.weight.item() for layer in model]
    (model[0].weight * 8).sum().backward()
    optimizer.step()
    assert model[0].weight.item() == pytest.approx(before[0] - 0.5)
    assert model[1].weight.item() == before[1]
