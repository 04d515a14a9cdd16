"""LazyConfigs: a matched pair, detectron2's own recipe, and the model of the quick start."""

from pathlib import Path
from typing import Any

import detectron2
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf

from ws_detectron import WSConv2d
from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.lazy import load_lazy_config
from ws_detectron.model_zoo import config_names, get_stock_lazy_config

LSJ = "mask_rcnn_R_50_FPN_100ep_LSJ"
STOCK = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "new_baselines" / f"{LSJ}.py"
NORMS = {
    f"model.{key}"
    for key in (
        "backbone.bottom_up.stem.norm",
        "backbone.bottom_up.stages.norm",
        "backbone.norm",
        "roi_heads.box_head.conv_norm",
        "roi_heads.mask_head.conv_norm",
    )
}


def flat(cfg: DictConfig) -> dict[str, Any]:
    """All values by full key; functions by name, shapes as tuples, SyncBN of heads by its name."""
    found: dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        if key.endswith("input_shape"):  # a call, a tuple (0.5, 0.6) or a dataclass (main)
            shape = value if isinstance(value, dict) else value._asdict()
            value = {k: v for k, v in shape.items() if v is not None and k != "_target_"}
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}" if key else name)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            for i, inner in enumerate(value):
                visit(inner, f"{key}.{i}")
        elif key.endswith("conv_norm") and callable(value):
            norm = value(8)
            assert type(norm).__name__ == "NaiveSyncBatchNorm" and norm._stats_mode == "N"
            found[key] = "naiveSyncBN_N"
        else:
            found[key] = getattr(value, "__qualname__", value)

    visit(OmegaConf.to_container(cfg, resolve=False), "")
    return found


def test_gn_ws_differs_from_its_twin_in_norms_and_ws_alone() -> None:
    ours, twin = (load_lazy_config(f"lazy/{LSJ}_{name}.py") for name in ("gn_ws", "sync_bn"))
    assert ours.model._target_.__name__ == "with_ws" and set(ours.model) == {"_target_", "module"}
    ours.model = ours.model.module
    ours, twin = flat(ours), flat(twin)
    assert set(ours) == set(twin)
    assert {key for key in twin if ours[key] != twin[key]} == NORMS
    assert {ours[key] for key in NORMS} == {"GN"}


@pytest.mark.skipif(not STOCK.is_file(), reason="this detectron2 comes without new baselines")
def test_twin_is_detectron2s_recipe() -> None:
    ours = flat(load_lazy_config(f"lazy/{LSJ}_sync_bn.py"))
    assert ours == flat(get_stock_lazy_config(f"new_baselines/{LSJ}.py"))


@pytest.mark.parametrize("name", config_names(".py"))
def test_the_config_of_a_run_is_read_as_the_file(name: str, tmp_path: Path) -> None:
    cfg = load_lazy_config(name)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = load_lazy_config(str(tmp_path / "config.yaml"))
    assert "!!python" not in (tmp_path / "config.yaml").read_text()
    # which names functions by module and name
    assert {key: str(value).rpartition(".")[2] for key, value in flat(again).items()} == {
        key: str(value).rpartition(".")[2] for key, value in flat(cfg).items()
    }


def test_ws_is_where_a_norm_follows() -> None:
    with torch.device("meta"):  # nothing is computed
        model = instantiate(load_lazy_config(f"lazy/{LSJ}_gn_ws.py").model)
    ws = [name for name, module in model.named_modules() if isinstance(module, WSConv2d)]
    heads = [name for name in ws if not name.startswith("backbone")]
    assert len(ws) == 53 + 8 + 4 + 4
    assert {name.rpartition(".")[0] for name in heads} == {
        "roi_heads.box_head",
        "roi_heads.mask_head",
    }


def test_small_model_is_that_of_the_quick_start() -> None:
    """Same names, weights, detections and losses, so also the same anchors, samples and input."""
    name = "mask_rcnn_R_18_FPN_shapes_gn_ws"
    torch.manual_seed(0)
    lazy = instantiate(load_lazy_config(f"lazy/{name}.py").model)
    eager = Trainer.build_model(
        load_config(f"quickstart/{name}.yaml", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05"])
    )
    eager.load_state_dict(lazy.state_dict())
    instances = Instances((128, 128), gt_classes=torch.tensor([1, 4]))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 12, 60, 50], [70, 64, 110, 120]]))
    masks = torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, 12:50, 10:60] = masks[1, 64:120, 70:110] = True
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(256, (3, 128, 128)).float()
    example = {"image": image, "instances": instances, "height": 128, "width": 128}

    losses, detections = [], []
    for model in (lazy, eager):
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model.train()([example]))
        with torch.no_grad():
            detections.append(model.eval()([example])[0]["instances"])
    assert set(losses[0]) == {f"loss_{n}" for n in ("cls", "box_reg", "mask", "rpn_cls", "rpn_loc")}
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert len(detections[0]) > 0
    for field in ("pred_classes", "scores", "pred_masks"):
        values = [found.get(field) for found in detections]
        torch.testing.assert_close(*values, rtol=0, atol=0)
