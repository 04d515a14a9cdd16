"""Studies whose runs are a command with options, as the classifier's."""

import json
from pathlib import Path

import pytest
import yaml

from ws_detectron.errors import ConfigError
from ws_detectron.lab.study import Options, read_study, read_study_results, run_study, study_runs
from ws_detectron.lab.study.figures import draw_over_batch, draw_study_curves
from ws_detectron.lab.study.plan import check_runs
from ws_detectron.lab.study.report import report_text

# writes 90 + seed as accuracy; without an option `learns` none
SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("variant", "batch-size", "seed", "device", "epochs", "output", "data-dir"):
    parser.add_argument(f"--{name}")
parser.add_argument("--learns", action="store_true")
parser.add_argument("--resume", action="store_true", required=True)
args = parser.parse_args()
rows = [{"iteration": i, "total_loss": 1 / (i + 1), "time": 0.5} for i in range(4)]
if args.learns:
    rows.append({"iteration": 3, "test_accuracy": 90 + int(args.seed)})
path = pathlib.Path(args.output, "metrics.json")
path.write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""
STUDY = {
    "title": "Accuracy",
    "command": "train.py",
    "scores": {"test_accuracy": "test accuracy"},
    "batches": [2, 32],
    "seeds": [0, 1, 2],
    "options": {"epochs": 3, "learns": True, "data_dir": "here"},
    "variants": {
        "bn": {"options": {"variant": "bn"}},
        "ln": {"options": {"variant": "ln", "learns": False, "epochs": 9}, "runs": {32: [1]}},
    },
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    Path("study.yaml").write_text(yaml.safe_dump({**STUDY, "output": "out"}, sort_keys=False))
    return Path("study.yaml")


def test_runs_are_command_lines_and_a_variant_may_have_fewer(path: Path) -> None:
    runs = {run.name: run for run in study_runs(read_study(path), {})}
    assert set(runs) == {
        *(f"bn_{b}img_seed{s}" for b in (2, 32) for s in (0, 1, 2)),
        "ln_32img_seed1",
    }
    line = " ".join(runs["bn_2img_seed0"].command[1:])
    assert line == (
        "train.py --batch-size 2 --device cpu --epochs 3 --learns --data-dir here --variant bn "
        "--seed 0 --output out/runs/bn_2img_seed0 --resume"
    )
    ln = " ".join(runs["ln_32img_seed1"].command)
    assert "--epochs 9" in ln and "--learns" not in ln


def test_a_run_is_finished_once_it_has_all_scores(path: Path) -> None:
    study, options = read_study(path), Options(records=Path("records"))
    results = run_study(study, options, print)
    *bn, ln = sorted(results.runs, key=lambda result: result.run.name)
    assert [result.scores for result in bn] == [{"test_accuracy": 90.0 + s} for s in (0, 1, 2)] * 2
    assert ln.status == "failed" and "no test_accuracy" in ln.record.reason
    recorded = [json.loads(line) for line in Path("records/runs.jsonl").read_text().splitlines()]
    assert [run["state"] for run in recorded[1:]] == ["finished"] * 6
    assert recorded[0]["settings"]["command"] == "train.py"

    Path("out").rename("gone")
    again = read_study_results(study, Path("records"))
    assert [r.scores for r in again.runs] == [r.scores for r in results.runs]
    changed = {**STUDY, "options": {**STUDY["options"], "epochs": 4}}
    path.write_text(yaml.safe_dump(changed))
    with pytest.raises(
        ConfigError, match="record of bn_32img_seed0 holds .* epochs was 3 and is 4"
    ):
        read_study_results(read_study(path), Path("records"))


def test_scores_are_reported_under_their_titles(path: Path) -> None:
    results = run_study(read_study(path), Options(), print)
    text = report_text(results)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "test accuracy", "2 images", "32 images", ""] in rows
    assert ["", "BN", "91.00 ± 1.00 (3)", "91.00 ± 1.00 (3)", ""] in rows
    assert ["", "LN", "–", "–", ""] in rows
    assert ["", "`epochs`", "`3`", "`9`", ""] in rows
    assert "box" not in text
    (panel,) = draw_over_batch(results).axes
    assert panel.get_ylabel() == "test accuracy (%)" and panel.get_ylim()[0] > 80
    loss, _, accuracy, _ = draw_study_curves(results).axes
    assert loss.get_title() == "2 images per step"
    assert [*loss.lines[0].get_xdata()] == [2, 4, 6, 8] and [*accuracy.lines[0].get_ydata()] == [91]


def test_a_missing_script_is_named(path: Path) -> None:
    Path("train.py").unlink()
    with pytest.raises(ConfigError, match="`command`: there is no file .*train.py"):
        check_runs(study_runs(read_study(path), {}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": 80}, "`images` has no effect on variants with `options`"),
        ({"scores": {}}, "`scores` is missing"),
        ({"overrides": {"SOLVER.BASE_LR": 1}}, "`overrides` has no effect"),
    ],
)
def test_keys_of_detectors_are_refused(path: Path, changes: dict, message: str) -> None:
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    with pytest.raises(ConfigError, match=message):
        read_study(path)
