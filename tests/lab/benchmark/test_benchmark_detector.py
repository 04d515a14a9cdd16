import pytest
import torch
from detectron2.utils.events import EventStorage

from ws_detectron.errors import UserError
from ws_detectron.lab.benchmark import detector_step
from ws_detectron.lab.benchmark.measurements import table

# the variants as they are, on a small model
SMALL = [
    *["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
    *["MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.FPN.OUT_CHANNELS", "32"],
    *["MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"],
]


def test_step_and_inference_of_variants_are_measured(coco_root) -> None:
    variants = ["gn", "gn_ws", "gn_split"]
    (steps,) = detector_step.measure_steps("cpu", 1, 0, variants, short_side=64, opts=SMALL)
    assert list(steps["seconds"]) == variants and not steps["refused"]
    assert steps["facts"] == {"images": 1, "short_side": 64, "mode": "plain", "depth": 18}
    more = steps["peak_bytes"]["gn_ws"] - steps["peak_bytes"]["gn"]
    # at most the standardized filters (11.2 M values in the backbone), and what is under way
    assert 0 < more < 4 * 13_000_000
    (inference,) = detector_step.measure_inference("cpu", 1, 0, short_side=64, opts=SMALL)
    assert list(inference["seconds"]) == ["gn", "gn_ws, folded", "gn_ws, not folded"]


def test_exports_are_measured_beside_eager(coco_root) -> None:
    (exports,) = detector_step.measure_exports("cpu", 2, 0, short_side=64, opts=SMALL)
    assert list(exports["seconds"]) == ["detectron2", "TorchScript", "ONNX Runtime"]
    assert all(len(seconds) == 2 for seconds in exports["seconds"].values())
    text = table({"kind": "exports", "parts": [exports]})
    assert "times detectron2" in text and f"threads {torch.get_num_threads()}." in text
    with pytest.raises(UserError, match="--device is cuda; .*: --device cpu"):
        next(detector_step.measure_exports("cuda"))


def test_all_variants_get_the_same_proposals(coco_root) -> None:
    boxes = []
    for variant in ("bn", "gn_ws"):
        cfg = detector_step.detector_config(variant, "cpu", 64, SMALL)
        model = detector_step.Trainer.build_model(cfg).train()
        detector_step.propose_alike(model)
        (batch,) = detector_step.real_batches(cfg, 1, 1)
        with torch.no_grad(), EventStorage(0):
            images = model.preprocess_image(batch)
            features = model.backbone(images.tensor)
            instances = [batch[0]["instances"]]
            proposals, _ = model.proposal_generator(images, features, instances)
        boxes.append(proposals[0].proposal_boxes.tensor)
    assert len(boxes[0]) > 50
    torch.testing.assert_close(boxes[0], boxes[1], rtol=0, atol=0)


def test_every_measurement_has_the_same_images(coco_root) -> None:
    cfg = detector_step.detector_config("gn", "cpu", 64, SMALL)
    once, again = (detector_step.real_batches(cfg, 2, 3) for _ in range(2))
    assert [[image["file_name"] for image in batch] for batch in once] == [
        [image["file_name"] for image in batch] for batch in again
    ]


def test_what_does_not_run_is_named(coco_root) -> None:
    (steps,) = detector_step.measure_steps("cpu", 1, 0, ["sync_bn"], short_side=64, opts=SMALL)
    assert steps["seconds"] == {} and "SyncB" in steps["refused"]["sync_bn"]
    assert "sync_bn does not run: ConfigError" in table({"kind": "step", "parts": [steps]})


def test_missing_data_are_named() -> None:
    cfg = detector_step.detector_config("gn", "cpu", 64, [*SMALL, "DATASETS.TRAIN", "('mine',)"])
    with pytest.raises(UserError, match="DATASETS.TRAIN names 'mine'"):
        detector_step.real_batches(cfg, 1, 1)
