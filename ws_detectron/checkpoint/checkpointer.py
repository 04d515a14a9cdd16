"""`WSCheckpointer`: detectron2's checkpointer with safe reading and a check that weights fit."""

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Optional
from urllib.parse import parse_qs

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager
from torch import nn

from ws_detectron.errors import WeightsError, list_some, shown
from ws_detectron.utils.io import atomic_write

from .fit import check_fit, fold_into, missing_weights, part_keys, parts_of
from .metadata import METADATA_KEY, WeightMetadata, describe_model
from .reading import check_finite, read_weight_file, unwrap_state
from .sources import OTHER_DETECTORS, find_source, refuse_keys

logger = logging.getLogger(__name__)


class WSCheckpointer(DetectionCheckpointer):
    """Saves and loads checkpoints like `DetectionCheckpointer`, with five differences.

    - Reading a file never runs code in it (`read_weight_file`), also when a training is resumed.
    - Weights that do not fit the model are refused, as far as this can be known (`check_fit`).
    - A checkpoint to resume from must contain the whole model; with `whole`, so must every file.
    - Saved files contain metadata (WS convs, preprocessing, ...) for these checks.
    - Files in `save_dir`, including `last_checkpoint`, are written atomically: killing the process
      leaves no partial file.

    Args:
        model: may be wrapped in DistributedDataParallel.
        save_dir: folder of the checkpoints.
        save_to_disk: None saves on the main process only.
        fold: load WS weights into plain convs by folding, instead of refusing them.
        whole: refuse files that lack a parameter of the model; for inference.
        check: False logs a warning instead of refusing a file.
        checkpointables: other objects to save and load, as for `DetectionCheckpointer`.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: Optional[bool] = None,
        fold: bool = False,
        whole: bool = False,
        check: bool = True,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = _AtomicPathManager()
        self._fold = fold
        self._whole = whole
        self._check = check
        self._path = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves model and checkpointables as `<name>.pth`.

        Args:
            name: of the file, without extension.
            kwargs: other plain data; numpy scalars are converted to Python's, for safe loading.
        """
        kwargs = {key: _plain(value) for key, value in kwargs.items()}
        kwargs.setdefault(METADATA_KEY, describe_model(self.model).as_dict())
        super().save(name, **kwargs)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint.

        Args:
            path: a file or any path that detectron2's PathManager resolves, including `ws://`
                names. Nothing is loaded if it is empty.
            args, kwargs: as for `DetectionCheckpointer.load`.

        Returns:
            The other entries of the file.

        Raises:
            WeightsError: the file does not exist, cannot be read safely, or does not fit.
        """
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            # In distributed training, the file may exist on the first machine only.
            if not torch.distributed.is_available() or not torch.distributed.is_initialized():
                raise WeightsError(f"there is no weight file {path} (MODEL.WEIGHTS)")
        self._path = path
        return super().load(path, *args, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resumes from the checkpoint named in `last_checkpoint`, or loads the model in `path`.

        Raises:
            WeightsError: as for `load`; or `last_checkpoint` names no existing file.
        """
        if not resume or not self.has_checkpoint():
            return super().resume_or_load(path, resume=False)
        self._check_last_checkpoint()
        whole, self._whole = self._whole, True
        try:
            return super().resume_or_load(path, resume=True)
        finally:
            self._whole = whole

    def _check_last_checkpoint(self) -> None:
        path = Path(self.save_dir, "last_checkpoint")
        try:
            name = path.read_text("utf-8", "replace").strip() if path.is_file() else ""
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error.strerror}") from error
        if name and "\0" not in name and os.path.isfile(os.path.join(self.save_dir, name)):
            return
        found = sorted(file.name for file in Path(self.save_dir).glob("model_*.pth"))
        raise WeightsError(
            f"cannot resume: {path} "
            + (f"names {shown(name, 100)!r}, which does not exist" if name else "is empty")
            + "; write the name of a checkpoint into it ("
            + (list_some(found[::-1], 3) if found else f"{self.save_dir} has none")
            + "), or delete it to start from MODEL.WEIGHTS"
        )

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_weight_file(filename)
        if "model" in content:
            loaded = content
        elif "model_state" in content:
            state = unwrap_state({"model": content["model_state"]}, filename)[0]
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            loaded = {"model": state, "__author__": "pycls", "matching_heuristics": True}
        else:
            loaded = self._load_foreign(content, filename)
        # detectron2 main accepts `path?matching_heuristics=True`.
        url = getattr(self, "_parsed_url_during_load", None)
        if url is not None and parse_qs(url.query).get("matching_heuristics") == ["True"]:
            loaded["matching_heuristics"] = True
        state = unwrap_state({"model": loaded["model"]}, filename)[0]
        own = self.model.state_dict()
        others = [key for key in state if key not in own]
        refuse_keys(others, self._path or filename, OTHER_DETECTORS)
        loaded["model"] = state
        return loaded

    def _load_foreign(self, content: dict[str, Any], filename: str) -> dict[str, Any]:
        """Loads a file without detectron2's entry "model"."""
        if "blobs" in content or "conv1_w" in content:
            given = content.get("blobs", content)
            blobs = {
                key: value
                for key, value in (given.items() if isinstance(given, dict) else ())
                if isinstance(value, np.ndarray) and not str(key).endswith("_momentum")
            }
            return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        state, _ = unwrap_state(content, filename)
        try:
            known = find_source(state, filename)
        except WeightsError as error:
            logger.warning("%s", error)
        else:
            if known.name != "detectron2":
                raise WeightsError(
                    f"{self._path or filename} is {known.title}, of which detectron2 would load "
                    f"nothing. Convert it first: tools/convert_weights.py {filename} "
                    f"{os.path.splitext(filename)[0]}_d2.pth"
                )
        return {"model": state}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        values = checkpoint.pop(METADATA_KEY, None)
        metadata = None if values is None else WeightMetadata.from_dict(values, self._path)
        author = str(checkpoint.get("__author__", ""))
        state = checkpoint["model"]
        if checkpoint.pop("matching_heuristics", False):
            try:
                state = align_and_update_state_dicts(
                    self.model.state_dict(), state, c2_conversion=author == "Caffe2"
                )
            except (AssertionError, LookupError, TypeError, ValueError) as error:
                raise WeightsError(
                    f"{self._path}: its keys cannot be matched with the model's: {error}"
                ) from error
        checkpoint["model"] = state
        check_finite(state, self._path)
        fit = check_fit(self.model, state, metadata, author)
        for warning in fit.warnings:
            logger.warning("%s: %s", self._path, warning)
        if fit.foldable and self._fold:
            fold_into(state, fit.foldable)
            logger.info("%s: folded the WS of %d convs", self._path, len(fit.foldable))
        elif fit.foldable:
            fit.problems.append(
                f"{len(fit.foldable)} convs were trained with WS and are plain in the model "
                f"({list_some(list(fit.foldable), 3)}): use the parts with WS ({part_keys()}), or "
                "fold the weights (tools/fold_checkpoint.py, or WSCheckpointer(model, fold=True))"
            )
        if fit.problems:
            problems = "\n".join(f"- {problem}" for problem in fit.problems)
            self._refuse(f"{self._path} does not fit the model:\n{problems}")
        incompatible = super()._load_model(checkpoint)
        missing = missing_weights(self.model, incompatible) if self._whole else []
        if missing:
            self._refuse(
                f"{self._path} does not contain the whole model; the rest would be random: "
                + "; ".join(missing)
                + f". The file has {list_some(parts_of(state))}"
            )
        return incompatible

    def _refuse(self, message: str) -> None:
        if self._check:
            raise WeightsError(message)
        logger.warning("%s\nIt is loaded anyway, because check=False.", message)


class _AtomicPathManager:
    """detectron2's PathManager with atomic writes of local files."""

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> AbstractContextManager[IO[Any]]:
        if mode in ("w", "wb") and "://" not in path:
            return atomic_write(path, mode)
        return PathManager.open(path, mode, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)


def _plain(value: Any) -> Any:
    """Converts numpy scalars, such as metrics of evaluators, to Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value
