"""Warnings of settings that run but train badly, each with its remedy.

`checks` refuses what cannot run; these are warnings, because each may be intended.
"""

from operator import attrgetter

from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY

from ws_detectron.modeling import REGISTRATIONS, WSSettings

from .checks import norm_keys

# detectron2's and mmdetection's Faster and Mask R-CNN baselines; RetinaNet's LR is half of it
REFERENCE_LR, REFERENCE_BATCH = 0.02, 16
# Half or twice the LR of the linear rule is common tuning. An LR that was not scaled is off by the
# ratio of the batches, usually 4 or more.
MAX_LR_RATIO = 3.0
SMALL_BATCH = 2
SYNC_BN = ("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def find_warnings(cfg: CfgNode, world_size: int) -> list[str]:
    """One sentence for each setting of a training config that looks wrong, with its remedy.

    Args:
        cfg: scaled to the batch and to `world_size`, see `scaling`.
        world_size: processes in the job.
    """
    return [
        *_small_batch_norm(cfg, world_size),
        *_frozen_random_layers(cfg),
        *_far_off_lr(cfg),
        *_settings_without_effect(cfg),
    ]


def _small_batch_norm(cfg: CfgNode, world_size: int) -> list[str]:
    """Trainable BN over one or two images; SyncBN is BN where there is nothing to synchronize."""
    norms = ("BN", *SYNC_BN) if world_size == 1 else ("BN",)
    keys = [key for key, norm in norm_keys(cfg).items() if norm in norms]
    images = cfg.SOLVER.IMS_PER_BATCH // (world_size * cfg.SOLVER.ACCUMULATE_STEPS)
    if not keys or images > SMALL_BATCH:
        return []
    parts = cfg.SOLVER.ACCUMULATE_STEPS
    return [
        f"{', '.join(keys)}: BN computes its statistics over {images} image(s) at a time "
        f"(SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} over {world_size} process(es)"
        + (f" and {parts} parts; accumulation does not make BN's batch larger" if parts > 1 else "")
        + '), too few to train well; use "GN" with WS (configs/norms/gn_ws.yaml), "SyncBN" on '
        'several GPUs, "FrozenBN" with pretrained weights, or more images per GPU'
    ]


def _frozen_random_layers(cfg: CfgNode) -> list[str]:
    """Layers that would keep their random initialization."""
    if cfg.MODEL.WEIGHTS:
        return []
    found = []
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        found.append(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT} and MODEL.WEIGHTS is "
            "empty: the frozen stages would stay random; set MODEL.BACKBONE.FREEZE_AT 0, or name "
            "weights"
        )
    keys = [key for key, norm in norm_keys(cfg).items() if norm == "FrozenBN"]
    if keys:
        found.append(
            f'{", ".join(keys)}: "FrozenBN" without MODEL.WEIGHTS keeps mean 0 and variance 1 and '
            'normalizes nothing; use "GN" (with WS: configs/norms/gn_ws.yaml), or name weights'
        )
    return found


def _far_off_lr(cfg: CfgNode) -> list[str]:
    """An LR that was not scaled with the batch, in a config that states no reference batch."""
    solver = cfg.SOLVER
    if solver.REFERENCE_IMS_PER_BATCH or not solver.BASE_LR:  # LR 0: a dry run
        return []
    expected = REFERENCE_LR * solver.IMS_PER_BATCH / REFERENCE_BATCH
    ratio = solver.BASE_LR / expected
    if 1 / MAX_LR_RATIO <= ratio <= MAX_LR_RATIO:
        return []
    return [
        f"SOLVER.BASE_LR is {solver.BASE_LR:g}, {_times(ratio)} what the linear rule gives for "
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: {expected:g} ({REFERENCE_LR} for "
        f"{REFERENCE_BATCH} images). If the config is for another batch, set "
        "SOLVER.REFERENCE_IMS_PER_BATCH to it, and LR and schedule are scaled; if this LR is "
        f"intended, set SOLVER.REFERENCE_IMS_PER_BATCH {solver.IMS_PER_BATCH}"
    ]


def _settings_without_effect(cfg: CfgNode) -> list[str]:
    """MODEL.WS settings that no part of the model reads."""
    settings = WSSettings.from_config(cfg).as_config()
    changed = [key for key, value in WSSettings().as_config().items() if settings[key] != value]
    # custom parts may read it
    registries = {row.key: row.registry for row in REGISTRATIONS}
    registries["MODEL.ROI_HEADS.NAME"] = ROI_HEADS_REGISTRY
    names = {key: attrgetter(key)(cfg) for key in registries}
    stock = [
        name in registries[key] and registries[key].get(name).__module__.startswith("detectron2.")
        for key, name in names.items()
        if name
    ]
    if not changed or not all(stock):
        return []
    readers = ", ".join(f"{key} {name}" for key, name in names.items() if name)
    return [
        f"{', '.join(f'MODEL.WS.{key} {settings[key]}' for key in changed)}: without effect, as "
        f"detectron2's own parts do not read it ({readers}); for a backbone that does, set "
        "MODEL.BACKBONE.NAME build_ws_resnet_fpn_backbone"
    ]


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
