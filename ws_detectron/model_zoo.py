"""The configs that come with this package, found by name.

They are in `configs/` of the repository, and in `ws_detectron/configs/` of a wheel: YAML files, and
LazyConfigs in `lazy/`.
"""

import difflib
from pathlib import Path
from typing import Any

import detectron2
from detectron2.config import CfgNode, LazyConfig, get_cfg

from ws_detectron.utils.yaml_files import merge_config_file

from .config import add_ws_config
from .errors import UserError

_PACKAGED = Path(__file__).resolve().parent / "configs"
_REPOSITORY = _PACKAGED.parent.parent / "configs"


def config_names(suffix: str = ".yaml") -> list[str]:
    """All config files, or with ".py" all LazyConfigs, as `get_config_file` takes them, sorted."""
    root = _root()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob(f"*{suffix}"))


def get_config_file(name: str) -> str:
    """Returns the path of a config of this package.

    Args:
        name: path below `configs/`, as in
            `"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml"`.

    Raises:
        UserError: there is no such file; the message holds the path and the nearest names.
    """
    path = _root() / name
    if not path.is_file():
        names = config_names() + config_names(".py")
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.7)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        tried = " or ".join(map(str, dict.fromkeys((Path(name).absolute(), path))))
        raise UserError(f"no config {name!r}: there is no file {tried}{hint}")
    return str(path)


def get_config(name: str) -> CfgNode:
    """Returns detectron2's default config with `MODEL.WS`, updated by a config of this package.

    Args:
        name: see `get_config_file`.

    Raises:
        UserError: there is no such file.
    """
    path = get_config_file(name)
    cfg = get_cfg()
    add_ws_config(cfg)
    merge_config_file(cfg, path)
    return cfg


def get_stock_lazy_config(name: str) -> Any:
    """A LazyConfig in the model zoo of the installed detectron2, as a DictConfig.

    `detectron2.model_zoo.get_config` does the same, but cannot be imported with setuptools 82, in
    which `pkg_resources` is missing.

    Args:
        name: such as `"common/models/mask_rcnn_fpn.py"`.
    """
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    return LazyConfig.load(str(zoo / name))


def _root() -> Path:
    return _PACKAGED if _PACKAGED.is_dir() else _REPOSITORY
