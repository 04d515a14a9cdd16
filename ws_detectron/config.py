"""The config keys that this package adds to detectron2's."""

from detectron2.config import CfgNode

from ws_detectron.modeling.settings import WSSettings


def add_ws_config(cfg: CfgNode) -> None:
    """Adds the node `MODEL.WS` and three training keys to a detectron2 config, in place.

    =======================  ==========  =======================================================
    key                      default     reason to change it
    =======================  ==========  =======================================================
    MODEL.WS.BACKBONE        True        False turns WS off in one part
    MODEL.WS.FPN             True
    MODEL.WS.BOX_HEAD        True
    MODEL.WS.MASK_HEAD       True
    MODEL.WS.RETINANET_HEAD  True
    MODEL.WS.SEM_SEG_HEAD    True
    MODEL.WS.MODE            "official"  weights from BiT or timm need "bit"; "paper" is the
                                         formula of the paper (see `standardize_weight`)
    MODEL.WS.EPS             1e-5        timm: 1e-6 (its BiT models 1e-8)
    MODEL.WS.GN_GROUPS       32          channel counts that 32 does not divide
    =======================  ==========  =======================================================

    These keys affect only the parts in `ws_detectron.modeling.REGISTRATIONS`. The training keys
    are read by `ws_detectron.engine` and `ws_detectron.data`:

    ==============================  =======  ==================================================
    SOLVER.ACCUMULATE_STEPS         1        forward and backward passes per optimizer step, for
                                             batches that do not fit into memory
                                             (`ws_detectron.engine.accumulation`)
    SOLVER.REFERENCE_IMS_PER_BATCH  0 (off)  batch size that LR and schedule are given for; they
                                             are scaled to IMS_PER_BATCH
                                             (`ws_detectron.engine.scaling`)
    DATASETS.REGISTER               []       your own data sets in COCO format
                                             (`ws_detectron.data.register_coco_sets`)
    ==============================  =======  ==================================================

    Existing keys keep their values and missing ones are added, so this may be called twice.

    Args:
        cfg: as returned by `detectron2.config.get_cfg()`.
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
