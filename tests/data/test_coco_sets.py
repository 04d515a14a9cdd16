"""Data sets of one's own, registered by a config."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ws_detectron.data import classes_of, register_coco_sets
from ws_detectron.engine import load_config
from ws_detectron.engine.checks import check_datasets, check_registered
from ws_detectron.errors import ConfigError, UserError


@pytest.fixture
def name() -> Iterator[str]:
    name = f"mine_{uuid.uuid4().hex}"
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_config_registers_its_data_sets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    image = {"id": 7, "file_name": "7.png", "height": 4, "width": 6}
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 1, 2, 2], "iscrowd": 0}
    content = {"images": [image], "annotations": [annotation]}
    content["categories"] = [{"id": 3, "name": "button"}]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    (tmp_path / "mine.yaml").write_text(f"DATASETS: {{REGISTER: [[{name}, mine.json, images]]}}")
    monkeypatch.chdir(tmp_path)
    cfg = load_config("mine.yaml")
    files = [str(tmp_path / "mine.json"), str(tmp_path / "images")]
    assert cfg.DATASETS.REGISTER == [[name, *files]]
    load_config("", ["DATASETS.REGISTER", f"[['{name}', 'mine.json', '{tmp_path}/images']]"])
    monkeypatch.chdir("/")  # paths were relative to where the config was read
    (found,) = DatasetCatalog.get(name)
    assert found["file_name"] == str(tmp_path / "images" / "7.png")
    assert found["annotations"][0]["category_id"] == 0
    assert MetadataCatalog.get(name).thing_classes == ["button"]
    assert MetadataCatalog.get(name).evaluator_type == "coco"
    check_datasets("DATASETS.TRAIN", [name])


def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    register_coco_sets([(name, str(tmp_path / "none.json"), str(tmp_path))])
    with pytest.raises(UserError, match="none.json, which does not exist; DATASETS.REGISTER names"):
        check_datasets("DATASETS.TRAIN", [name])


def test_none_and_home_folders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert register_coco_sets(None) == []
    monkeypatch.setenv("HOME", "/home/somebody")
    (entry,) = register_coco_sets([[name, "~/a.json", "~/images"]])
    assert entry == [name, "/home/somebody/a.json", "/home/somebody/images"]


def test_a_set_that_only_another_config_registers_is_refused(name: str) -> None:
    register_coco_sets([[name, "a.json", "images"]])
    cfg = load_config("", ["DATASETS.TEST", f"('{name}',)"])
    with pytest.raises(ConfigError, match=f"DATASETS.TEST names '{name}'.* there: nothing"):
        check_registered(cfg)
    cfg.DATASETS.REGISTER = [[name, "a.json", "images"]]
    check_registered(cfg)


def test_classes_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "button"}]}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    register_coco_sets([[name, str(tmp_path / "mine.json"), str(tmp_path)]])
    assert classes_of(name).thing_classes == ["button"]
    (tmp_path / "mine.json").write_text("no JSON")
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    register_coco_sets([[name, str(tmp_path / "mine.json"), str(tmp_path)]])
    with pytest.raises(UserError, match="mine.json are not JSON"):
        classes_of(name)


def test_addresses_stay_as_they_are(name: str) -> None:
    entry = [name, "s3://mine/a.json", "s3://mine/images"]
    assert register_coco_sets([entry]) == [entry]


@pytest.mark.parametrize(
    "entry", ["mine", ["mine", "a.json"], ["mine", "a.json", 3], ["", "a", "b"]]
)
def test_entries_of_another_form_are_refused(entry: object) -> None:
    with pytest.raises(ConfigError, match="DATASETS.REGISTER is a list of .*name, path"):
        register_coco_sets([entry])


def test_a_name_that_is_taken_is_refused(name: str) -> None:
    register_coco_sets([[name, "a.json", "images"]])
    with pytest.raises(ConfigError, match=f"{name}' is taken by .*a.json.* choose another name"):
        register_coco_sets([[name, "b.json", "images"]])
    with pytest.raises(ConfigError, match="coco_2017_val"):
        register_coco_sets([["coco_2017_val", "a.json", "images"]])


def test_an_unknown_name_says_how_to_register_it() -> None:
    with pytest.raises(ConfigError, match="not_there.*DATASETS.REGISTER registers"):
        check_datasets("DATASETS.TRAIN", ["not_there"])
