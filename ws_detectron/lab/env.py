"""`ws_detectron.env` that also registers the generated scenes, for DETECTRON2_ENV_MODULE."""

import ws_detectron.lab.scenes  # noqa: F401  (registers them)
from ws_detectron.env import setup_environment

__all__ = ["setup_environment"]
