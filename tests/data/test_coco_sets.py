"""Custom data sets, registered by a config."""

import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices

from ws_detectron.data import (
    check_coco_set,
    classes_of,
    keypoint_names,
    mirrored,
    register_coco_sets,
)
from ws_detectron.engine import load_config
from ws_detectron.engine.checks import check_datasets, check_registered
from ws_detectron.errors import ConfigError, DataError, UserError


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


def with_keypoints(*categories: object, **changes: object) -> dict:
    """A file with one object, whose two keypoints are visible."""
    annotation = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "iscrowd": 0}
    annotation.update(area=16, keypoints=[1, 2, 2, 4, 2, 1], num_keypoints=2)
    annotation.update(changes)
    return {
        "images": [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}],
        "annotations": [{k: v for k, v in annotation.items() if v != "missing"}],
        "categories": [
            {"id": n, "name": str(n), **({} if names is None else {"keypoints": names})}
            for n, names in enumerate(categories, start=1)
        ],
    }


def registered(name: str, tmp_path: Path, content: object) -> str:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content))
    register_coco_sets([[name, str(path), str(tmp_path)]])
    return name


ENDS = ["left end", "right end"]


def test_keypoints_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    registered(name, tmp_path, with_keypoints(ENDS, None, ENDS))
    assert keypoint_names(name) == ENDS
    metadata = MetadataCatalog.get(name)
    assert metadata.keypoint_names == ENDS
    assert create_keypoint_hflip_indices([name]) == [1, 0]
    assert keypoint_names(name) == ENDS  # again


def test_the_check_of_a_file_finds_its_keypoints(name: str, tmp_path: Path) -> None:
    """So that a training reads the file once."""
    registered(name, tmp_path, with_keypoints(ENDS))
    (tmp_path / "1.png").touch()
    assert check_coco_set(name, tmp_path, keypoints=True) is None
    (tmp_path / f"{name}.json").unlink()
    assert keypoint_names(name) == ENDS


def test_keypoints_that_the_metadata_have_are_left(name: str, tmp_path: Path) -> None:
    registered(name, tmp_path, with_keypoints(["other", "names"]))
    MetadataCatalog.get(name).set(keypoint_names=ENDS, keypoint_flip_map=[])
    assert keypoint_names(name) == ENDS
    assert create_keypoint_hflip_indices([name]) == [0, 1]
    assert len(keypoint_names("keypoints_coco_2017_val")) == 17


def test_flips_of_coco_are_told_from_its_names(name: str, tmp_path: Path) -> None:
    coco = MetadataCatalog.get("keypoints_coco_2017_train")
    names = list(coco.keypoint_names)
    content = with_keypoints(names, keypoints=[1, 1, 2] * 17, num_keypoints=17)
    registered(name, tmp_path, content)
    keypoint_names(name)
    assert {frozenset(pair) for pair in MetadataCatalog.get(name).keypoint_flip_map} == {
        frozenset(pair) for pair in coco.keypoint_flip_map
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("left_eye", "right_eye"),
        ("Left Eye", "Right Eye"),
        ("eyeLeft", "eyeRight"),
        ("EYE-LEFT", "EYE-RIGHT"),
        ("l_hip", "r_hip"),
        ("hip.L", "hip.R"),
        ("ear_r2", "ear_l2"),
        ("nose", "nose"),
        ("collar", "collar"),
        ("tail", "tail"),
    ],
)
def test_left_and_right_are_exchanged(one: str, other: str) -> None:
    assert mirrored(one) == other and mirrored(other) == one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_keypoints(None), "no category has `keypoints`, a list of names"),
        (with_keypoints(ENDS, ENDS[:1]), "not every category has the same `keypoints`"),
        (with_keypoints(["a", "a"]), r"list of different names: .* \['a', 'a'\]"),
        (with_keypoints("ab"), "list of different names: .* 'ab'"),
        (with_keypoints(ENDS, keypoints="missing"), r"must be 6 numbers.*\(id 5\) has None"),
        (with_keypoints(ENDS, keypoints=[1, 2, 2]), r"must be 6 numbers.* has \[1, 2, 2\]"),
        (with_keypoints(ENDS, keypoints=[1, 2, "2", 4, 2, 1]), "finite numbers: .*'2'"),
        (with_keypoints(ENDS, keypoints=[1, 2, 2, 4, math.nan, 1]), "finite numbers: .*nan"),
        ({**with_keypoints(ENDS), "annotations": ["mine"]}, "must be objects: .*'mine'"),
        (with_keypoints(ENDS, num_keypoints="missing"), r"no `num_keypoints`.*\(id 5\)"),
        (with_keypoints(ENDS, keypoints=[0] * 6), "no annotation has a labelled keypoint"),
        ([], "not in COCO format"),
        ({"images": [], "categories": [3]}, r"categories\[0\] has 3"),
    ],
)
def test_files_without_the_keypoints_are_named(
    content: object, message: str, name: str, tmp_path: Path
) -> None:
    registered(name, tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        keypoint_names(name)
    assert f"{name}.json" in str(caught.value)


def test_the_copy_of_a_fixed_file_is_not_written_over_it(name: str, tmp_path: Path) -> None:
    content = with_keypoints(ENDS, iscrowd="missing")
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / f"{name}.json"
    path.write_text(json.dumps(content))
    (tmp_path / "1.png").touch()
    register_coco_sets([[name, str(path), str(tmp_path)]])
    with pytest.raises(UserError, match=f"{name}.json is an input"):
        check_coco_set(name, tmp_path)
    assert json.loads(path.read_text()) == content
    assert check_coco_set(name, tmp_path / "out") is not None
