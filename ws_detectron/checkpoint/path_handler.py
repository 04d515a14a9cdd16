"""Lets a config name published weights: `MODEL.WEIGHTS: "ws://jhu/resnet50_gn_ws"`."""

import logging
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir

from ws_detectron.errors import WeightsError
from ws_detectron.utils.io import atomic_write

from .conversion import convert_file, sha256_of, write_detectron2
from .sources import PREFIX, PUBLISHED, PublishedWeights

FOLDER_VARIABLE = "WS_DETECTRON_WEIGHTS"
"""Environment variable with a folder of downloaded files, for machines without network."""

# Part of the names of converted files; increase it when the conversion changes.
_CONVERSION = 1
_TIMEOUT = 30.0  # seconds without any data

logger = logging.getLogger(__name__)


def register_weight_names() -> None:
    """Makes detectron2's PathManager resolve `ws://` names; may be called twice."""
    PathManager.register_handler(WSPathHandler(), allow_override=True)


class WSPathHandler(PathHandler):
    """Downloads, checks, converts and caches the weights in `PUBLISHED`.

    `ws://<name>` resolves to a file in detectron2's format in iopath's cache (`$FVCORE_CACHE`, by
    default `~/.torch/iopath_cache`). If `WS_DETECTRON_WEIGHTS` is set, published files are read
    from that folder and nothing is downloaded.
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
        weights = PUBLISHED[name]
        cache = Path(get_cache_dir()) / "ws_detectron"
        stem = weights.filename[: -len(".pth")]
        converted = cache / f"{stem}.detectron2-{_CONVERSION}.pth"
        cache.mkdir(parents=True, exist_ok=True)
        with file_lock(str(converted)):
            if force or not converted.is_file():
                original = _find(weights, cache)
                _check_hash(original, weights)
                result = convert_file(original, weights.source, ws=True)
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


def _find(weights: PublishedWeights, cache: Path) -> Path:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        local = Path(folder) / weights.filename
        if not local.is_file():
            raise WeightsError(
                f"{PREFIX}{weights.name}: {FOLDER_VARIABLE} is {folder}, which has no file "
                f"{weights.filename}; download it from {weights.url}"
            )
        return local
    downloaded = cache / weights.filename
    if not downloaded.is_file():
        _download(weights, downloaded)
    return downloaded


def _download(weights: PublishedWeights, target: Path) -> None:
    logger.info("downloading %s", weights.url)
    try:
        with urllib.request.urlopen(weights.url, timeout=_TIMEOUT) as response:
            size = response.headers.get("Content-Length")
            with atomic_write(target, "wb") as file:
                received = 0
                while chunk := response.read(1 << 20):
                    received += len(chunk)
                    file.write(chunk)
                if size is not None and received != int(size):
                    raise OSError(f"received {received} of {size} bytes")
    except (OSError, urllib.error.URLError) as error:
        raise WeightsError(
            f"{PREFIX}{weights.name} could not be downloaded from {weights.url} ({error}). "
            f"Download it elsewhere, put it into a folder as {weights.filename}, and set "
            f"{FOLDER_VARIABLE} to that folder"
        ) from None


def _check_hash(path: Path, weights: PublishedWeights) -> None:
    found = sha256_of(path)
    if not found.startswith(weights.sha256_prefix):
        raise WeightsError(
            f"{path} is not the published file: its SHA-256 starts with {found[:8]}, expected "
            f"{weights.sha256_prefix}. Delete it and download it again from {weights.url}"
        )
