"""Finds the tensors in the contents of a weight file and checks their values."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ws_detectron.errors import WeightsError, list_some

_WRAPPERS = ("state_dict", "model", "model_state", "blobs")


@dataclass(frozen=True)
class RawState:
    """The tensors of a file.

    Attributes:
        tensors: under the keys of the file, without a common `module.` prefix.
        extras: the other entries of the file.
        wrapped: whether the tensors were in an entry `state_dict` with a `module.` prefix.
    """

    tensors: dict[str, torch.Tensor]
    extras: dict[str, Any]
    wrapped: bool


def unwrap_state(content: Mapping[str, Any], path: str) -> RawState:
    """Finds the tensors in a dict as returned by `read_weight_file`.

    Raises:
        WeightsError: there are none, or one of the values is not a tensor.
    """
    wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
    inner = content[wrapper] if wrapper else content
    extras = {key: value for key, value in content.items() if wrapper and key != wrapper}
    tensors = {}
    for key, value in inner.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise WeightsError(
                f"{path}: the entry {key!r:.100} is a {type(value).__name__}, not a tensor"
            )
        if not key.isprintable():  # detectron2 logs keys as they are
            raise WeightsError(f"{path}: a key has control characters: {key!r:.100}")
        tensors[key] = tensor.detach()
    if not tensors:
        raise WeightsError(f"{path} holds no tensors")
    parallel = all(key.startswith("module.") for key in tensors)
    if parallel:
        tensors = {key[len("module.") :]: value for key, value in tensors.items()}
    return RawState(tensors, extras, wrapper == "state_dict" and parallel)


def check_finite(state: Mapping[str, torch.Tensor], path: str) -> None:
    """Raises WeightsError if a tensor contains NaN or infinity; names the keys."""
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(_once(value)).all())
    ]
    if broken:
        raise WeightsError(f"{path} has NaN or infinite values in {list_some(broken)}")


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """A view without the repetitions of an expanded tensor, which can be huge."""
    return tensor[tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())]


def normed_convs(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the convs that have a norm layer, by detectron2's keys."""
    ending = ".norm.weight"
    names = [key[: -len(ending)] for key in state if key.endswith(ending)]
    return [
        name for name in names if f"{name}.weight" in state and state[f"{name}.weight"].dim() == 4
    ]


def is_allowed(name: str, patterns: Sequence[str]) -> bool:
    """Whether `name` matches one of the shell-style patterns that the user allowed."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
