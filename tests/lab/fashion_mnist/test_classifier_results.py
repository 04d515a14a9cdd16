import json
from pathlib import Path

import pytest
from finished_runs import write_run

from ws_detectron.errors import UserError
from ws_detectron.lab.fashion_mnist.accuracy_results import group_runs, read_records, read_runs
from ws_detectron.lab.fashion_mnist.training_settings import RECIPE


def test_runs_are_averaged_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.90, 0.92, 0.94)):
        write_run(
            tmp_path, accuracy, seconds=10.0 * seed, variant="gn_ws", batch_size=32, seed=seed
        )
    write_run(tmp_path, 0.1, variant="bn", batch_size=32)
    bn, gn_ws = group_runs(read_runs(tmp_path))
    assert gn_ws.title == "GN+WS" and gn_ws.accuracy == pytest.approx(92.0)
    assert gn_ws.deviation == pytest.approx(2.0)
    assert gn_ws.seconds == pytest.approx(11.5)  # of 1, 2, 11, 12, 21, 22
    assert gn_ws.reported == (20.0, 92.82)
    assert (bn.title, bn.accuracy, bn.deviation, bn.reported) == (
        "BN", pytest.approx(10.0), None, (10.0, 92.49),
    )  # fmt: skip


def test_other_models_are_separate_and_not_in_the_report(tmp_path: Path) -> None:
    write_run(tmp_path, 0.9, variant="gn_ws", batch_size=2)
    write_run(tmp_path, 0.8, variant="gn_ws", batch_size=2, groups=8)
    write_run(tmp_path, 0.7, variant="gn_ws", batch_size=2, order="detector")
    groups = group_runs(read_runs(tmp_path))
    assert [group.title for group in groups] == [
        "GN+WS",
        "GN+WS, 8 groups",
        "GN+WS, detector order",
    ]
    assert [group.reported is None for group in groups] == [False, True, True]


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path, 0.9, variant="gn", batch_size=32, seed=0)
    write_run(tmp_path, 0.9, variant="gn", batch_size=32, seed=1, lr=0.5)
    with pytest.raises(UserError, match="cannot be in one report: their lr is 0.02 and 0.5"):
        group_runs(read_runs(tmp_path))


def test_a_stray_run_neither_enters_the_report_nor_replaces_a_record(tmp_path: Path) -> None:
    write_run(tmp_path / "old", 0.9, variant="gn", batch_size=2)
    records = [run.as_record() for run in read_runs(tmp_path / "old")]
    (tmp_path / "runs.json").write_text(json.dumps(records))
    write_run(tmp_path / "new", 0.1, variant="gn", batch_size=2, lr=9.0)
    with pytest.raises(UserError, match="record of gn_batch2_seed0 and .* their lr is 0.0015 and"):
        read_runs(tmp_path / "new", read_records(tmp_path))
    write_run(tmp_path / "old", 0.1, variant="bn", batch_size=32, epochs=1)
    with pytest.raises(UserError, match="bn_batch32_seed0 .* their epochs is 1 and 2;"):
        group_runs(read_runs(tmp_path / "old"))


def test_another_recipe_is_another_report(tmp_path: Path) -> None:
    path = write_run(tmp_path, 0.9, variant="gn", batch_size=32) / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "recipe": RECIPE}))
    group_runs(read_runs(tmp_path))
    path.write_text(json.dumps({**result, "recipe": {**RECIPE, "momentum": 0.8}}))
    with pytest.raises(UserError, match="gn_batch32_seed0 was trained with the recipe .*: 0.8"):
        group_runs(read_runs(tmp_path))


def test_missing_and_damaged_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished trainings"):
        read_runs(tmp_path)
    path = write_run(tmp_path, 0.9, variant="gn", batch_size=32) / "result.json"
    path.write_text("{")
    with pytest.raises(UserError, match=f"cannot read {path}"):
        read_runs(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match=f"{path} is not of a finished training"):
        read_runs(tmp_path)


def test_records_stand_for_runs_whose_folders_are_gone(tmp_path: Path) -> None:
    write_run(tmp_path / "old", 0.9, variant="gn", batch_size=32)
    write_run(tmp_path / "old", 0.8, variant="bn", batch_size=32)
    records = [run.as_record() for run in read_runs(tmp_path / "old")]
    (tmp_path / "runs.json").write_text(json.dumps(records))
    write_run(tmp_path / "new", 0.7, variant="bn", batch_size=32)  # replaces its record
    runs = read_runs(tmp_path / "new", read_records(tmp_path))
    assert [(run.name, run.result["test_accuracy"]) for run in runs] == [
        ("bn_batch32_seed0", 0.7), ("gn_batch32_seed0", 0.9),
    ]  # fmt: skip
    assert runs[1].test_logits() is None and runs[0].test_logits() is not None
    assert [run.as_record() for run in read_records(tmp_path)] == records
    assert read_records(tmp_path / "new") == []
    (tmp_path / "runs.json").write_text("[1]")
    with pytest.raises(UserError, match="does not hold the records"):
        read_records(tmp_path)


def test_files_of_version_0_1_call_the_variant_arm(tmp_path: Path) -> None:
    path = write_run(tmp_path / "old", 0.9, variant="gn", batch_size=32) / "result.json"
    path.write_text(path.read_text().replace('"variant"', '"arm"'))
    (run,) = read_runs(tmp_path / "old")
    (tmp_path / "runs.json").write_text(json.dumps([run.as_record()]).replace('"variant"', '"arm"'))
    (record,) = read_records(tmp_path)
    for found in (run, record):
        assert found.settings["variant"] == "gn" and "arm" not in found.settings
        assert found.as_record()["settings"] == found.settings
