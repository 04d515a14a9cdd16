import argparse
import importlib.util
import os
import subprocess
import sys

import pytest

from ws_detectron.errors import UserError
from ws_detectron.utils.command_line import refuse_options_without_effect


def refuse(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--depth", type=int)
    parser.add_argument("opts", nargs="*")
    args = parser.parse_args(arguments)
    refuse_options_without_effect(parser, args, "what", ["batch_size"], f"with {args.what}")


def test_options_with_an_effect_and_defaults_pass() -> None:
    refuse("step", "--batch-size", "4")
    refuse("step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "50"], "^--depth has no effect with step; allowed are --batch-size$"),
        (["KEY", "1"], "^KEY VALUE has no effect with step"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse("step", *arguments)


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
