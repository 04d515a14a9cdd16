"""The code of README and docs/own_project.md runs as it stands, and what pages name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ws_detectron import model_zoo
from ws_detectron.modeling import REGISTRATIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md")]
}
README, OWN_PROJECT = PAGES["README.md"], PAGES["docs/own_project.md"]

MY_CONFIG = """
_BASE_: "{base}"
MODEL:
  BACKBONE: {{NAME: build_resnet_fpn_backbone}}
  ROI_BOX_HEAD: {{NAME: FastRCNNConvFCHead}}
  ROI_MASK_HEAD: {{NAME: MaskRCNNConvUpsampleHead}}
DATASETS: {{TRAIN: ["scenes_shapes_128_val"], TEST: []}}
TEST: {{EXPECTED_RESULTS: []}}
SOLVER: {{MAX_ITER: 1, IMS_PER_BATCH: 1, REFERENCE_IMS_PER_BATCH: 0, STEPS: []}}
DATALOADER: {{NUM_WORKERS: 0}}
OUTPUT_DIR: "{output}"
"""


def test_use_in_an_own_project(tmp_path: Path) -> None:
    """Both blocks in one script of a project that is not this one, started from its own folder."""
    base = model_zoo.get_config_file("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml")
    (tmp_path / "my_config.yaml").write_text(MY_CONFIG.format(base=base, output=tmp_path / "new"))
    (training,), (conversion,) = (
        re.findall(r"```python\n(.*?)```", page, re.DOTALL) for page in (README, OWN_PROJECT)
    )
    script = tmp_path / "train.py"
    script.write_text(
        "\n".join(
            [
                "import ws_detectron.lab.scenes",
                training,
                "model = trainer.model",
                "ws = sum(isinstance(m, ws_detectron.WSConv2d) for m in model.modules())",
                conversion,
                "print('WS convs:', ws, 'then', len(report.converted))",
                "print(any(isinstance(m, ws_detectron.WSConv2d) for m in model.modules()))",
            ]
        )
    )
    result = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    # 20 in R-18 and 8 in the FPN; the heads' 4 convs are followed by GN as well
    assert "WS convs: 28 then 32" in result.stdout and result.stdout.strip().endswith("False")


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
