"""Reads model settings from the config text in a mmdetection file.

mmdetection stores its training config as Python source. It is parsed, never run: assignments of
literals, `dict(...)` calls and previously assigned names are evaluated, and all else is unknown.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from .metadata import Preprocessing

_UNKNOWN = object()


@dataclass
class MMDetSettings:
    """What a config text says; None where it says nothing.

    Attributes:
        ws_parts: of "backbone", "neck", "bbox_head", "mask_head", those built with ConvWS.
        preprocessing: channel order, mean and std.
        stride_in_1x1: whether the backbone has style="caffe".
        gn_groups: number of groups of the backbone's GN.
        unfit: setting -> "found …, expected …" where this project's configs compute something else.
    """

    ws_parts: Optional[set[str]] = None
    preprocessing: Optional[Preprocessing] = None
    stride_in_1x1: Optional[bool] = None
    gn_groups: Optional[int] = None
    unfit: dict[str, str] = field(default_factory=dict)


def read_mmdet_settings(meta: Any) -> Optional[MMDetSettings]:
    """Reads the settings from the entry `meta` of a mmdetection file.

    Returns:
        None if there is no config, or none whose model can be read.
    """
    if not isinstance(meta, dict):
        return None
    text = meta.get("cfg", meta.get("config"))
    config = _parse(text) if isinstance(text, str) else {}
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("backbone"), dict):
        return None
    settings = MMDetSettings(preprocessing=_preprocessing(config))
    backbone = model["backbone"]
    roi_head = model.get("roi_head")
    if not isinstance(roi_head, dict):
        roi_head = model
    parts = {"backbone": backbone, "neck": model.get("neck")}
    parts.update({name: roi_head.get(name) for name in ("bbox_head", "mask_head")})
    known = {name: part for name, part in parts.items() if isinstance(part, dict)}
    if not any(part.get("conv_cfg") is _UNKNOWN for part in known.values()):
        settings.ws_parts = {
            name for name, part in known.items() if _get(part, "conv_cfg", "type") == "ConvWS"
        }
    if backbone.get("style", "pytorch") in ("pytorch", "caffe"):
        settings.stride_in_1x1 = backbone.get("style") == "caffe"
    groups = _get(backbone, "norm_cfg", "num_groups")
    settings.gn_groups = groups if isinstance(groups, int) else None
    for name, found, expected in _fixed_settings(model, roi_head):
        if found not in (None, _UNKNOWN) and found != expected:
            settings.unfit[name] = f"found {found}, expected {expected}"
    return settings


def _fixed_settings(model: dict, roi_head: dict) -> list[tuple[str, Any, Any]]:
    """(setting, its value in the config, its value in this project's configs)."""
    rpn = model.get("rpn_head")
    anchors = _get(rpn, "anchor_generator")
    box = roi_head.get("bbox_head")
    rois = [roi_head.get(f"{part}_roi_extractor") for part in ("bbox", "mask")]
    settings = [
        ("neck.num_outs", _get(model, "neck", "num_outs"), 5),
        ("neck.add_extra_convs", _get(model, "neck", "add_extra_convs"), False),
        ("anchor_generator.scales", _get(anchors, "scales"), [8]),
        ("anchor_generator.ratios", _get(anchors, "ratios"), [0.5, 1.0, 2.0]),
        ("anchor_generator.strides", _get(anchors, "strides"), [4, 8, 16, 32, 64]),
        ("rpn_head.bbox_coder.target_means", _coder(rpn, "means"), [0.0] * 4),
        ("rpn_head.bbox_coder.target_stds", _coder(rpn, "stds"), [1.0] * 4),
        ("bbox_head.bbox_coder.target_means", _coder(box, "means"), [0.0] * 4),
        ("bbox_head.bbox_coder.target_stds", _coder(box, "stds"), [0.1, 0.1, 0.2, 0.2]),
    ]
    for name, extractor in zip(("bbox", "mask"), rois):
        layer = _get(extractor, "roi_layer")
        settings += [
            (f"{name}_roi_extractor.type", _get(layer, "type"), "RoIAlign"),
            (f"{name}_roi_extractor.sampling_ratio", _get(layer, "sampling_ratio"), 0),
            (f"{name}_roi_extractor.aligned", _get(layer, "aligned"), True),
            (f"{name}_roi_extractor.finest_scale", _get(extractor, "finest_scale"), 56),
        ]
    return [
        (name, list(found) if isinstance(found, tuple) else found, expected)
        for name, found, expected in settings
    ]


def _coder(head: Any, which: str) -> Any:
    """A setting of the box coder, which mmdetection 1.x kept in the head."""
    inside = _get(head, "bbox_coder", f"target_{which}")
    return _get(head, f"target_{which}") if inside is None else inside


def _preprocessing(config: dict) -> Optional[Preprocessing]:
    given = _get(config, "model", "data_preprocessor") or config.get("img_norm_cfg")
    if not isinstance(given, dict):
        return None
    mean: Any = given.get("mean")
    std: Any = given.get("std")
    rgb = given.get("bgr_to_rgb", given.get("to_rgb", False))
    if not _is_triple(mean) or not _is_triple(std):
        return None
    channels = [tuple(float(value) for value in values) for values in (mean, std)]
    return Preprocessing("RGB" if rgb is True else "BGR", channels[0], channels[1])


def _is_triple(values: Any) -> bool:
    return (
        isinstance(values, list)
        and [isinstance(value, (int, float)) for value in values] == [True] * 3
    )


def _get(node: Any, *names: str) -> Any:
    for name in names:
        if not isinstance(node, dict):
            return None
        node = node.get(name)
    return node


def _parse(text: str) -> dict[str, Any]:
    """Evaluates the assignments in a config text."""
    values: dict[str, Any] = {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name):
                value = _evaluate(statement.value, values)
                values[target.id] = _merge(values.get(target.id), value)
    return values


def _merge(base: Any, value: Any) -> Any:
    """mmcv appends the text of a derived config to that of its base."""
    if not isinstance(base, dict) or not isinstance(value, dict) or value.get("_delete_"):
        return value
    return {**base, **{key: _merge(base.get(key), item) for key, item in value.items()}}


def _evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id, _UNKNOWN)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item, names) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            _evaluate(key, names): _evaluate(value, names)
            for key, value in zip(node.keys, node.values)
            if isinstance(key, ast.Constant)
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {item.arg: _evaluate(item.value, names) for item in node.keywords if item.arg}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _evaluate(node.operand, names)
        return -value if isinstance(value, (int, float)) else _UNKNOWN
    return _UNKNOWN
