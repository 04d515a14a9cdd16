"""How figures look: one name, colour and marker per normalization; legends, titles, files."""

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ws_detectron.errors import shown
from ws_detectron.modeling import REGISTRATIONS
from ws_detectron.utils.io import atomic_write


class NormStyle(NamedTuple):
    """How a normalization looks in every figure."""

    name: str
    colour: str
    marker: str


# Each colour has a contrast of 3:1 or more on white and on the dark background of pages. Markers
# differ as well, for colour-blind people and for prints in black and white.
NORM_STYLES = {
    "bn": NormStyle("BN", "#7A7A7A", "o"),
    "gn": NormStyle("GN", "#D55E00", "s"),
    "bn_ws": NormStyle("BN+WS", "#C7609A", "^"),
    "gn_ws": NormStyle("GN+WS", "#2080C8", "D"),
    "ln": NormStyle("LN", "#009E73", "v"),
    "wn": NormStyle("WN", "#A6761D", "P"),
    "none": NormStyle("none", "#8E6BD0", "X"),
    "sync_bn": NormStyle("SyncBN", "#0F97A5", "p"),
    "frozen_bn": NormStyle("frozen BN", "#D1495B", "*"),
}
OTHERS = [NORM_STYLES[norm] for norm in ("gn_ws", "gn", "ln", "bn_ws", "wn", "none", "bn")]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
DARK = "#16191d"
"""Background of pages in dark mode."""
LEGEND_WIDTH = 1.7
"""Inches for a column of the legend: a line and a name like GN+WS decay."""
CHARACTERS = 13
"""Of a title per inch."""

_CONFIG_NORMS = {"BN": "bn", "GN": "gn", "LN": "ln", "SyncBN": "sync_bn", "nnSyncBN": "sync_bn"}
_CONFIG_NORMS.update({"FrozenBN": "frozen_bn", "": "none"})
_NAME = re.compile(r"((?:sync_|frozen_)?bn|gn|ln|wn|none)([_+]ws)?(?:[_ ](.+))?", re.IGNORECASE)


def split_name(name: str) -> tuple[Optional[str], str]:
    """The normalization at the start of a variant's or run's name, and the name for people.

    `gn_ws` is ("gn_ws", "GN+WS"), `gn_ws_8_groups` is ("gn_ws", "GN+WS 8 groups"), and any other
    name (None, itself).
    """
    found = _NAME.fullmatch(name)
    norm = (found[1] + ("_ws" if found[2] else "")).lower() if found else ""
    if found is None or norm not in NORM_STYLES:
        return None, name
    rest = f" {found[3].replace('_', ' ')}" if found[3] else ""
    return norm, NORM_STYLES[norm].name + rest


def display_name(name: str) -> str:
    """The name of a variant or run for people, see `split_name`."""
    return split_name(name)[1]


def norm_of_config(config: Mapping[str, Any]) -> Optional[str]:
    """The key in `NORM_STYLES` of a config's backbone; None if it has another or no norm key.

    Args:
        config: full config key -> value.
    """
    norm = _CONFIG_NORMS.get(config.get("MODEL.RESNETS.NORM", "?"))
    parts = [row.name for row in REGISTRATIONS if row.key == "MODEL.BACKBONE.NAME"]
    with_ws = config.get("MODEL.BACKBONE.NAME") in parts and config.get("MODEL.WS.BACKBONE", True)
    found = f"{norm}_ws" if with_ws else norm
    return found if found in NORM_STYLES else None


def line_styles(
    names: Sequence[str], norms: Optional[Sequence[Optional[str]]] = None
) -> list[dict[str, Any]]:
    """Arguments of matplotlib's `plot` for the lines of a figure: label, colour, marker, dashes.

    A normalization has its own colour and marker; further lines with it have other dashes and open
    markers. Names without one, and lines that all have the same, take colours that are left.

    Args:
        names: of variants or runs, in the order of the legend.
        norms: keys in `NORM_STYLES` or None; default: what the names start with.
    """
    if norms is None:
        norms = [split_name(name)[0] for name in names]
    if len(names) > 1 and len(set(norms)) == 1:
        norms = [None] * len(names)
    taken = {NORM_STYLES[norm] for norm in norms if norm}
    left = [style.colour for style in OTHERS if style not in taken]
    styles: list[dict[str, Any]] = []
    for number, (name, norm) in enumerate(zip(names, norms)):
        before = norms[:number].count(norm)
        if norm is None:
            look = {"color": left[before % len(left)], "marker": MARKERS[before % len(MARKERS)]}
        else:
            look = {"color": NORM_STYLES[norm].colour, "marker": NORM_STYLES[norm].marker}
            if before:
                look["markerfacecolor"] = matplotlib.rcParams["axes.facecolor"]
        look["linestyle"] = DASHES[before % len(DASHES)]
        label = as_label(display_name(name))
        styles.append({"label": label, "markersize": 5.5, "linewidth": 1.5, **look})
    return styles


def as_label(text: str) -> str:
    """Escapes a text for matplotlib, which would read text between dollar signs as a formula."""
    return shown(text).replace("$", r"\$")


def finish_figure(figure: Figure, panels: Iterable[Axes], title: str = "") -> None:
    """Adds a grid to each panel, one legend for all, and a title."""
    entries: dict[str, Any] = {}
    for panel in panels:
        add_grid(panel)
        lines, names = panel.get_legend_handles_labels()
        entries.update(zip(names, lines))
    if entries:
        columns = max(1, min(6, len(entries), int(figure.get_figwidth() / LEGEND_WIDTH)))
        figure.legend([*entries.values()], [*entries], loc="outside lower center", ncols=columns)
    add_title(figure, title)


def add_grid(panel: Axes, axis: Any = "both") -> None:
    """Thin lines, visible on white and on dark backgrounds."""
    panel.grid(True, axis=axis, linewidth=0.5, color="0.5", alpha=0.35)
    panel.set_axisbelow(True)


def add_title(figure: Figure, title: str) -> None:
    """A title above all panels; its lines are broken where they are longer than the figure."""
    width = max(20, int(CHARACTERS * figure.get_figwidth()))
    lines = [textwrap.fill(line, width) for line in title.splitlines()]
    if lines:
        figure.suptitle(as_label("\n".join(lines)), fontsize="medium")


def same_limits(panels: Sequence[Axes], axis: str = "y") -> None:
    """Gives all panels, whose values are compared, the same limits."""
    limits = [getattr(panel, f"get_{axis}lim")() for panel in panels]
    for panel in panels:
        getattr(panel, f"set_{axis}lim")(min(low for low, _ in limits), max(h for _, h in limits))


def write_figure(figure: Figure, path: Union[str, Path]) -> Path:
    """Writes `path`, a `.png` or `.svg`, atomically; the same data give the same bytes."""
    path, packed = Path(path), io.BytesIO()
    metadata: dict[str, Any] = {"Date" if path.suffix == ".svg" else "Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "ws_detectron", "svg.fonttype": "path"}):
        figure.savefig(packed, format=path.suffix[1:], dpi=120, metadata=metadata)
    with atomic_write(path, "wb") as file:
        file.write(packed.getvalue())
    return path


def page_svg(figure: Figure, name: str) -> str:
    """An `<svg>` element of a page, for light and dark mode.

    Black takes the colour of the page's text, and white that of its background, `--back`.

    Args:
        figure: without other colours that are too dark or too bright for one of the modes.
        name: its class; no other figure of the page has it.
    """
    packed = io.StringIO()
    nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    names: Any = {"svg.hashsalt": name, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(names):
        figure.savefig(packed, format="svg", metadata=nothing)
    text = packed.getvalue().partition("<svg ")[2]
    text = re.sub('<g id="[^"]*">', "<g>", text)  # the same in every figure
    text = re.sub(' d="[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    text = re.sub(r"\n\s*", " ", text).replace("#000000", "currentColor")
    return f'<svg class="{name}" {text.replace("#ffffff", "var(--back)")}'
