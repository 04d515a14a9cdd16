import argparse
import importlib.util
import os
import subprocess
import sys
from typing import Optional

import pytest
from detectron2.engine import default_argument_parser

from ws_detectron.errors import UserError
from ws_detectron.utils import command_line
from ws_detectron.utils.command_line import (
    ToolParser,
    add_overrides,
    closing,
    overrides,
    progress,
    verdict,
    within,
)

DEVICE = ["MODEL.DEVICE", "cpu"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--eval-only", "KEY", "-1", "--other", "x"],
        ["--opts", "KEY", "-1", "--other", "x"],
        ["--input", "a", "b", "--eval-only", "--opts", "KEY", "-1", "--other", "x"],
        ["--input", "a", "b", "--opts", "KEY", "-1", "--other", "x"],
    ],
)
def test_overrides_end_the_line_or_follow_opts(arguments: list[str]) -> None:
    own, detectron2s = argparse.ArgumentParser(), default_argument_parser()
    own.add_argument("--eval-only", action="store_true")
    for parser, nargs in ((own, argparse.REMAINDER), (detectron2s, None)):
        parser.add_argument("--input", nargs="+", default=[])
        add_overrides(parser, nargs)
        args = parser.parse_args(arguments)
        assert args.opts == ["KEY", "-1", "--other", "x"]
        assert args.input == (["a", "b"] if "--input" in arguments else [])
        assert args.eval_only == ("--eval-only" in arguments)


def test_no_overrides() -> None:
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    assert parser.parse_args([]).opts == parser.parse_args(["--opts"]).opts == []


def test_overrides_beside_other_positionals() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--batches", nargs="+")
    add_overrides(parser, nargs="*")
    args = parser.parse_intermixed_args(["step", "--batches", "1", "2", "--opts", "KEY", "1"])
    assert vars(args) == {
        **{"what": "step", "batches": ["1", "2"], "opts": ["KEY", "1"]},
        "device": None,
    }


@pytest.mark.parametrize(
    ("words", "inputs", "found"),
    [
        ("--input a b MODEL.WEIGHTS x", ["a", "b"], ["MODEL.WEIGHTS", "x"]),
        ("--input a --opts SEED 1 MODEL.WS.MODE m", ["a"], ["SEED", "1", "MODEL.WS.MODE", "m"]),
        ("--input TEST.PNG MODEL.PTH OUTPUT_DIR x", ["TEST.PNG", "MODEL.PTH"], ["OUTPUT_DIR", "x"]),
        ("VIS_PERIOD 1 MODEL.DEVICE cuda", [], ["VIS_PERIOD", "1", "MODEL.DEVICE", "cuda"]),
        ("--device cpu --input a SOLVER.EPOCHS 3", ["a"], ["SOLVER.EPOCHS", "3", *DEVICE]),
        ("--input a --device cpu", ["a"], DEVICE),
    ],
)
def test_a_config_key_ends_the_values_of_an_option(
    words: str, inputs: list[str], found: list[str]
) -> None:
    parser = ToolParser()
    parser.add_argument("--input", nargs="+", default=[])
    add_overrides(parser)
    args = parser.parse_args(words.split())
    assert (args.input, overrides(args)) == (inputs, found)


def test_an_option_among_overrides_is_refused() -> None:
    parser = ToolParser()
    add_overrides(parser)
    args = parser.parse_args(["SEED", "1", "--device", "cpu"])
    with pytest.raises(UserError, match="^--device follows KEY VALUE pairs"):
        overrides(args)


def parser_of(nargs: Optional[str] = None) -> ToolParser:
    parser = ToolParser()
    parser.add_either("input", "what is read", nargs)
    parser.add_either("output", "what is written", required=False)
    return parser


@pytest.mark.parametrize(
    "words", ["--input a --output b", "a --output b", "--output b a", "a b", "--output=b --input=a"]
)
def test_an_argument_by_position_or_by_name(words: str) -> None:
    assert vars(parser_of().parse_args(words.split())) == {"input": "a", "output": "b"}


@pytest.mark.parametrize("words", ["--input a b --output c", "a b --output c", "a --output c b"])
def test_a_list_by_position_or_by_name(words: str) -> None:
    assert vars(parser_of("+").parse_args(words.split())) == {"input": ["a", "b"], "output": "c"}


@pytest.mark.parametrize(
    ("words", "message"),
    [("--output a", "input is missing"), ("--input a b", "input is given twice, by position and")],
)
def test_what_is_missing_or_given_twice_is_named(words: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parser_of().parse_args(words.split())
    assert message in capsys.readouterr().err


def test_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An item takes 3 s; lines are due after 5 s and then when the time has doubled."""
    clock = [0.0]
    monkeypatch.setattr(command_line.time, "monotonic", lambda: clock[0])

    def work(items: object, **options: object) -> list[str]:
        for _ in progress(items, "frames of a.mp4", "frame", **options):
            clock[0] += 3
        return capsys.readouterr().err.splitlines()

    assert work(range(8)) == [
        "frames of a.mp4: 2 of 8 frames, 00:18 left",
        "frames of a.mp4: 4 of 8 frames, 00:12 left",
    ]
    assert len(work(range(9))) == 3 and work(range(2)) == []  # none after the last item
    assert work(iter(range(2)), total=100)[0] == "frames of a.mp4: 2 of 100 frames, 04:54 left"
    assert work(iter(range(2)), total=0) == ["frames of a.mp4: 2 frames"]
    assert work(range(1)) == []


def test_progress_is_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress([1, 2], "drawing", "file")) == [1, 2]
    assert "drawing:   0%|" in capsys.readouterr().err


def test_closing_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line.shutil, "which", lambda name: sys.executable)
    files = {"weights": "a.pth", "log": "log.txt"}
    steps = ["fold.py", "--output", "my file"], "read docs/weights.md"
    assert closing("box AP 40", files, *steps) == (
        "box AP 40\n  weights  a.pth\n  log      log.txt\n"
        "next:\n  python tools/fold.py --output 'my file'\n  read docs/weights.md"
    )
    assert closing("nothing else") == "nothing else"


def test_the_next_command_starts_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line.shutil, "which", lambda name: "/usr/bin/python")
    python = closing("", {}, ["fold.py"]).split()[1]
    assert os.path.samefile(python, sys.executable)


def test_a_check_ends_with_a_verdict_and_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict({"a": True, "b": True}, "exports are equal", "report.md", "use them") == 0
    end = "2 of 2 exports are equal\n  report  report.md\nnext:\n  use them\n"
    assert capsys.readouterr().out == end
    assert verdict({"a": True, "b": False}, "exports are equal", "report.md", "use them") == 1
    made, *_, last = capsys.readouterr().out.splitlines()
    assert made == "1 of 2 exports are equal" and last == "  see in the report what differs: b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--n 0", "--n: it is 0; allowed: 1 or more"),
        ("--n x", "--n: invalid int value: 'x'"),
        ("--share nan", "--share: it is nan; allowed: 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused(words: str, message: str, capsys) -> None:
    parser = ToolParser()
    parser.add_argument("--n", type=within(int, 1), default=3, help="number")
    parser.add_argument("--share", type=within(float, 0, 1), default=0, help="share")
    assert vars(parser.parse_args(["--n", "1", "--share", "1"])) == {"n": 1, "share": 1.0}
    with pytest.raises(SystemExit):
        parser.parse_args(words.split())
    assert message in capsys.readouterr().err
    text = parser.format_help()
    assert "number; default: 3" in text and "share; default: 0" in text


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "Qt4Agg"])
def test_a_backend_that_cannot_be_loaded_gives_way(backend: str) -> None:
    """As a notebook leaves it to the programs that it starts, or an old version of matplotlib."""
    script = (
        "import ws_detectron.evaluation.curves as curves, io, os\n"
        "figure = curves.draw_learning_curves([])\n"
        "figure.savefig(io.BytesIO(), format='png')\n"
        "print(os.environ['MPLBACKEND'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MPLBACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    usable = "inline" in backend and importlib.util.find_spec("matplotlib_inline") is not None
    assert done.stdout == (f"{backend}\n" if usable else "Agg\n")


def test_a_backend_that_works_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ws_detectron, os; print(os.environ['MPLBACKEND'])"],
        env={**os.environ, "MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "svg\n"), done.stderr
