"""Kills trainings at random times, resumes them, and compares them with others, bit for bit.

Each case, a model on the CPU with small images, is trained twice: once without interruption, and
once killed with SIGKILL again and again, resumed each time with another number of data workers.
Weights, momentum, schedule, recent metrics and metrics.json must be equal but for times.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from ws_detectron.engine.checks import check_datasets
from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.lab.scenes import builtin_scenes, ensure_scenes
from ws_detectron.utils.command_line import ToolParser, progress, verdict, within
from ws_detectron.utils.environment import environment
from ws_detectron.utils.io import check_folder, write_json, write_text

EXAMPLES = """
examples (needs COCO in DETECTRON2_DATASETS; 128 images are enough):
  python tools/check_resume.py --kills 20 --output results/resume
  python tools/check_resume.py --kills 2 --cases r18_gn_ws
"""
SCENES = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
COCO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_{}_1img.yaml"
BN = (
    "MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.RESNETS.NORM BN MODEL.FPN.NORM BN "
    "MODEL.ROI_BOX_HEAD.NORM BN MODEL.ROI_MASK_HEAD.NORM BN MODEL.ROI_MASK_HEAD.NAME "
    "MaskRCNNConvUpsampleHead MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead"
)


class Case(NamedTuple):
    """A config with overrides, processes, and parts of a batch."""

    config: str
    opts: str = ""
    processes: int = 1
    parts: int = 1


# Both models, norm layers, numbers of processes and of parts are in two of them.
CASES = {
    "r18_gn_ws": Case(SCENES),
    "r18_bn_2_processes_2_parts": Case(SCENES, BN, processes=2, parts=2),
    "r50_gn_ws_2_processes": Case(COCO.format("gn_ws"), processes=2),
    "r50_bn_2_parts": Case(COCO.format("bn"), parts=2),
}
SMALL = {
    **{"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "SEED": 7, "TEST.EXPECTED_RESULTS": []},
    **{"SOLVER.IMS_PER_BATCH": 4, "SOLVER.REFERENCE_WORLD_SIZE": 0, "SOLVER.BASE_LR": 0.001},
    **{"SOLVER.REFERENCE_IMS_PER_BATCH": 0, "SOLVER.STEPS": "(9,)", "SOLVER.WARMUP_ITERS": 3},
    **{"SOLVER.CHECKPOINT_PERIOD": 3, "SOLVER.CHECKPOINT_KEEP": 2, "SOLVER.MAX_ITER": 12},
    **{"INPUT.MIN_SIZE_TRAIN": "(48, 64)", "INPUT.MAX_SIZE_TRAIN": 96},
    **{"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 96, "TEST.EVAL_PERIOD": 6},
    **{"MODEL.RPN.POST_NMS_TOPK_TRAIN": 30, "MODEL.RPN.POST_NMS_TOPK_TEST": 10},
    **{"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.001},
    **{"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2},
    **{"TEST.DETECTIONS_PER_IMAGE": 3},
}
EVALUATED = 6
"""Images; an evaluation of a whole set would be most of a run."""
WORKERS = (0, 1, 3)
PHASES = ("start-up", "training", "checkpoint", "evaluation")
TIMES = ("time", "data_time", "eta_seconds")
PACKAGES = ("torch", "detectron2", "numpy")


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--kills", type=within(int, 0), default=20, metavar="N", help="in all cases together")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    add("--seed", type=int, default=0, help="of the times of the kills")
    add("--work", default="output/check_resume", metavar="DIR", help="new folder for the runs")
    add("--output", default="results/resume", metavar="DIR", help="folder of the report")
    args = parser.parse_args()
    with exit_on_user_error():
        check_folder(args.output)
        work = Path(args.work).absolute()
        for name in {data_of(CASES[name]) for name in args.cases}:
            write_few_images(name, work / f"{name}.json")
        about = {**environment(PACKAGES), "seed": args.seed, "kills": args.kills}
        rng = random.Random(args.seed)
        shares = [len(range(i, args.kills, len(args.cases))) for i in range(len(args.cases))]
        rows, kills = [], []
        for name, share in progress([*zip(args.cases, shares)], "training and killing", "run"):
            whole, seconds = train_alone(CASES[name], work / name / "whole")
            folder = work / name / "killed"
            found = train_killed(CASES[name], folder, share, seconds, rng)
            different = differences(outcome(whole), outcome(folder))
            rows.append({"run": name, "kills": len(found), "different": ", ".join(different)})
            kills += [{"run": name, **kill} for kill in found]
            print(rows[-1], flush=True)
            write_json(Path(args.output, "kills.json"), {"about": about, "kills": kills})
            write_text(Path(args.output, "report.md"), report(about, rows))
        print(report(about, rows))
    checked = {row["run"]: not row["different"] for row in rows}
    what = f"killed runs ({len(kills)} kills) end bit for bit as without interruption"
    then = f"nothing; the runs can be deleted: {work}"
    sys.exit(verdict(checked, what, Path(args.output, "report.md"), then))


def data_of(case: Case) -> str:
    return "scenes_shapes_128_val" if case.config == SCENES else "coco_2017_val"


def write_few_images(name: str, path: Path) -> None:
    """Writes the annotations of a data set for its first images."""
    check_datasets("--cases", (name,))
    if name in builtin_scenes():
        ensure_scenes(builtin_scenes()[name])
    content = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
    content["images"] = content["images"][:EVALUATED]
    ids = [image["id"] for image in content["images"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    write_json(path, content)


def start(case: Case, folder: Path, workers: int) -> subprocess.Popen:
    """Starts or resumes a training; its output is in `<folder>.txt`."""
    data = data_of(case)
    few = ["few", str(folder.parents[1] / f"{data}.json"), MetadataCatalog.get(data).image_root]
    options: dict[str, Any] = {
        **SMALL,
        "DATASETS.REGISTER": [few],
        "DATASETS.TRAIN": f"('{data}',)",
        "DATASETS.TEST": "('few',)",
        "DATALOADER.NUM_WORKERS": workers,
        "SOLVER.ACCUMULATE_STEPS": case.parts,
        "OUTPUT_DIR": folder,
    }
    words = [str(word) for pair in options.items() for word in pair]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("train_net.py")), "--resume"]
    command += ["--num-gpus", str(case.processes), "--config-file", case.config]
    with open(f"{folder}.txt", "w") as log:
        return subprocess.Popen(
            [*command, *words, *case.opts.split()],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Waits for a training to end.

    Raises:
        UserError: it failed; has the end of its output.
    """
    if process.wait() != 0:
        end = Path(f"{folder}.txt").read_text().splitlines()[-3:]
        raise UserError(f"the training in {folder} failed: {' '.join(end)}")


def train_alone(case: Case, folder: Path) -> tuple[Path, float]:
    """A training without interruption; its folder and its seconds."""
    begin = time.monotonic()
    finish(start(case, folder, WORKERS[0]), folder)
    return folder, time.monotonic() - begin


def train_killed(
    case: Case, folder: Path, kills: int, seconds: float, rng: random.Random
) -> list[dict[str, Any]]:
    """A training that is killed and resumed until it ends by itself; about each kill.

    Args:
        case, folder: what is trained, and where.
        kills: how often; fewer if it ends before.
        seconds: that it takes without interruption.
        rng: draws phases and times.
    """
    found: list[dict[str, Any]] = []
    for number in range(kills):
        workers = WORKERS[(number + 1) % len(WORKERS)]
        process = start(case, folder, workers)
        phase = PHASES[number % len(PHASES)] if number < len(PHASES) else rng.choice(PHASES)
        begin = time.monotonic()
        wait_for(phase, process, folder, seconds, rng)
        if process.poll() is not None:
            finish(process, folder)
            return found
        os.killpg(process.pid, signal.SIGKILL)  # its processes and their workers
        process.wait()
        tag = folder / "last_checkpoint"
        checkpoint = tag.read_text() if tag.is_file() else "none"
        after = round(time.monotonic() - begin, 2)
        kill = {"phase": phase, "seconds": after, "workers": workers, "checkpoint": checkpoint}
        partial = [path.name for path in folder.glob(".model_*")]
        found.append({**kill, "partial files": partial})
        print(f"{folder}: killed in {phase} after {after} s", flush=True)
    finish(start(case, folder, WORKERS[(kills + 1) % len(WORKERS)]), folder)
    return found


def wait_for(
    phase: str, process: subprocess.Popen, folder: Path, seconds: float, rng: random.Random
) -> None:
    """Returns at a random moment of a phase, or when the training has ended."""

    def reached() -> bool:
        if phase == "checkpoint":
            return any(folder.glob(".model_*"))
        text = Path(f"{folder}.txt").read_text()
        return ("Start inference on" if phase == "evaluation" else "Starting training") in text

    if phase == "checkpoint":  # not one that an earlier kill has left
        while "Starting training" not in Path(f"{folder}.txt").read_text():
            if process.poll() is not None:
                return
            time.sleep(0.1)
    if phase != "start-up":
        while not reached() and process.poll() is None:
            time.sleep(0.005)
    longest = {"start-up": 0.3, "training": 0.7, "checkpoint": 0.01, "evaluation": 0.05}[phase]
    end = time.monotonic() + rng.uniform(0, longest * seconds)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal: all of the last checkpoint but times and settings, and the metrics."""
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    state = checkpoint["trainer"]
    for key in ("config", "metrics_size"):  # the latter has the digits of times
        state.pop(key)
    for key in TIMES:
        state["metrics"].pop(key, None)
    lines = (folder / "metrics.json").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]
    best = json.loads((folder / "model_best.json").read_text())
    files = sorted(path.name for path in folder.glob("model_*.pth"))
    return {**checkpoint, "metrics.json": rows, "model_best.json": best, "files": files}


def differences(expected: Any, found: Any, name: str = "") -> list[str]:
    """Names of the entries that differ in any bit; NaN equals NaN."""
    if type(expected) is not type(found):
        return [name]
    if isinstance(expected, dict):
        names = sorted({*expected, *found}, key=str)
        pairs = [(expected.get(n), found.get(n), f"{name}.{n}".strip(".")) for n in names]
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(found):
            return [name]
        pairs = [(a, b, f"{name}[{n}]") for n, (a, b) in enumerate(zip(expected, found))]
    elif isinstance(expected, torch.Tensor):
        same = (expected.dtype, expected.shape) == (found.dtype, found.shape)
        same = same and expected.numpy().tobytes() == found.numpy().tobytes()
        return [] if same else [name]
    else:
        return [] if expected == found or (expected != expected and found != found) else [name]
    return [where for pair in pairs for where in differences(*pair)]


def report(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The report as Markdown."""
    kills = sum(row["kills"] for row in rows)
    equal = sum(not row["different"] for row in rows)
    survived = sum(row["kills"] for row in rows if not row["different"])
    shown = [{**row, "different": row["different"] or "nothing"} for row in rows]
    lines = [
        f"**{survived} of {kills} kills: the run ends equal**, bit for bit ({equal} of {len(rows)} "
        "runs), to the one without interruption. Written by `tools/check_resume.py`; kills.json "
        "has the moment of each kill.",
        tabulate(shown, headers="keys", tablefmt="github"),
        ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
