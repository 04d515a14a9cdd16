"""Compares training runs: metrics with differences to a baseline, configs, curves."""

import sys
from pathlib import Path

from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.evaluation.coco_curves import COMPARED
from ws_detectron.evaluation.comparison import as_csv, as_markdown
from ws_detectron.evaluation.curves import (
    draw_ap_curves,
    draw_evaluations,
    draw_learning_curves,
)
from ws_detectron.evaluation.figure_style import write_figure
from ws_detectron.evaluation.runs import read_runs
from ws_detectron.utils.command_line import ToolParser, closing
from ws_detectron.utils.io import check_folder, refuse_overwrite, write_text

TABLES = ("comparison.md", "comparison.csv")
CURVES = {"learning_curves.png": draw_learning_curves, "ap_curves.png": draw_ap_curves}

EXAMPLES = """
examples:
  python tools/compare_runs.py output/bn_1img output/gn_ws_1img --output comparison

  # with custom names; results of tools/evaluate_coco.py instead of run folders
  python tools/compare_runs.py "BN=bn/coco_evaluation.json" "GN+WS=gn_ws/coco_evaluation.json"

The first run is the baseline. Written: comparison.md, comparison.csv,
learning_curves.png and ap_curves.png; of runs that tools/evaluate_coco.py evaluated also
precision_recall.png, f1_over_confidence.png and ap_by_group.png. Exit status 1 where a run is
missing or broken; it is named, and the others are compared.
"""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    kinds = "RUN or NAME=RUN; a run folder, a metrics.json, or a coco_evaluation.json"
    parser.add_either("input", kinds, nargs="+")
    parser.add_argument("--output", metavar="DIR", default="comparison", help="folder")
    args = parser.parse_args()
    with exit_on_user_error():
        problems = compare(args.input, Path(args.output))
    if problems:
        print("missing or broken:", *problems, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def compare(arguments: list[str], output: Path) -> list[str]:
    """Writes tables and curves; returns what is missing or broken."""
    runs = read_runs(arguments)
    check_folder(output)
    names = (*TABLES, *CURVES, *(f"{name}.png" for name in COMPARED))
    outputs = [output / name for name in names]
    refuse_overwrite(outputs, [run.path for run in runs if run.path.is_file()])
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    if not any(run.rows or run.metrics for run in runs):
        raise UserError("nothing to compare:\n" + "\n".join(problems))
    text = as_markdown(runs)
    for name, content in zip(TABLES, (text, as_csv(runs))):
        write_text(output / name, content)
    if any(run.rows for run in runs):
        for name, draw in CURVES.items():
            write_figure(draw(runs), output / name)
    for name, figure in draw_evaluations(runs).items():
        write_figure(figure, output / name)
    written = {"comparison": output / "comparison.md", "tables and curves": output / "*.csv, *.png"}
    folder = runs[0].path if runs[0].path.is_dir() else runs[0].path.parent
    trained = ["--config-file", folder / "config.yaml", "MODEL.WEIGHTS", folder / "model_final.pth"]
    pictures = ["visualize.py", "--output", folder / "pictures", *trained]
    print(text, closing(f"compared {len(runs)} runs", written, pictures), sep="\n")
    return problems


if __name__ == "__main__":
    main()
