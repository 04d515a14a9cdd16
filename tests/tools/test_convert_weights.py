"""The command line of tools/convert_weights.py."""

import hashlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from ws_detectron.checkpoint import write_mmdet
from ws_detectron.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the tool in this process and returns what it printed."""

    def run_tool(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        runpy.run_path(str(TOOL), run_name="__main__")
        return capsys.readouterr().out

    return run_tool


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def test_converts_and_reports(run: Run, resnet18: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "d2.pth", tmp_path / "report.tsv"
    printed = run(str(resnet18), str(out), "--report", str(report))
    assert "torchvision, R-18" in printed
    assert "no WS, norm BN" in printed
    assert "100 tensors mapped, 22 ignored" in printed
    config = yaml.safe_load(printed.partition("in your config:\n\n")[2].partition("\n\n")[0])
    assert config["MODEL"]["WEIGHTS"] == str(out)
    assert config["MODEL"]["RESNETS"]["DEPTH"] == 18 and config["INPUT"] == {"FORMAT": "RGB"}
    lines = report.read_text().splitlines()
    assert lines[0] == "source\ttarget\tnote"
    assert "conv1.weight\tstem.conv1.weight\t" in lines
    assert len(lines) == 1 + 122
    converted = torch.load(out, weights_only=True)
    original = torch.load(resnet18, weights_only=True)
    assert torch.equal(converted["model"]["stem.conv1.weight"], original["conv1.weight"])

    back = tmp_path / "back.pth"
    assert "100 tensors mapped, 0 ignored" in run(
        *["--to", "mmdet", "--input", str(out), "--output", str(back)]
    )
    returned = torch.load(back, weights_only=True)["state_dict"]
    assert torch.equal(returned["layer4.1.conv2.weight"], original["layer4.1.conv2.weight"])


def test_lists_the_settings_that_a_file_does_not_tell(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    conv = "backbone.bottom_up.stem.conv1"
    state = {f"{conv}.weight": torch.ones(4, 3, 7, 7), f"{conv}.norm.weight": torch.ones(4)}
    torch.save({"model": state}, path)
    printed = run(str(path), str(tmp_path / "out.pth"), "--ws")
    assert "WS in 1 convs, norm not recorded, input not recorded" in printed
    assert "  to check: INPUT.FORMAT" in printed


def test_mistakes_end_with_status_2_and_one_message(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "weights.pth"
    text.write_text("not weights")
    with pytest.raises(SystemExit) as ended:
        run(str(text), str(tmp_path / "out.pth"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {text} is neither")
    assert not (tmp_path / "out.pth").exists()


def test_ws_cannot_be_claimed_for_weights_without(
    run: Run, resnet18: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(str(resnet18), str(tmp_path / "out.pth"), "--ws")
    assert "you say the opposite" in capsys.readouterr().err


def test_inputs_are_not_written_over(
    run: Run, resnet18: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resnet18.read_bytes()
    (tmp_path / "link.pth").symlink_to(resnet18)
    out = str(tmp_path / "out.pth")
    cases = {
        "is an input": [
            [str(resnet18), str(resnet18)],
            [str(resnet18), str(tmp_path / "link.pth")],
            [str(resnet18), str(resnet18), "--to", "mmdet"],
            [str(resnet18), out, "--report", str(resnet18)],
        ],
        "is the output itself": [[str(resnet18), out, "--report", f"{tmp_path}/new/../out.pth"]],
        "is not a folder": [[str(resnet18), f"{resnet18}/out.pth"]],
    }
    for words, commands in cases.items():
        for command in commands:
            with pytest.raises(SystemExit) as ended:
                run(*command)
            errors = capsys.readouterr().err
            assert ended.value.code == 2 and words in errors and errors.count("\n") == 1
    with pytest.raises(UserError, match="is an input"):
        write_mmdet(resnet18, resnet18)
    assert resnet18.read_bytes() == before and not Path(out).exists()


def test_check_describes_and_writes_nothing(
    run: Run, resnet18: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.parent.rglob("*"))
    printed = run(str(resnet18), "--check").splitlines()
    assert printed[0] == f"{resnet18}: a torchvision ResNet"
    assert printed[1] == "whole: all 100 tensors of R-18, no NaN"
    assert printed[2].startswith("left out: 20 of BN's step counter")
    sha256 = hashlib.sha256(resnet18.read_bytes()).hexdigest()
    assert f"SHA-256 {sha256}: not one known here" in printed
    assert "needs: MODEL.RESNETS.DEPTH 18" in printed and "needs: INPUT.FORMAT RGB" in printed
    assert not any("WS" in line for line in printed)

    half = tmp_path / "half.pth"
    half.write_bytes(resnet18.read_bytes()[: resnet18.stat().st_size // 2])
    state = torch.load(resnet18, weights_only=True)
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "part.pth")
    cases = {
        "is damaged": [str(half)],
        "missing: res5.1.conv2.weight": [str(tmp_path / "part.pth")],
        "--check writes nothing": [str(resnet18), str(tmp_path / "out.pth")],
    }
    for words, command in cases.items():
        with pytest.raises(SystemExit) as ended:
            run(*command, "--check")
        assert ended.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(str(resnet18))
    assert "name the output, or pass --check" in capsys.readouterr().err
    assert sorted(tmp_path.parent.rglob("*")) == sorted([*before, half, tmp_path / "part.pth"])
