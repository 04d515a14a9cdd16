"""Weights of other frameworks: safe reading, conversion, and a check that they fit the model."""

from ws_detectron.errors import WeightsError

from .checkpointer import WSCheckpointer
from .conversion import convert_file, describe_file, write_detectron2, write_mmdet
from .fit import check_fit
from .metadata import METADATA_KEY, Preprocessing, WeightMetadata, WSForm, describe_model
from .path_handler import FOLDER_VARIABLE, register_weight_names
from .reading import read_weight_file
from .sources import PUBLISHED, SOURCES

__all__ = [
    "FOLDER_VARIABLE",
    "METADATA_KEY",
    "PUBLISHED",
    "SOURCES",
    "Preprocessing",
    "WSCheckpointer",
    "WSForm",
    "WeightMetadata",
    "WeightsError",
    "check_fit",
    "convert_file",
    "describe_file",
    "describe_model",
    "read_weight_file",
    "register_weight_names",
    "write_detectron2",
    "write_mmdet",
]
