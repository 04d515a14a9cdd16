"""Standardized filters that are computed no more often than they change.

Two cases, both of which give exactly what `standardize_weight` would:

- Filters that get no gradient (frozen stages, and a model in evaluation) are standardized once and
  kept by their conv: `FilterCache`.
- Within one forward of a model, a conv that is called several times (a head shared by the FPN
  levels) standardizes once, if the model was given to `standardize_once_per_forward`.
"""

import threading
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# Copy-on-write clones, and a look at an address that does not count as a write. torch 2.1 lacks
# some of these; nothing is kept there.
_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
_data_address: Any = getattr(torch._C, "_data_address", None)
_is_cow_tensor: Any = getattr(torch._C, "_is_cow_tensor", None)
_saved_tensors_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

_forwards = threading.local()


class FilterCache:
    """The standardized filters of one conv, kept as long as its weight is not written to.

    A weight can be written to without any trace in autograd's version counter: by `.data`, or by
    a numpy view. So the cache holds a copy-on-write clone of the weight, which costs no memory.
    Weight and clone share their memory until somebody writes to the weight, by whatever way; torch
    then moves the written one to memory of its own, and the two addresses differ.

    Only a numpy view of the weight that was taken before the filters were cached writes past this.

    Never copied and never saved: a copy of a conv starts with an empty cache.
    """

    def __init__(self) -> None:
        # One tuple, replaced as a whole: replicas of nn.DataParallel share it between threads.
        self._entry: Optional[tuple[torch.Tensor, torch.Tensor, object]] = None

    def __deepcopy__(self, memo: dict) -> "FilterCache":
        return FilterCache()

    def __reduce__(self) -> tuple[type, tuple]:
        return FilterCache, ()

    def get(self, weight: torch.Tensor, settings: object) -> Optional[torch.Tensor]:
        """What `keep` got for the same weight, unchanged since, and the same settings.

        Args:
            weight: (O, I/g, kh, kw).
            settings: whatever else decides the result; compared by value.
        """
        entry = self._entry
        if entry is None:
            return None
        standardized, clone, kept_settings = entry
        unchanged = (
            kept_settings == settings
            and weight.dtype == clone.dtype
            and weight.device == clone.device
            and weight.shape == clone.shape
            and weight.stride() == clone.stride()
            and _is_cow_tensor(weight)
            and address(weight) == address(clone)
        )
        if not unchanged:
            self._entry = None
            return None
        return standardized

    def keep(self, weight: torch.Tensor, settings: object, standardized: torch.Tensor) -> None:
        """Keeps a result for `get`, unless torch cannot watch this weight's memory.

        That is so for memory that is not torch's own (numpy arrays, shared memory, tensors as
        `torch.load` returns them), for views of a larger memory, for tensor subclasses, and for
        torch 2.1.
        """
        if None in (_lazy_clone, _data_address, _is_cow_tensor) or not _can_be_watched(weight):
            return
        # A clone made in inference mode could not meet autograd later.
        with torch.inference_mode(False), torch.no_grad():
            try:
                clone = _lazy_clone(weight)
            except RuntimeError:
                return
        self._entry = standardized, clone, settings

    def clear(self) -> None:
        self._entry = None


def standardize_once_per_forward(model: nn.Module) -> list[RemovableHandle]:
    """Lets every WS conv of `model` standardize once in each forward of `model`.

    It matters for convs that are called several times in one forward, such as those of a head that
    is shared by the levels of an FPN. Their gradients are summed before they go through the
    standardization, which is linear in them, so they stay the same but for rounding.

    A "forward" is one call of `model`, so several forwards before a backward (gradient
    accumulation) standardize once each. Parts under activation checkpointing standardize at every
    call, because they are run again in the backward.

    Args:
        model: what the training loop calls; DistributedDataParallel may be put around it.

    Returns:
        The handles of the two hooks that this adds to `model`; their `remove()` undoes it.
    """
    return [
        model.register_forward_pre_hook(_begin_forward),
        model.register_forward_hook(_end_forward, always_call=True),
    ]


def shared_filters() -> Optional[dict[Any, tuple[torch.Tensor, torch.Tensor]]]:
    """Weights and their filters standardized so far in the forward under way; None outside one."""
    under_way = getattr(_forwards, "stack", None)
    return under_way[-1] if under_way else None


def records_saved_tensors() -> bool:
    """Whether, as in activation checkpointing, somebody counts what each part saves.

    Then no conv may save what another has standardized.
    """
    return _saved_tensors_hooks is not None and _saved_tensors_hooks(True) is not None


def _begin_forward(module: nn.Module, inputs: Any) -> None:
    if not hasattr(_forwards, "stack"):
        _forwards.stack = []
    _forwards.stack.append({})


def _end_forward(module: nn.Module, inputs: Any, output: Any) -> None:
    if _forwards.stack:
        _forwards.stack.pop()


def address(tensor: torch.Tensor) -> int:
    """`tensor.data_ptr()`, but to look at it does not count as a write."""
    if _data_address is None:
        return tensor.data_ptr()
    return _data_address(tensor) + tensor.storage_offset() * tensor.element_size()


def _can_be_watched(weight: torch.Tensor) -> bool:
    """An ordinary tensor, alone in memory that torch allocated.

    Where many weights are views of one memory, a write to any of them would move all of it. A
    memory without an allocator, which `torch.load` makes and which cannot be resized, would crash
    the process when a write wants to move it.
    """
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.layout != torch.strided:
        return False
    memory = weight.untyped_storage()
    return memory.resizable() and memory.nbytes() == weight.numel() * weight.element_size()
