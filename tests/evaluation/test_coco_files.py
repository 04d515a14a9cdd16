import json
from pathlib import Path
from typing import Any

import pytest
from small_coco import annotations, prediction

from ws_detectron.errors import DataError
from ws_detectron.evaluation.coco_files import (
    check_ids,
    load_annotations,
    load_predictions,
)

BOX = (10, 10, 20, 20)


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_valid_files_are_read_unchanged(tmp_path: Path) -> None:
    truth, found = annotations([(1, 1, BOX)]), [prediction(1, 1, BOX, 0.5)]
    assert load_annotations(written(tmp_path / "a.json", truth)) == truth
    assert load_predictions(written(tmp_path / "p.json", found)) == found
    check_ids(found, truth, "p.json", "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "score must be a finite number"),
        ({"score": "high"}, "score must be a finite number, found 'high'"),
        ({"bbox": [1, 2, 3]}, "four finite numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, "negative width or height"),
        ({"score": None}, "has no 'score'"),
        ({"bbox": None, "segmentation": None}, "neither 'bbox' nor 'segmentation'"),
    ],
)
def test_malformed_predictions_are_named(tmp_path: Path, change: dict, message: str) -> None:
    good = prediction(1, 1, BOX, 0.5)
    broken = {**good, **change}
    broken = {key: value for key, value in broken.items() if value is not None}
    with pytest.raises(DataError, match=f"p.json, entry 1: .*{message}"):
        load_predictions(written(tmp_path / "p.json", [good, broken]))


def test_files_that_are_no_predictions_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="swapped"):
        load_predictions(written(tmp_path / "p.json", annotations([])))
    with pytest.raises(DataError, match="entry 0: must be an object"):
        load_predictions(written(tmp_path / "p.json", [3]))
    with pytest.raises(DataError, match="there is no predictions file .*missing.json"):
        load_predictions(tmp_path / "missing.json")


def test_ids_of_another_data_set_are_named() -> None:
    truth = annotations([(1, 1, BOX)])
    found = [prediction(n, 1, BOX, 0.5) for n in (1, 7, 8, 9, 10, 11, 12)]
    with pytest.raises(DataError, match=r"p.json name 6 image ids .*7, .* and 1 more.*split"):
        check_ids(found, truth, "p.json", "a.json")
    with pytest.raises(DataError, match="1 category ids .*: 0 .*class numbers from 0"):
        check_ids([prediction(1, 0, BOX, 0.5)], truth, "p.json", "a.json")
