"""The code of README and docs/own_project.md runs as it stands, and what pages name exists."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Union

import pytest

from ws_detectron import model_zoo
from ws_detectron.lab.scenes import builtin_scenes, ensure_scenes
from ws_detectron.modeling import REGISTRATIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md")]
}
TOUR = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
texts = ("".join(cell["source"]) for cell in TOUR["cells"] if cell["cell_type"] == "markdown")
PAGES["docs/tour.ipynb"] = "\n\n".join(texts)
README, OWN_PROJECT = PAGES["README.md"], PAGES["docs/own_project.md"]

MY_CONFIG = """
_BASE_: "{base}"
MODEL:
  BACKBONE: {{NAME: build_resnet_fpn_backbone}}
  ROI_BOX_HEAD: {{NAME: FastRCNNConvFCHead, NUM_CONV: 0}}
  ROI_MASK_HEAD: {{NAME: MaskRCNNConvUpsampleHead}}
DATASETS: {{TEST: []}}
TEST: {{EXPECTED_RESULTS: []}}
SOLVER: {{IMS_PER_BATCH: 1, REFERENCE_IMS_PER_BATCH: 0, STEPS: [], CHECKPOINT_PERIOD: 1000000}}
DATALOADER: {{NUM_WORKERS: 0}}
OUTPUT_DIR: "./output"
"""
REPORT = """
model = trainer.model
ws = sum(isinstance(m, ws_detectron.WSConv2d) for m in model.modules())
"""
RESULTS = """
print("WS convs:", ws, "then", len(report.converted))
print("folded:", not any(isinstance(m, ws_detectron.WSConv2d) for m in model.modules()))
"""


SCORES = "print('scores:', *(f'{s:.3f}' for s in instances.scores.tolist()))"
BATCH_SCORES = """
for i, output in enumerate(outputs):
    print(f"scores {i}:", *(f"{s:.3f}" for s in output["instances"].scores.tolist()))
"""


def run(script: Union[str, list[str]], folder: Path) -> str:
    command = ["-c", script] if isinstance(script, str) else script
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores_in(printed: str, image: object = "") -> str:
    (found,) = re.findall(rf"^scores ?{image}: (.*)$", printed, re.MULTILINE)
    return found


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_from_training_to_inference_in_an_own_project(tmp_path: Path) -> None:
    """All blocks, run in a folder that is not this one's, on one image for one epoch."""
    scenes = ensure_scenes(builtin_scenes()["scenes_shapes_128_val"])
    content = json.loads((scenes / "annotations.json").read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "train").symlink_to(scenes / "images")
    for name in ("photo.jpg", "photo2.jpg"):
        (tmp_path / name).symlink_to(scenes / "images" / content["images"][0]["file_name"])
    base = model_zoo.get_config_file("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml")
    (tmp_path / "my_config.yaml").write_text(MY_CONFIG.format(base=base))

    (both,) = blocks(README)
    training, inference = both.split("# inference\n")
    batch, folded, conversion = blocks(OWN_PROJECT)
    training = training.replace("/data/", f"{tmp_path}/").replace("6, 100", "6, 1")
    scores = "cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01\ninstances ="  # after one iteration
    inference, folded = (text.replace("instances =", scores) for text in (inference, folded))
    script = [training, REPORT, conversion, RESULTS, inference, SCORES, batch, BATCH_SCORES]
    printed = run("\n".join(script), tmp_path)
    # 20 in R-18, 8 in the FPN, 4 and 2 in the heads
    assert "WS convs: 34 then 34" in printed and "folded: True" in printed
    assert (tmp_path / "output" / "log.txt").is_file()
    for image in (0, 1):
        assert scores_in(printed, image) == scores_in(printed) != ""
    tool = [str(ROOT / "tools" / "fold_checkpoint.py"), "--config-file", "output/config.yaml"]
    run(tool + ["--output", "folded.pth", "MODEL.WEIGHTS", "output/model_final.pth"], tmp_path)
    alone = "import sys; sys.modules['ws_detectron'] = None"
    assert scores_in(run("\n".join([alone, folded, SCORES]), tmp_path)) == scores_in(printed)


def test_table_of_names_is_the_table_of_registrations() -> None:
    row = r"^\| `(\w+)` \| (`\w+`|none) \| `(MODEL[.\w]+)` \|$"
    listed = re.findall(row, OWN_PROJECT, re.MULTILINE)
    rows = [(row.name, f"`{row.stock}`" if row.stock else "none", row.key) for row in REGISTRATIONS]
    assert listed == rows


def test_table_of_keys_has_every_switch() -> None:
    (row,) = re.findall(r"^\| (`MODEL\.WS\.BACKBONE`.*?) \|", OWN_PROJECT, re.MULTILINE)
    switches = [key.rpartition(".")[2] for key in re.findall("`([.A-Z_]+)`", row)]
    assert switches == list(dict.fromkeys(name for row in REGISTRATIONS for name in row.norms))


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, fragment = link.partition("#")
        if path.startswith("http"):
            continue
        target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        found = target.exists()
        if found and fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            found = fragment in map(anchor, headings)
        if not found:
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    if page in ("CHANGELOG.md", "docs/performance.md"):
        pytest.skip("names commands of earlier versions")
    named = set(re.findall(r"(?<!/)\b((?:tools|configs)/[\w./-]+\w)", PAGES[page]))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_overrides_end_the_commands(page: str) -> None:
    """An option behind them would be taken for one of them."""
    commands = re.findall(r"^ {4}(?:python|torchrun) .*", PAGES[page].replace("\\\n", ""), re.M)
    wrong = [c for c in commands if re.search(r" [A-Z_]+(\.[A-Z_]+)+ .* --|OUTPUT_DIR \S+ +--", c)]
    assert wrong == []


@pytest.mark.parametrize("target", re.findall(r"^    make (\w+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_readme_can_be_read() -> None:
    """About 150 lines: what is longer has a page of its own."""
    assert len(README.splitlines()) <= 170
