"""Models for inference: with folded weights, or written for stock detectron2."""

import logging
from operator import attrgetter
from pathlib import Path
from typing import Union

import torch
from detectron2.config import CfgNode, get_cfg
from torch import nn

from ws_detectron.checkpoint import METADATA_KEY, WSCheckpointer, describe_model
from ws_detectron.config import WSSettings
from ws_detectron.errors import ConfigError
from ws_detectron.modeling import fold_ws, is_stock_norm, registrations_in
from ws_detectron.modeling.summary import summary_line
from ws_detectron.utils.io import atomic_write, check_folder, refuse_overwrite

from .trainer import Trainer

logger = logging.getLogger(__name__)

_STOCK_GN_GROUPS = 32


def load_model_for_inference(cfg: CfgNode, resume: bool = False) -> nn.Module:
    """The model of a config with its weights, WS folded into plain convs, in evaluation mode.

    Args:
        cfg: MODEL.WEIGHTS names the weights; a config with plain convs may name WS weights.
        resume: load the last checkpoint of OUTPUT_DIR instead, if there is one.

    Raises:
        ConfigError: MODEL.WEIGHTS is empty, or no model can be built.
        WeightsError: the weights cannot be read, do not fit the model, or lack a part of it.
    """
    model = Trainer.build_model(cfg)
    logger.info("Model: %s", summary_line(model))
    checkpointer = WSCheckpointer(model, cfg.OUTPUT_DIR, save_to_disk=False, fold=True, whole=True)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ConfigError(
            "MODEL.WEIGHTS is empty; name a checkpoint: MODEL.WEIGHTS output/model_final.pth"
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return fold_ws(model).eval()


def stock_config(cfg: CfgNode, weights: str) -> CfgNode:
    """The config with which stock detectron2 builds the folded model.

    Args:
        cfg: config of a model with WS parts.
        weights: MODEL.WEIGHTS of the result.

    Returns:
        A config with detectron2's own keys.

    Raises:
        ConfigError: GN has not the 32 groups that detectron2 fixes, a norm is not detectron2's, or
            detectron2 has no such part.
    """
    cfg = cfg.clone()
    groups = WSSettings.from_config(cfg).gn_groups
    if groups != _STOCK_GN_GROUPS:
        raise ConfigError(
            f"MODEL.WS.GN_GROUPS is {groups}; stock detectron2 builds GN with {_STOCK_GN_GROUPS} "
            "groups only, so this model needs ws_detectron"
        )
    for row in registrations_in(cfg):
        if not row.stock:
            raise ConfigError(
                f"{row.key} is {row.name}, which stock detectron2 has no counterpart of, so this "
                "model needs ws_detectron, whose tools fold its filters when they load it"
            )
        for key in row.norms.values():
            norm = attrgetter(key)(cfg)
            if not is_stock_norm(norm):
                raise ConfigError(
                    f"{key} is {norm!r}, which stock detectron2 does not build, so this model "
                    "needs ws_detectron"
                )
        cfg.merge_from_list([row.key, row.stock])
    cfg.MODEL.WEIGHTS = weights
    stock = get_cfg()
    _copy_known(cfg, stock)
    return stock


def write_folded(cfg: CfgNode, output: Union[str, Path]) -> tuple[Path, Path]:
    """Folds the weights of a config and writes them with a config for stock detectron2.

    Args:
        cfg: MODEL.WEIGHTS names a checkpoint, or `ws://` weights, of the whole model.
        output: the checkpoint to write, `*.pth`; the config gets the same name with `.yaml`. It has
            the full path of the weights, because detectron2 reads others from the current folder.

    Returns:
        The full paths of checkpoint and config.

    Raises:
        ConfigError: see `stock_config`, or `output` does not end in `.pth`.
        UserError: a file cannot be written, or would overwrite the weights.
        WeightsError: the weights cannot be read or do not fit the model.
    """
    output = Path(output).absolute()
    if output.suffix != ".pth":
        raise ConfigError(f"the output {output} must end in .pth, by which detectron2 reads it")
    config = output.with_suffix(".yaml")
    check_folder(output.parent)
    refuse_overwrite([output, config], [cfg.MODEL.WEIGHTS])
    stock = stock_config(cfg, str(output))
    model: nn.Module = load_model_for_inference(cfg)
    content = {
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
        "__author__": "ws_detectron, folded",
        METADATA_KEY: describe_model(model).as_dict(),
    }
    with atomic_write(output, "wb") as file:
        torch.save(content, file)
    with atomic_write(config) as file:
        file.write(stock.dump())
    return output, config


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    """Sets every key of `target` that `source` has too."""
    for key in source.keys() & target.keys():
        if isinstance(target[key], CfgNode):
            _copy_known(source[key], target[key])
        else:
            target[key] = source[key]
