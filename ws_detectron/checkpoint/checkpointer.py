"""`WSCheckpointer`: detectron2's checkpointer with safe reading and a check that weights fit."""

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Optional
from urllib.parse import parse_qs, urlparse

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ws_detectron.errors import WeightsError, list_some, shown
from ws_detectron.layers import standardize_weight
from ws_detectron.utils.io import atomic_write

from .fit import AFFINE_BUFFERS, check_fit, missing_weights, parts_of
from .metadata import METADATA_KEY, WeightMetadata, describe_model
from .reading import check_finite, read_weight_file, unwrap_state

# Entry of a file whose keys detectron2 matches with the model's -> who writes such files.
_AUTHORS = {"model_state": "pycls", "blobs": "Caffe2", "conv1_w": "Caffe2"}

logger = logging.getLogger(__name__)


class WSCheckpointer(DetectionCheckpointer):
    """Saves and loads checkpoints like `DetectionCheckpointer`, with six differences.

    - Reading a file never runs code in it (`read_weight_file`), also when a training is resumed.
    - Weights that do not fit the model are refused, as far as this can be known (`check_fit`).
    - Plain weights set the affine WS of a model (MODEL.WS.AFFINE) that has it.
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
            kwargs: other plain data.
        """
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
        # In distributed training, the file may exist on the first machine only.
        if path and "://" not in path and comm.get_world_size() == 1:
            if not os.path.isfile(path.split("?")[0]):
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
            name = path.read_text("utf-8", "replace").strip()
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error.strerror}") from error
        if os.path.isfile(os.path.join(self.save_dir, name)):
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
        state, others = unwrap_state(content, filename)
        author = next((author for key, author in _AUTHORS.items() if key in content), "")
        if "model" not in content:
            others = {}
            if author:
                others = {"__author__": author, "matching_heuristics": True}
                unused = "_momentum", "num_batches_tracked"
                state = {key: value for key, value in state.items() if not key.endswith(unused)}
        # detectron2 main accepts `path?matching_heuristics=True`.
        if "True" in parse_qs(urlparse(self._path).query).get("matching_heuristics", []):
            others["matching_heuristics"] = True
        return {**others, "model": state}

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
        fit = check_fit(self.model, state, metadata, author, self._fold)
        for warning in fit.warnings:
            logger.warning("%s: %s", self._path, warning)
        if fit.problems:
            problems = "\n".join(f"- {problem}" for problem in fit.problems)
            self._refuse(f"{self._path} does not fit the model:\n{problems}")
        if self._fold and fit.foldable:
            for conv, form in fit.foldable.items():
                key = f"{conv}.weight"
                gamma_beta = [state.pop(f"{conv}.{n}") for n in AFFINE_BUFFERS if form.affine]
                affine = (gamma_beta[0], gamma_beta[1]) if form.affine else None
                state[key] = standardize_weight(state[key], form.eps, form.mode, affine)
            logger.info("%s: folded the WS of %d convs", self._path, len(fit.foldable))
        if fit.filled:
            logger.info(
                "%s: plain filters give the affine WS of %d convs", self._path, len(fit.filled)
            )
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
