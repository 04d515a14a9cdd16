"""load_config: files, names, overrides, errors that name the key. prepare: once, and it stays."""

import argparse
import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ws_detectron.data import check_coco_set
from ws_detectron.engine import as_flat_dict, checks, load_config, run
from ws_detectron.engine.checks import Purpose
from ws_detectron.engine.prepare import prepare
from ws_detectron.errors import ConfigError, UserError

KNOWN = ("json_file", "image_root", "keypoint_names", "keypoint_flip_map")


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_merges_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "MODEL: {WS: {MODE: paper}}\nSOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\n")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "9", "MODEL.WS.EPS", "1e-3"])
    changed = {
        key: value
        for key, value in as_flat_dict(cfg).items()
        if value != as_flat_dict(load_config("")).get(key)
    }
    assert changed == {
        "MODEL.WS.MODE": "paper",
        "MODEL.WS.EPS": 1e-3,
        "SOLVER.BASE_LR": 0.5,
        "SOLVER.MAX_ITER": 9,
    }


@pytest.mark.parametrize(
    "opts, warned",
    [
        ("SOLVER.IMS_PER_BATCH 8", True),
        ("SOLVER.IMS_PER_BATCH 8 SOLVER.BASE_LR 0.01", False),
        ("SOLVER.IMS_PER_BATCH 8 SOLVER.REFERENCE_IMS_PER_BATCH 16", False),
        ("SOLVER.IMS_PER_BATCH 16", False),
        ("SOLVER.MAX_ITER 8", False),
    ],
)
def test_a_batch_that_changes_alone_is_warned_of(
    opts: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_2img.yaml"
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        load_config(name, opts.split())
    expected = "is 8, but .* are for 16; .*add SOLVER.REFERENCE_IMS_PER_BATCH 16"
    assert bool(re.search(expected, caplog.text)) == warned
    assert len(caplog.records) == warned


@pytest.mark.parametrize(
    "opts, warned",
    [
        ("SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.01 SOLVER.MAX_ITER 9", "BASE_LR and SOLVER.MAX_"),
        (
            "SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 9",
            "SOLVER.MAX_ITER: scaled from 4 images",
        ),
        ("SOLVER.IMS_PER_BATCH 2", ""),
        ("SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 9 SOLVER.REFERENCE_IMS_PER_BATCH 2", ""),
    ],
)
def test_values_that_are_scaled_with_a_stated_batch_are_warned_of(
    opts: str, warned: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="ws_detectron"):
        load_config("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml", opts.split())
    assert warned in caplog.text and len(caplog.records) == bool(warned)


def test_flat_dict_has_every_value_under_its_full_name() -> None:
    flat = as_flat_dict(get_cfg())
    assert flat["MODEL.RPN.HEAD_NAME"] == "StandardRPNHead" and flat["VERSION"] == 2
    assert "MODEL.RPN" not in flat


@pytest.mark.parametrize(
    "opts, parts",
    [
        (["MODEL.WS.MODUS", "paper"], ["MODEL.WS.MODUS", "MODEL.WS.MODE"]),
        (["SOLVER.BASE_LRR", "0.1"], ["SOLVER.BASE_LRR", "SOLVER.BASE_LR"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "many"]),
        (["SOLVER.MAX_ITER"], ["pairs", "SOLVER.MAX_ITER"]),
    ],
)
def test_wrong_override_names_key_and_remedy(opts: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("", opts)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_unknown_key_in_a_file_names_file_key_and_near_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "MODEL: {WS: {MASKHEAD: False}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in (path, "MODEL.WS.MASKHEAD", "MODEL.WS.MASK_HEAD"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["MODEL: [", "just words", "\x00\x01"])
def test_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match="config.yaml"):
        load_config(path)


def test_missing_file() -> None:
    with pytest.raises(UserError, match="no_such_config.yaml"):
        load_config("no_such_config.yaml")


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets whose annotation files were read and validated, in order."""
    names: list[str] = []

    def check(name: str, *args: Any, **options: Any) -> Optional[str]:
        names.append(name)
        return check_coco_set(name, *args, **options)

    monkeypatch.setattr("ws_detectron.engine.checks.check_coco_set", check)
    return names


def test_a_prepared_config_is_not_prepared_again(tiny_cfg: CfgNode, validated: list[str]) -> None:
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 2, 4
    before = tiny_cfg.dump()
    cfg = prepare(tiny_cfg)
    assert tiny_cfg.dump() == before and cfg.SOLVER.BASE_LR == tiny_cfg.SOLVER.BASE_LR / 2
    assert prepare(cfg) is cfg and len(validated) == 1
    frozen = pickle.loads(pickle.dumps(cfg.clone()))
    frozen.freeze()
    assert prepare(frozen) is frozen and len(validated) == 1


def test_what_was_changed_is_prepared_again(tiny_cfg: CfgNode, validated: list[str]) -> None:
    cfg = prepare(tiny_cfg)
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list(["SOLVER.IMS_PER_BATCH", 3])
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH is 3"):
        prepare(changed, world_size=2)
    assert prepare(changed) is not changed and len(validated) == 2
    prepare(cfg, Purpose.EVALUATE)
    prepare(cfg, world_size=2)
    prepare(CfgNode.load_cfg(cfg.dump()))  # as a run's config.yaml
    assert len(validated) == 5


def test_an_evaluation_does_not_ask_for_a_batch_that_processes_can_share(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.REFERENCE_WORLD_SIZE = 1, 8
    assert prepare(tiny_cfg, Purpose.EVALUATE).SOLVER.BASE_LR == tiny_cfg.SOLVER.BASE_LR
    with pytest.raises(ConfigError, match="REFERENCE_WORLD_SIZE, 8"):
        prepare(tiny_cfg)


def test_a_config_without_our_keys_names_the_call_that_adds_them() -> None:
    with pytest.raises(ConfigError, match=r"call ws_detectron.add_ws_config\(cfg\) first"):
        prepare(get_cfg())


def test_a_written_config_has_detectron2s_keys_and_ours_alone(tiny_cfg: CfgNode) -> None:
    assert CfgNode.load_cfg(prepare(tiny_cfg).dump()).keys() == tiny_cfg.keys()


def test_a_run_validates_and_loads_each_file_once(
    tiny_cfg: CfgNode, validated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = mock.Mock(wraps=checks.get_detection_dataset_dicts)
    monkeypatch.setattr(checks, "get_detection_dataset_dicts", load)
    args = argparse.Namespace(eval_only=False, resume=False, config_file="")
    run(tiny_cfg, args)
    assert validated == list(tiny_cfg.DATASETS.TRAIN) and load.call_count == 1
    tiny_cfg.MODEL.WEIGHTS = f"{tiny_cfg.OUTPUT_DIR}/model_final.pth"
    args.eval_only = True
    run(tiny_cfg, args)
    assert validated == 2 * list(tiny_cfg.DATASETS.TRAIN)


def test_each_run_reads_its_own_fixed_copy(keypoint_cfg: CfgNode, tmp_path: Path) -> None:
    given = tmp_path / "annotations.json"
    sound = json.loads(given.read_text())
    broken = {**sound, "annotations": [{**a, "iscrowd": None} for a in sound["annotations"]]}
    given.write_text(json.dumps(broken))
    keypoint_cfg.DATASETS.REGISTER = [["mine", str(given), str(tmp_path / "images")]]
    keypoint_cfg.DATASETS.TRAIN = keypoint_cfg.DATASETS.TEST = ("mine",)
    try:
        for run in ("one", "two"):
            keypoint_cfg.OUTPUT_DIR = str(tmp_path / run)
            found = prepare(keypoint_cfg)
            copy = str(tmp_path / run / "annotations" / "mine.json")
            assert MetadataCatalog.get("mine").json_file == copy
            assert (
                pickle.loads(pickle.dumps(found)).__dict__["prepared"].annotations["mine"] == copy
            )
        given.write_text(json.dumps(sound))
        keypoint_cfg.SEED = 7
        prepare(keypoint_cfg)
        assert MetadataCatalog.get("mine").json_file == str(given)
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


def test_epochs_count_the_images_that_have_objects(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """Of four images one has no object: 3 images in steps of 2, 5 epochs: 8 steps."""
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    tiny_cfg.SOLVER.EPOCHS, tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.STEPS = 5, 100, (50,)
    cfg = prepare(tiny_cfg)
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (0, 8, (4,))
    tiny_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert prepare(tiny_cfg).SOLVER.MAX_ITER == 10
    assert prepare(tiny_cfg, Purpose.EVALUATE).SOLVER.EPOCHS == 5


def test_a_run_in_epochs_resumes_from_its_own_config(tiny_cfg: CfgNode) -> None:
    """Also with more images than before: the schedule stays."""
    tiny_cfg.SOLVER.EPOCHS, tiny_cfg.DATASETS.TEST = 1, ()
    args = argparse.Namespace(eval_only=False, resume=True, config_file="")
    run(tiny_cfg, args)
    assert "training on 4 images" in Path(tiny_cfg.OUTPUT_DIR, "log.txt").read_text()
    written = load_config(f"{tiny_cfg.OUTPUT_DIR}/config.yaml")
    assert (written.SOLVER.EPOCHS, written.SOLVER.MAX_ITER) == (0, 2)
    written.DATASETS.TRAIN *= 2
    assert prepare(written).SOLVER.MAX_ITER == 2


def test_iterations_that_epochs_would_replace_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "SOLVER: {EPOCHS: 7}\n")
    with pytest.raises(ConfigError, match="SOLVER.MAX_ITER 9 .* add SOLVER.EPOCHS 0"):
        load_config(path, ["SOLVER.MAX_ITER", "9"])
    assert load_config(path, ["SOLVER.MAX_ITER", "9", "SOLVER.EPOCHS", "0"]).SOLVER.MAX_ITER == 9


def test_a_depth_that_detectron2_does_not_have_is_refused(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.RESNETS.DEPTH = 99
    with pytest.raises(
        ConfigError, match="MODEL.RESNETS.DEPTH is 99; allowed: 18, 34, 50, 101, 152"
    ):
        prepare(tiny_cfg)


def test_a_part_of_a_config_is_refused(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.FPN.IN_FEATURES = []
    with pytest.raises(ConfigError, match="IN_FEATURES is empty.* parts of configs"):
        prepare(tiny_cfg)


def test_another_process_registers_what_was_found(
    keypoint_cfg: CfgNode, tmp_path: Path, validated: list[str]
) -> None:
    """The sets of DATASETS.REGISTER, the fixed copy of a file, and keypoints."""
    content = json.loads((tmp_path / "annotations.json").read_text())
    for annotation in content["annotations"]:
        del annotation["iscrowd"]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    mine = ["mine", str(tmp_path / "annotations.json"), str(tmp_path / "images")]
    keypoint_cfg.DATASETS.REGISTER = [mine]
    keypoint_cfg.DATASETS.TRAIN = keypoint_cfg.DATASETS.TEST = ("mine",)
    found = []
    try:
        cfg = prepare(keypoint_cfg)
        for _ in range(2):
            metadata = MetadataCatalog.get("mine")
            found.append({key: metadata.get(key) for key in KNOWN})
            DatasetCatalog.remove("mine")
            MetadataCatalog.remove("mine")
            (tmp_path / "annotations.json").unlink(missing_ok=True)  # not needed any more
            prepare(cfg)
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")
    assert found[1] == found[0] and len(validated) == 1
    assert found[0]["json_file"] == f"{cfg.OUTPUT_DIR}/annotations/mine.json"
    assert found[0]["keypoint_flip_map"] == [("left end", "right end")]
