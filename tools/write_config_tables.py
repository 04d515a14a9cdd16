"""Writes the tables of MODEL_ZOO.md and configs/README.md, from the configs themselves and from
docs/published_ap.csv, the published AP of others."""

import csv
import logging
import re
from pathlib import Path

from detectron2.config import CfgNode

from ws_detectron.model_zoo import config_names, get_config
from ws_detectron.utils.command_line import ToolParser, closing

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("MODEL_ZOO.md", "configs/README.md")
PUBLISHED = ROOT / "docs" / "published_ap.csv"
LEAF = re.compile(
    r"(?P<folder>.*)/(?P<row>(scratch_|mask_|faster_|retinanet_|panoptic_).*?)(_\d+img)?\.yaml"
)


def filled(page: str) -> str:
    """The text of a page with its tables as they should be.

    A table is what is between `<!-- table: NAME -->` and `<!-- end -->`.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(
        r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + _table(match[2]) + "\n" + match[3],
        text,
        flags=re.DOTALL,
    )


def _table(name: str) -> str:
    """A table in Markdown: the published AP, or a row for each config in a folder of `configs/`."""
    if name == "published":
        rows = _published()
    elif name in ("norms", "weights", "schedules"):
        row = {"norms": _norm, "weights": _weights, "schedules": _schedule}[name]
        files = [file for file in config_names() if file.startswith(f"{name}/")]
        rows = [{"file": f"[{file}]({file})", **row(get_config(file))} for file in files]
    else:
        rows = _leaves(name)
    return "\n".join(
        f"| {' | '.join(cells)} |"  # not padded: a new row changes no other
        for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    )


def _published() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _norm(cfg: CfgNode) -> dict[str, str]:
    ws = cfg.MODEL.BACKBONE.NAME.startswith("build_ws_")
    kind = "affine" if cfg.MODEL.WS.AFFINE else "yes"
    return {
        "backbone": cfg.MODEL.RESNETS.NORM,
        "FPN, box and mask head": cfg.MODEL.FPN.NORM or "none",
        "WS": kind if ws and cfg.MODEL.WS.BACKBONE else "no",
        "builders": "of this package" if ws else "stock detectron2",
    }


def _weights(cfg: CfgNode) -> dict[str, str]:
    resnets, divided = cfg.MODEL.RESNETS, cfg.MODEL.PIXEL_STD != [1.0, 1.0, 1.0]
    groups, width = resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP
    resnet = f"X-{resnets.DEPTH}-{groups}x{width}d" if groups > 1 else f"R-{resnets.DEPTH}"
    if cfg.MODEL.BACKBONE.NAME.startswith("build_bit_"):
        resnet = f"BiT R-{resnets.DEPTH}x{width // 64}"
    return {
        "`MODEL.WEIGHTS`": f"`{cfg.MODEL.WEIGHTS}`" if cfg.MODEL.WEIGHTS else "random",
        "ResNet": resnet,
        "input": cfg.INPUT.FORMAT + (", divided by std" if divided else ""),
        "frozen": {0: "nothing", 2: "stem, res2"}[cfg.MODEL.BACKBONE.FREEZE_AT],
    }


def _schedule(cfg: CfgNode) -> dict[str, str]:
    solver = cfg.SOLVER
    return {
        "images per GPU": str(solver.IMS_PER_BATCH // solver.REFERENCE_WORLD_SIZE),
        "per step": str(solver.IMS_PER_BATCH),
        "LR": f"{solver.BASE_LR:g}",
        "warm-up": f"{solver.WARMUP_ITERS:,}",
        "iterations": f"{solver.MAX_ITER:,}",
        "LR falls at": " and ".join(f"{step:,}" for step in solver.STEPS),
    }


def _leaves(folder: str) -> list[dict[str, str]]:
    """One row for each config, its batch sizes side by side."""
    published = {
        row["config here"]: f"{row['box AP']} / {row['mask AP']}"
        for row in _published()
        if row["config here"]
    }
    rows: dict[str, dict[str, str]] = {}
    batches: dict[str, dict[int, str]] = {}
    for file in config_names():
        match = LEAF.fullmatch(file)
        if match is None or match["folder"] != folder:
            continue
        name, cfg = match["row"], get_config(file)
        weights = cfg.MODEL.WEIGHTS
        if weights.startswith("ws://mmdet/"):
            published[name] = " / ".join(f"{ap:.1f}" for _, _, ap, _ in cfg.TEST.EXPECTED_RESULTS)
        rows[name] = {
            "config": name,
            "`MODEL.WEIGHTS`": f"`{weights}`" if weights else "random",
            "published": published.get(name, "no"),  # at 2 images per GPU
        }
        images = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.REFERENCE_WORLD_SIZE or 1)
        batches.setdefault(name, {})[images] = f"[{images}](configs/{file})"
    for name, links in batches.items():
        rows[name]["images per GPU"] = " · ".join(links[images] for images in sorted(links))
    return list(rows.values())


def main() -> None:
    ToolParser(__doc__, "example:\n  python tools/write_config_tables.py").parse_args()
    logging.disable(logging.WARNING)  # only the leaves have a VERSION
    for page in PAGES:
        text = filled(page)
        changed = text != (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(text, encoding="utf-8")
        print(f"{page}: {'written' if changed else 'unchanged'}")
    print(closing(f"made the tables of {len(PAGES)} pages", {}, "git diff shows what changed"))


if __name__ == "__main__":
    main()
