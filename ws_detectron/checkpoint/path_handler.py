"""Lets a config name published weights: `MODEL.WEIGHTS: "ws://jhu/resnet50_gn_ws"`."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir

from ws_detectron.errors import WeightsError

from .conversion import convert_file, sha256_of, write_detectron2
from .sources import PUBLISHED

PREFIX = "ws://"
FOLDER_VARIABLE = "WS_DETECTRON_WEIGHTS"
"""Environment variable with a folder of downloaded files, for machines without network."""

STALLED = 30  # seconds without data after which a download fails
# Part of the names of converted files; increase it when the conversion changes.
_CONVERSION = 1

logger = logging.getLogger(__name__)


def register_weight_names() -> None:
    """Makes detectron2's PathManager resolve `ws://` names; may be called twice."""
    PathManager.register_handler(WSPathHandler(), allow_override=True)


class WSPathHandler(PathHandler):
    """Downloads, checks, converts and caches the weights in `PUBLISHED`.

    `ws://<name>` resolves to a file in detectron2's format in iopath's cache (`$FVCORE_CACHE`, by
    default `~/.torch/iopath_cache`). If `WS_DETECTRON_WEIGHTS` is set, published files are read
    from that folder and nothing is downloaded. A file whose hash is not known is whole if its
    format, keys and shapes are.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        name = path[len(PREFIX) :]
        if name not in PUBLISHED:
            raise WeightsError(
                f"{path} is not a known name; allowed: "
                + ", ".join(PREFIX + known for known in PUBLISHED)
            )
        cache = Path(get_cache_dir()) / "ws_detectron"
        cache.mkdir(parents=True, exist_ok=True)
        published = Path(PUBLISHED[name].file).stem
        converted = cache / f"{published}.detectron2-{_CONVERSION}.pth"
        with file_lock(str(converted)):
            if force or not converted.is_file():
                result = convert_file(_find(name, cache))
                write_detectron2(result, converted)
                logger.info("%s: %s", path, result.record.summary())
        return str(converted)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if mode not in ("r", "rb"):
            raise WeightsError(f"{path} is read only")
        return open(self._get_local_path(path), mode, buffering, **kwargs)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return path[len(PREFIX) :] in PUBLISHED

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._exists(path)


def _find(name: str, cache: Path) -> Path:
    """The published file, checked: in the folder of `WS_DETECTRON_WEIGHTS`, else downloaded."""
    url, file, digits = PUBLISHED[name]
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder or cache, file)
    if folder and not path.is_file():
        raise WeightsError(
            f"{PREFIX}{name}: {FOLDER_VARIABLE} is {folder}, which has no file {path.name}; "
            f"download it from {url} under this name"
        )
    if not path.is_file():
        logger.info("downloading %s", url)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(STALLED)
        try:
            torch.hub.download_url_to_file(url, str(path), digits or None)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise WeightsError(
                f"{PREFIX}{name} could not be downloaded from {url} ({error}). Download it "
                f"elsewhere, put it into a folder as {path.name}, and set {FOLDER_VARIABLE} to "
                "that folder"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    found = sha256_of(path)
    if not digits:
        logger.info("%s has the SHA-256 %s; ws_detectron knows no published one", path, found)
    if not found.startswith(digits):
        raise WeightsError(
            f"{path} is not the published file: its SHA-256 starts with {found[:8]}, expected "
            f"{digits[:8]}. Delete it and download it again from {url}"
        )
    return path
