"""Set-up of detectron2 for its own scripts, and anybody's: they then accept our configs.

    export DETECTRON2_ENV_MODULE=ws_detectron.env

detectron2 imports the module that this variable names when it is first imported itself, and calls
`setup_environment`. `ws_detectron.lab.env` registers the generated scenes as well.
"""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ws_detectron.config import add_ws_config
from ws_detectron.data import register_coco_sets
from ws_detectron.errors import ConfigError
from ws_detectron.utils.compat import before_training, default_config
from ws_detectron.utils.yaml_files import read_yaml

logger = logging.getLogger(__name__)

DATASETS = "WS_DETECTRON_DATASETS"


def setup_environment() -> None:
    """Adds our keys to detectron2's default config, and registers our parts and your data sets.

    The environment variable WS_DETECTRON_DATASETS names a YAML file with a list as in
    DATASETS.REGISTER, or a config that has this key, such as the `config.yaml` of a run. When a
    script trains, settings that only `ws_detectron.engine.Trainer` follows are warned of.

    Raises:
        UserError: the file cannot be read.
        ConfigError: it has no such list, or an entry is not valid.
    """
    add_ws_config(default_config())
    path = os.environ.get(DATASETS)
    if path:
        content = read_yaml(path, f"{DATASETS} file")
        if isinstance(content, dict):
            content = (content.get("DATASETS") or {}).get("REGISTER")
        if not isinstance(content, list):
            raise ConfigError(
                f"{DATASETS} file {path} has no list of data sets; allowed: entries [name, "
                "annotations, images], or a config with DATASETS.REGISTER"
            )
        register_coco_sets(content)
    before_training(warn_of_ignored_settings)


def warn_of_ignored_settings(cfg: CfgNode) -> None:
    """Warns of settings that `ws_detectron.engine.Trainer` follows and other trainers ignore.

    Args:
        cfg: the config of a training; one that `prepare` returned is skipped.
    """
    from ws_detectron.engine.prepare import PREPARED  # not needed by scripts that do not train

    if PREPARED in cfg.__dict__:
        return
    solver = cfg.SOLVER
    if solver.ACCUMULATE_STEPS != 1:
        logger.warning(
            "SOLVER.ACCUMULATE_STEPS is %d, but this trainer does not accumulate gradients; "
            "tools/train_net.py of ws_detectron does",
            solver.ACCUMULATE_STEPS,
        )
    if solver.REFERENCE_IMS_PER_BATCH not in (0, solver.IMS_PER_BATCH):
        logger.warning(
            "SOLVER.REFERENCE_IMS_PER_BATCH is %d, but this trainer does not scale LR and schedule "
            "to SOLVER.IMS_PER_BATCH %d; tools/train_net.py of ws_detectron does",
            solver.REFERENCE_IMS_PER_BATCH,
            solver.IMS_PER_BATCH,
        )
    if solver.EPOCHS:
        logger.warning(
            "SOLVER.EPOCHS is %d, but this trainer counts SOLVER.MAX_ITER, %d iterations; "
            "tools/train_net.py of ws_detectron counts epochs",
            solver.EPOCHS,
            solver.MAX_ITER,
        )
    unknown = [name for name, *_ in cfg.DATASETS.REGISTER if name not in DatasetCatalog.list()]
    if unknown:
        logger.warning(
            "DATASETS.REGISTER has %s, which this script does not register; set %s to this config",
            ", ".join(unknown),
            DATASETS,
        )
