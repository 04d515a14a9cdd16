"""Pieces of a report, written as Markdown or as one self-contained HTML page."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

from tabulate import tabulate

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
div.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8886; padding: 0.3rem 0.7rem; text-align: left; }
th { border-bottom-width: 2px; }
td { white-space: nowrap; } td.sentence { white-space: normal; min-width: 16rem; }
code { font-size: 0.9em; }
figure { margin: 1rem 0; background: white; width: fit-content; }
figure svg { max-width: 100%; height: auto; }
li.problem { color: #c0392b; }
"""

SENTENCE = 40
"""Characters beyond which a cell of a table is a text: more than any figure with its interval."""


@dataclass(frozen=True)
class Heading:
    """A heading below the title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` between backquotes, bold between double asterisks."""

    text: str


@dataclass(frozen=True)
class Problems:
    """A list that must not be overlooked."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table of texts, marked up as in `Text`."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A figure: `name`.png beside the Markdown, `svg` inside the page."""

    name: str
    caption: str
    svg: str


Block = Union[Heading, Text, Problems, Table, Picture]


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as Markdown (of GitHub's kind)."""
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as a page that needs no other file and no network."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Problems):
        return "\n".join(f"- **{item}**" for item in block.items)
    if isinstance(block, Table):
        rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
        return tabulate(rows, block.headers, tablefmt="github", disable_numparse=True)
    return f"![{block.caption}]({block.name}.png)"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_inline(block.text)}</h2>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Problems):
        items = "".join(f'<li class="problem">{_inline(item)}</li>' for item in block.items)
        return f"<ul>{items}</ul>"
    if isinstance(block, Table):
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.headers)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in block.rows)
        return f'<div class="table"><table><tr>{head}</tr>\n{rows}</table></div>'
    # the ids of one drawing must not meet those of another
    svg = block.svg[block.svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{block.name}-", svg)
    caption = html.escape(block.caption)
    return f'<figure role="img" aria-label="{caption}">{svg}</figure>'


def _cell(text: str) -> str:
    """A figure or name, kept on one line, or a text that may wrap."""
    kind = ' class="sentence"' if len(text) > SENTENCE else ""
    return f"<td{kind}>{_inline(text)}</td>"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
