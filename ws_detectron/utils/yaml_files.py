"""Reads YAML files without running code in them, and in time bounded by their size.

detectron2's `CfgNode.merge_from_file` defaults to `allow_unsafe=True`, which runs tags such as
`!!python/object/apply:os.system`. This module reads the same files safely, including `_BASE_`.
Only configs in detectron2's own model zoo may use such tags: its `Base-RetinaNet.yaml` computes
the anchors in one.
"""

import io
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Optional, Union

import detectron2
import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ws_detectron.errors import ConfigError, UserError, shown

_MAX_DEPTH = 50
_MAX_NODES = 10_000  # added by expanding aliases
_MAX_DIGITS = 400  # of a number; enough for every finite float
_MAX_FILES = 200  # in a `_BASE_` chain
_STANDARD = "tag:yaml.org,2002:"
_PYTHON = _STANDARD + "python/"
_BASE = "_BASE_"

# The current `_BASE_` chain, and all files read so far.
_chain: ContextVar[tuple[tuple[str, ...], list[str]]] = ContextVar("_chain")


def read_yaml(path: Union[str, Path], what: str = "config file") -> Any:
    """Returns the content of a YAML file.

    Args:
        path: a local file.
        what: what to call the file in errors.

    Raises:
        UserError: the file cannot be read or is not YAML.
        ConfigError: it has a Python tag or a duplicate key, nests too deeply, or expands to many
            times its size. Both errors name the file and, if known, the line.
    """
    where = f"{what} {path}"
    return _parsed(_text(str(path), where), where)


def merge_config_file(cfg: CfgNode, path: Union[str, Path]) -> None:
    """`cfg.merge_from_file(path)`, safely.

    Raises:
        UserError, ConfigError: as `read_yaml`, for each file of the `_BASE_` chain; or the chain
            is circular.
        KeyError, ValueError, AssertionError: from detectron2, if keys or values do not fit `cfg`.
    """
    merged = _SafeCfgNode(cfg)
    merged.merge_from_file(str(path), allow_unsafe=False)
    cfg.clear()
    cfg.update(CfgNode(merged))


def load_yaml_with_base(path: Union[str, Path]) -> dict[str, Any]:
    """Like fvcore's function of this name, but safe; raises as `merge_config_file`."""
    return _SafeCfgNode.load_yaml_with_base(str(path))


def config_text(keys: Mapping[str, Any]) -> str:
    """The text of a config file with these full keys, such as MODEL.WEIGHTS, and their values."""
    content: dict[str, Any] = {}
    for key, value in keys.items():
        *parents, name = key.split(".")
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return str(yaml.safe_dump(content, sort_keys=False))


class _SafeCfgNode(CfgNode):
    """Reads each file of a `_BASE_` chain safely, unless it is in detectron2's model zoo."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        parents, read = _chain.get(((), []))
        chain = (*parents, filename)
        read.append(filename)
        if os.path.realpath(filename) in map(os.path.realpath, parents):
            raise ConfigError(f"config file {filename} is its own {_BASE}: {' -> '.join(chain)}")
        if len(read) > _MAX_FILES:
            raise ConfigError(f"config file {chain[0]} has more than {_MAX_FILES} {_BASE} files")
        token = _chain.set((chain, read))
        try:
            return super().load_yaml_with_base(filename, allow_unsafe=_is_zoo_file(filename))
        finally:
            _chain.reset(token)

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        parents, _ = _chain.get(((filename,), []))
        where = f"config file {filename}"
        if len(parents) > 1:
            where += f" ({_BASE} of {parents[-2]})"
        text = _text(filename, where)
        if not _is_zoo_file(filename):
            _check_config(_parsed(text, where), where)
        return io.StringIO(text)


def _is_zoo_file(filename: str) -> bool:
    """Whether a file is a config in the installed detectron2, after resolving links."""
    zoo = os.path.realpath(Path(detectron2.__file__).parent / "model_zoo" / "configs")
    return os.path.realpath(filename).startswith(zoo + os.sep)


def _text(path: str, where: str) -> str:
    try:
        if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{where} is a directory, device or pipe; name a YAML file")
        with PathManager.open(path, "rb") as file:
            return file.read().decode("utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {where}: {reason}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not YAML in UTF-8: {error}; save it as UTF-8") from error


def _parsed(text: str, where: str) -> Any:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # values are not built yet
        if root is not None:
            _check_node(root, where, {})
        content = yaml.safe_load(text)
        check_integers(content, where)
        return content
    except UserError:
        raise
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested more than {_MAX_DEPTH} levels deep") from error
    except Exception as error:  # PyYAML's constructors raise any type
        raise UserError(f"{where} has a value that cannot be read: {_one_line(error)}") from error


def _check_node(
    node: yaml.Node, where: str, sizes: dict[int, Optional[int]], depth: int = 1
) -> int:
    """Checks tags, duplicate keys, depth and aliases before any value is built.

    Args:
        node: may be shared by several parents, as aliases are.
        where: the file, for errors.
        sizes: id of a checked node -> its size; None while its content is checked.
        depth: of the node.

    Returns:
        The number of nodes in it, with aliases expanded.
    """
    line = f"{where}, line {node.start_mark.line + 1}"
    if id(node) in sizes:
        known = sizes[id(node)]
        if known is None:
            raise ConfigError(f"{line}: an alias refers to the value that it is part of")
        return known
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{line} is nested more than {_MAX_DEPTH} levels deep")
    _check_tag(node.tag, line)
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_unique([key for key, _ in node.value], where)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif node.style is None and len(node.value) > _MAX_DIGITS and node.value[0] in "+-.0123456789":
        # also such as 1:30:00: PyYAML parses these in quadratic time
        raise ConfigError(f"{line}: a number of {len(node.value)} characters; put text in quotes")
    size = 1 + sum(_check_node(child, where, sizes, depth + 1) for child in children)
    if size > len(sizes) + _MAX_NODES:
        raise ConfigError(
            f"{line}: aliases expand it to more than {_MAX_NODES:,} values; write them out"
        )
    sizes[id(node)] = size
    return size


def _check_unique(keys: Sequence[yaml.Node], where: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                raise ConfigError(
                    f"{where}, line {key.start_mark.line + 1}: duplicate key "
                    f"{shown(key.value, 80)}; YAML would silently use the last. Keep one"
                )
            seen.add(key.value)


def _check_tag(tag: str, where: str) -> None:
    if tag in yaml.SafeLoader.yaml_constructors or tag == _STANDARD + "merge":
        return
    if tag == _PYTHON + "tuple":
        remedy = "remove it; a list does the same"
    elif tag.startswith(_PYTHON):
        remedy = (
            "it would run or build Python, which only detectron2's own model zoo may; write out "
            "the number or the list of values"
        )
    else:
        remedy = "remove it"
    name = shown(tag.replace(_STANDARD, "!!", 1), 80)
    raise ConfigError(f"{where}: the tag {name} is not allowed: {remedy}")


def _check_config(content: Any, where: str) -> None:
    """Checks for a mapping with string keys, in which `_BASE_` is one or several file names."""
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{where} is {found}; allowed: a YAML mapping of config keys to values")
    base = content.get(_BASE, [])
    names = base if isinstance(base, list) else [base]
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"{where}: {_BASE} is {shown(base, 80)}; allowed: a file, or a list of files"
        )
    _check_keys(content, where)


def _check_keys(content: dict, where: str) -> None:
    for key, value in content.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"{where}: the key {shown(key, 80)} is not a string; put it in quotes"
            )
        if isinstance(value, dict):
            _check_keys(value, where)


def check_integers(value: Any, where: str, key: str = "") -> None:
    """Refuses integers of more than 64 bits, which would fail where they are first used.

    Args:
        value: from a YAML file.
        where: the file, for the error.
        key: of the value, with dots.

    Raises:
        ConfigError: an integer is larger; names its key.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            check_integers(item, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_integers(item, where, key)
    elif isinstance(value, int) and abs(value) > sys.maxsize:
        raise ConfigError(f"{where}: {key} is an integer of {value.bit_length()} bits; allowed: 64")


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__, 300)
