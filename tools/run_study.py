"""Runs a study: trains variants x batch sizes x seeds, then writes a report."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.lab.study import (
    Options,
    check_packages,
    commands,
    draw_studies,
    read_study,
    read_study_results,
    report_study,
    run_study,
)
from ws_detectron.lab.study.records import FINISHED, RUNS
from ws_detectron.utils.command_line import ToolParser, closing, within

EXAMPLES = """
examples:
  # run all, on the CPU; the same command resumes it
  python tools/run_study.py configs/studies/fashion_scenes.yaml

  # two runs at a time; only print the commands; only report what there is
  python tools/run_study.py configs/studies/fashion_scenes.yaml --jobs 2
  python tools/run_study.py configs/studies/fashion_scenes.yaml --dry-run
  python tools/run_study.py configs/studies/fashion_scenes.yaml --report-only

  # in several sessions: finished runs are recorded, and not trained again
  python tools/run_study.py configs/studies/fashion_scenes.yaml --records records --seeds 1

  # small runs on one GPU, four at a time
  python tools/run_study.py configs/studies/fashion_scenes.yaml --device cuda \\
      --jobs 4 --gpus 0 0 0 0

  # on 8 GPUs of this machine; one Slurm job per run (pip install -e .[slurm])
  python tools/run_study.py configs/studies/coco_8gpu.yaml --gpus 0 1 2 3 4 5 6 7
  python tools/run_study.py configs/studies/coco_8gpu.yaml --launcher slurm --seeds 1

  # one figure of two studies
  python tools/run_study.py configs/studies/fashion_scenes_6400_1img.yaml \\
      configs/studies/fashion_scenes_6400_8img.yaml --figure ap.png \\
      --records results/batch_size_study_6400_1img --records results/batch_size_study_6400_8img

The exit status is 1 if a run failed or is missing; it is named, and the others are reported.
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    parser.add_either("input", "a study file; several with --figure", nargs="+")
    parser.add_argument("--jobs", type=within(int, 1), default=1, help="runs at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the study file's")
    parser.add_argument(
        "--gpus", type=int, nargs="+", metavar="N",
        help="default: all, once each; a GPU that is named n times is shared by n runs",
    )  # fmt: skip
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="starts the runs"
    )
    parser.add_argument("--variants", nargs="+", help="run only these")
    parser.add_argument("--batches", type=int, nargs="+", help="run only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="run only these")
    parser.add_argument(
        "--records", metavar="DIR", type=Path, action="append", default=[],
        help="keep runs.jsonl and metrics.csv of finished runs here, and do not train them again",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing, only write the report"
    )
    parser.add_argument(
        "--report", metavar="DIR", type=Path, help="default: that of --records, else OUTPUT/report"
    )
    parser.add_argument(
        "--figure", metavar="PNG", type=Path,
        help="only draw the first score of each variant, a panel per study and batch",
    )  # fmt: skip
    parser.add_argument("--html", action="store_true", help="also write report.html, one page")
    args = parser.parse_args()
    with exit_on_user_error():
        if not args.dry_run:
            check_packages(args.html)
        for folder in args.records if args.report_only or args.figure else ():
            if not (folder / RUNS).is_file():
                raise UserError(f"{folder} has no {RUNS}; check --records")
        if args.figure:
            draw_studies(args.input, args.records, args.batches, args.figure)
            print(closing(f"drew {len(args.input)} studies", {"figure": args.figure}))
            return
        if len(args.input) > 1 or len(args.records) > 1:
            parser.error("several studies or --records are allowed with --figure only")
        study, records = read_study(args.input[0]), next(iter(args.records), None)
        if args.device:
            study = replace(study, device=args.device)
        say = partial(print, flush=True)
        shared = ("jobs", "gpus", "launcher", "variants", "batches", "seeds")
        options = Options(**{name: getattr(args, name) for name in shared}, records=records)
        if args.dry_run:
            print(*commands(study, options), sep="\n")
            return
        if args.report_only:
            results = read_study_results(study, records)
        else:
            results = run_study(study, options, say)
        folder = args.report or records or study.output / "report"
        problems = report_study(results, folder, say, page=args.html)
    if problems:
        print("missing or failed:", *problems, sep="\n  ", file=sys.stderr)
    finished = sum(result.status == FINISHED for result in results.runs)
    made = f"{finished} of {len(results.runs)} runs finished"
    files = {"report": folder / f"report.{'html' if args.html else 'md'}", "runs": study.output}
    given = [word for word in sys.argv[1:] if word not in ("--report-only", "--html")]
    more = [] if problems else ["--report-only", "--html"]
    print(closing(made, files, ["run_study.py", *given, *more]))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
