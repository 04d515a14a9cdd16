"""Builds the model for evaluation and visualization."""

from detectron2.config import CfgNode
from torch import nn

from ws_detectron.checkpoint import WSCheckpointer
from ws_detectron.errors import ConfigError
from ws_detectron.modeling import fold_ws

from .trainer import Trainer


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
    checkpointer = WSCheckpointer(model, cfg.OUTPUT_DIR, save_to_disk=False, fold=True, whole=True)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ConfigError(
            "MODEL.WEIGHTS is empty; name a checkpoint: MODEL.WEIGHTS output/model_final.pth"
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return fold_ws(model).eval()
