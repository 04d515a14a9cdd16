"""Helpers shared by the command-line tools."""

import argparse
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional, TypeVar, Union

from tqdm import tqdm

from ws_detectron.errors import UserError

Item = TypeVar("Item")

# Two parts of which the second is short, such as TEST.PNG, are the name of a file.
_KEY = re.compile(
    r"OUTPUT_DIR|SEED"
    r"|(MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST)\.([A-Z_0-9]{5,}|[A-Z_0-9]+(\.[A-Z_0-9]+)+)"
)


class ToolParser(argparse.ArgumentParser):
    """The parser of a tool: its help keeps lines, and config overrides may follow any option.

    Args:
        description: of the tool; `__doc__`.
        examples: end the help.
    """

    def __init__(
        self, description: Optional[str] = None, examples: Optional[str] = None, **options: Any
    ) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        self._either: dict[str, bool] = {}  # name -> whether it is required
        super().__init__(description=description, epilog=examples, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As usual, and the help says the default where it has none."""
        default, text = options.get("default"), options.get("help")
        says = (default and default != argparse.SUPPRESS) or type(default) is int  # also 0
        if text and "default" not in text and says:
            several = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
            options["help"] = f"{text}; default: {several}".replace("%", "%%")
        return super().add_argument(*names, **options)

    def add_either(
        self, name: str, help: str, nargs: Optional[str] = None, required: bool = True
    ) -> None:
        """Adds an argument that may be given by position or by name: `FILE` or `--input FILE`.

        Args:
            name: without dashes.
            help: for both.
            nargs: "+" for a list.
            required: whether it must be given.
        """
        self._either[name] = required
        position = "*" if nargs else "?"
        self.add_argument(f"{name} by position", nargs=position, metavar=name, help=help)
        self.add_argument(f"--{name}", nargs=nargs, help="the same")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual, but the first config key ends the values of an option, like --opts."""
        arguments = [str(word) for word in (sys.argv[1:] if args is None else args)]
        first = next((n for n, word in enumerate(arguments) if _KEY.fullmatch(word)), None)
        if first is not None and "--opts" not in arguments[:first]:
            arguments.insert(first, "--opts")
        if not self._either:
            return super().parse_args(arguments, namespace)
        found = self.parse_intermixed_args(arguments, namespace)
        for name, required in self._either.items():
            placed = vars(found).pop(f"{name} by position")
            if placed and getattr(found, name):
                self.error(f"{name} is given twice, by position and as --{name}")
            setattr(found, name, placed or getattr(found, name))
            if required and not getattr(found, name):
                self.error(f"{name} is missing; --help says what it is")
        return found


def within(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """The type of an argument: a number from `least` to `most`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:  # also false for NaN
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"it is {text}; allowed: {allowed}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


class _Separator(argparse.Action):
    """An option without a value: the arguments after it are positional again."""

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


def add_overrides(
    parser: argparse.ArgumentParser,
    nargs: Optional[str] = argparse.REMAINDER,
    *,
    device: bool = True,
) -> None:
    """Adds config overrides: KEY VALUE pairs at the end of the line or after --opts, and --device.

    Args:
        parser: gets the positional argument `opts` and the options; see `overrides`.
        nargs: of the positional argument; None where the parser has it, as that of detectron2.
        device: False for a tool that chooses the device.
    """
    if nargs:
        parser.add_argument("opts", nargs=nargs, metavar="KEY VALUE", help="config overrides")
    parser.add_argument(
        "--opts",
        action=_Separator,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="starts the overrides; may be left out before a key such as MODEL.WEIGHTS",
    )
    if device:
        parser.add_argument("--device", help="cpu or cuda; the same as MODEL.DEVICE")


def overrides(args: argparse.Namespace) -> list[str]:
    """KEY VALUE pairs of a command line, with those of --device.

    Raises:
        UserError: an option is among them.
    """
    device = getattr(args, "device", None)
    given = [word for word in args.opts or [] if word != "--opts"]
    for key in given[::2]:
        if key.startswith("--"):
            raise UserError(f"{key} follows KEY VALUE pairs; they end the line")
    return [*given, *(["MODEL.DEVICE", device] if device else [])]


def training_parser(
    description: Optional[str], examples: str, output: str
) -> argparse.ArgumentParser:
    """detectron2's parser of trainings, with --overwrite, --output, --device and --opts.

    Args:
        description, examples: as for `ToolParser`.
        output: the config key of the output folder.
    """
    # not above: COCO metrics, which show progress, need no detectron2
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=examples)
    parser.description = description
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"delete metrics, checkpoints and events of the run in {output} and train again; "
        "without --overwrite or --resume, a folder that holds a run is refused",
    )
    parser.add_argument("--output", metavar="DIR", help=f"the same as {output}")
    add_overrides(parser, nargs=None)
    return parser


def progress(
    items: Iterable[Item], title: str, unit: str, total: Optional[int] = None
) -> Iterator[Item]:
    """The items, with a bar on a terminal, else with a line after 5 s and now and then.

    Args:
        items: are worked on one after the other.
        title: what is done.
        unit: of one item, such as "image".
        total: number of items; default: their length.
    """
    count = len(items) if total is None and isinstance(items, Collection) else total
    if sys.stderr.isatty():
        yield from tqdm(items, title, count, unit=unit, leave=False)
        return
    start = time.monotonic()
    due = start + 5
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now < due or done == count:
            continue
        due = now + min(60.0, now - start)  # seldom in a long log
        said = f"{title}: {done}"
        if count and count > done:
            rest = tqdm.format_interval((count - done) * (now - start) / done)
            said += f" of {count} {unit}s, {rest} left"
        else:
            said += f" {unit}s"
        print(said, file=sys.stderr, flush=True)  # noqa: T201


def closing(
    made: str,
    files: Optional[Mapping[str, object]] = None,
    *next_steps: Union[str, Sequence[object]],
) -> str:
    """The last lines of a tool.

    Args:
        made: what it made, with the main metrics.
        files: what -> path.
        next_steps: to continue with: a sentence, or a tool and its arguments, as a list of words.
    """
    files = files or {}
    width = max(map(len, files), default=0)
    lines = [made, *(f"  {what:<{width}}  {path}" for what, path in files.items())]
    for number, step in enumerate(next_steps):
        text = step if isinstance(step, str) else f"{_python()} tools/{shlex.join(map(str, step))}"
        lines += [*(["next:"] if not number else []), f"  {text}"]
    return "\n".join(lines)


def verdict(checked: Mapping[str, bool], what: str, report: object, then: str) -> int:
    """Prints the last lines of a tool that checks; returns its exit status, 1 if something fails.

    Args:
        checked: name -> whether it passes.
        what: is true of those that pass, such as "exports equal detectron2".
        report: the file that has the results.
        then: what to do if all pass.
    """
    failed = [name for name, passes in checked.items() if not passes]
    made = f"{len(checked) - len(failed)} of {len(checked)} {what}"
    step = f"see in the report what differs: {', '.join(failed)}" if failed else then
    print(closing(made, {"report": report}, step))  # noqa: T201
    return 1 if failed else 0


def _python() -> str:
    """What starts this interpreter from a shell in the current folder."""
    if shutil.which("python") == sys.executable:
        return "python"
    return min(os.path.relpath(sys.executable), sys.executable, key=len)
