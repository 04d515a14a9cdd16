"""The config keys that this package adds to detectron2's."""

from detectron2.config import CfgNode

from ws_detectron.modeling.settings import WSSettings


def add_ws_config(cfg: CfgNode) -> None:
    """Adds the node `MODEL.WS` and three keys of training to a detectron2 config, in place.

    =======================  ==========  =======================================================
    key                      default     why one would change it
    =======================  ==========  =======================================================
    MODEL.WS.BACKBONE        True        to see what WS does in one part alone
    MODEL.WS.FPN             True
    MODEL.WS.BOX_HEAD        True
    MODEL.WS.MASK_HEAD       True
    MODEL.WS.RETINANET_HEAD  True
    MODEL.WS.SEM_SEG_HEAD    True
    MODEL.WS.MODE            "official"  weights from BiT or timm need "bit"; "paper" is the text
                                         of the paper (see `standardize_weight`)
    MODEL.WS.EPS             1e-5        timm: 1e-6 (its BiT models 1e-8)
    MODEL.WS.GN_GROUPS       32          channel counts that 32 does not divide
    =======================  ==========  =======================================================

    which act in the parts of `ws_detectron.modeling.REGISTRATIONS`, and nowhere else;
    and three keys of training, which `ws_detectron.engine` reads:

    ==============================  =======  ==================================================
    SOLVER.ACCUMULATE_STEPS         1        a batch does not fit into memory: it is computed in
                                             so many parts, and the optimizer steps once
                                             (`ws_detectron.engine.accumulation`)
    SOLVER.REFERENCE_IMS_PER_BATCH  0 (off)  the batch that LR and schedule are meant for: with
                                             another IMS_PER_BATCH they are scaled
                                             (`ws_detectron.engine.scaling`)
    DATASETS.REGISTER               []       data sets of one's own, in COCO format
                                             (`ws_detectron.data.register_coco_sets`)
    ==============================  =======  ==================================================

    A config that has a key keeps it as it is, so calling this twice does no harm; a node MODEL.WS
    of an earlier version gets the keys that it lacks.

    Args:
        cfg: what `detectron2.config.get_cfg()` returned.
    """
    if "WS" not in cfg.MODEL:
        cfg.MODEL.WS = CfgNode()
    for node, defaults in (
        (cfg.MODEL.WS, WSSettings().as_config()),
        (cfg.SOLVER, {"ACCUMULATE_STEPS": 1, "REFERENCE_IMS_PER_BATCH": 0}),
        (cfg.DATASETS, {"REGISTER": []}),
    ):
        for key, default in defaults.items():
            node.setdefault(key, default)
