"""Weights of other frameworks: safe reading, conversion, and a check that they fit the model."""

from ws_detectron.errors import WeightsError

from .checkpointer import WSCheckpointer
from .convert_file import ConvertedWeights, convert_file, source_names
from .describe import describe_model
from .fit import Fit, check_fit
from .metadata import (
    METADATA_KEY,
    ConversionRecord,
    KeyEntry,
    Preprocessing,
    WeightMetadata,
    WSForm,
)
from .path_handler import (
    FOLDER_VARIABLE,
    PUBLISHED,
    PublishedWeights,
    WSPathHandler,
    register_weight_names,
)
from .reading import read_weight_file
from .sources import SOURCES, Source
from .writing import write_detectron2, write_mmdet

__all__ = [
    "ConversionRecord",
    "ConvertedWeights",
    "FOLDER_VARIABLE",
    "Fit",
    "KeyEntry",
    "METADATA_KEY",
    "PUBLISHED",
    "Preprocessing",
    "PublishedWeights",
    "SOURCES",
    "Source",
    "WSCheckpointer",
    "WSForm",
    "WSPathHandler",
    "WeightMetadata",
    "WeightsError",
    "check_fit",
    "convert_file",
    "describe_model",
    "read_weight_file",
    "register_weight_names",
    "source_names",
    "write_detectron2",
    "write_mmdet",
]
