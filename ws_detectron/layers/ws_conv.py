"""`WSConv2d`: detectron2's Conv2d with standardized filters, and `standardize_together`."""

import functools
import threading
from typing import Any, NamedTuple, Optional

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn import functional as F

from .standardize import (
    Affine,
    affine_of,
    check_ws_arguments,
    in_graph_capture,
    standardize_weight,
    standardize_weights,
)

DEFAULT_WS_EPS = 1e-5
DEFAULT_WS_MODE = "official"

# Activation checkpointing counts the tensors saved in the forward and again in the recomputation,
# so both must save the same. No public function tells whether its hooks are set.
_saved_tensors_hooks: Any = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)


class WSConv2d(Conv2d):
    """`detectron2.layers.Conv2d` whose filters are standardized at every forward.

    y = activation(norm(conv2d(x, standardize_weight(weight), bias))), with x of shape
    (N, I, H, W). The optimizer updates `weight` itself, with gradients through the standardization
    (arXiv:1903.10520, section 3). Parameters have the names and shapes of the plain `Conv2d`, so
    state dicts are exchangeable; the outputs are not, because the mean and scale of a WS filter
    are arbitrary.

    With `ws_affine`, each filter gets the mean `weight_beta` and the scale `weight_gamma` after it
    was standardized (mmcv's ConvAWS2d, arXiv:2006.02334). These are buffers of shape (O, 1, 1, 1),
    1 and 0 at first. A state dict without them is one of a plain `Conv2d`: they are taken from its
    filters, so that the outputs are those of the plain conv.

    Args:
        args, kwargs: as for `detectron2.layers.Conv2d`, `norm` and `activation` included.
        ws_eps: `eps` of `standardize_weight`.
        ws_mode: `mode` of `standardize_weight`. The published GN+WS weights were trained with the
            default.
        ws_affine: whether it has the two buffers.

    Raises:
        ValueError: `ws_eps` or `ws_mode` is not allowed, or `padding_mode` is not "zeros"
            (detectron2's Conv2d accepts other modes and silently pads with zeros).
    """

    ws_eps: float
    ws_mode: str
    weight_gamma: Optional[torch.Tensor]
    weight_beta: Optional[torch.Tensor]

    def __init__(
        self,
        *args: Any,
        ws_eps: float = DEFAULT_WS_EPS,
        ws_mode: str = DEFAULT_WS_MODE,
        ws_affine: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_ws_arguments(ws_eps, ws_mode)
        if self.padding_mode != "zeros":
            raise ValueError(f"WSConv2d pads with zeros only; got padding_mode={self.padding_mode}")
        self.ws_eps = ws_eps
        self.ws_mode = ws_mode
        self.reset_affine(ws_affine)

    @torch.jit.unused
    def reset_affine(self, affine: bool) -> None:
        """Sets gamma 1 and beta 0, with which the conv is one without; False removes them."""
        ones = self.weight.detach().new_ones(self.out_channels, 1, 1, 1)
        self.set_affine((ones, torch.zeros_like(ones)) if affine else None)

    @torch.jit.unused
    def set_affine(self, affine: Optional[Affine]) -> None:
        """Sets gamma and beta, each (O, 1, 1, 1); with None the conv has none."""
        gamma, beta = affine or (None, None)
        self.register_buffer("weight_gamma", gamma)
        self.register_buffer("weight_beta", beta)

    def affine(self) -> Optional[Affine]:
        """gamma and beta; None without `ws_affine`."""
        gamma, beta = self.weight_gamma, self.weight_beta
        if gamma is None or beta is None:
            return None
        return gamma, beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolves, normalizes and activates.

        Args:
            x: (N, I, H, W); N may be 0, as in ROI heads without detections.

        Returns:
            (N, O, H', W').
        """
        if torch.jit.is_scripting():
            weight = standardize_weight(self.weight, self.ws_eps, self.ws_mode, self.affine())
        else:
            weight = self.standardized_weight()
        x = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    @torch.jit.unused
    def standardized_weight(self) -> torch.Tensor:
        """`standardize_weight(self.weight, ...)`, (O, I/g, kh, kw); must not be modified."""
        weight = self.weight  # read once: a parametrization computes it at each access
        affine = self.affine()
        standardized = self._from_part(weight, affine)
        if standardized is None:
            standardized = standardize_weight(weight, self.ws_eps, self.ws_mode, affine)
        return standardized

    @torch.jit.unused
    def _from_part(self, weight: torch.Tensor, affine: Optional[Affine]) -> Optional[torch.Tensor]:
        """The filters that an enclosing part has standardized, or None if none are valid."""
        if in_graph_capture() or not _running.calls or _saved_tensors_hooks(True) is not None:
            return None
        for call in _running.calls:
            found = call.filters().get(_key(self, weight, affine))
            if found is not None and found.state == _state(weight, affine):
                standardized = found.standardized
                if standardized.requires_grad or not (
                    weight.requires_grad and torch.is_grad_enabled()
                ):
                    return standardized
        return None

    def extra_repr(self) -> str:
        settings = f", ws_eps={self.ws_eps}, ws_mode={self.ws_mode}"
        return super().extra_repr() + settings + ", ws_affine=True" * (self.affine() is not None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        names = [f"{prefix}weight_gamma", f"{prefix}weight_beta"]
        if (
            self.affine() is not None
            and weight is not None
            and weight.shape == self.weight.shape
            and not any(name in state_dict for name in names)
        ):
            affine = affine_of(weight.to(self.weight.dtype), self.ws_eps, self.ws_mode)
            state_dict.update(zip(names, affine))  # a copy, made by load_state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)


def standardize_together(part: nn.Module) -> nn.Module:
    """Standardizes all WS convs of a module at once, each time that the module is called.

    The first WS conv in a call of `part` standardizes the filters of all of them. On CUDA this
    takes a few kernel launches instead of two per conv, and launches are what limits a detector at
    one image per GPU. A conv that is called several times in one call of `part`, as in a head that
    the levels of an FPN share, standardizes once. Results and gradients are the same as without
    this function. Nothing is kept after the call.

    A conv still standardizes by itself if

    - it is called outside its part, or its weight, buffers, `ws_eps` or `ws_mode` changed during
      the call;
    - it has forward pre-hooks, which may change the weight through `.data`;
    - saved-tensor hooks are set, as by activation checkpointing;
    - its weight is computed (parametrized, sharded, or of a replica), or has gradient hooks, which
      would be called with None when the conv is not used.

    Do not use it where code writes to the `.data` of a weight *during* a call, which autograd
    cannot detect either.

    Args:
        part: is called as a whole, such as a backbone, a head or a model. Its class is replaced by
            a subclass of the same name, as in `torch.distributed.fsdp.fully_shard`; TorchScript
            would try to compile hooks.

    Returns:
        `part` itself.
    """
    if not isinstance(part, (_Part, WSConv2d)):
        part.__class__ = _part_class(type(part))  # type: ignore[assignment, arg-type]
    return part


def standardize_alone(part: nn.Module) -> nn.Module:
    """Undoes `standardize_together`."""
    # Not if its class has been replaced again since.
    if isinstance(part, _Part) and "plain_class" in vars(type(part)):
        part.__class__ = part.plain_class  # type: ignore[assignment]
    return part


class _Standardized(NamedTuple):
    tensors: tuple[torch.Tensor, Optional[Affine]]  # keeps them alive: their ids are in the key
    state: tuple
    standardized: torch.Tensor


class _Call:
    """A running call of a part."""

    def __init__(self, part: nn.Module) -> None:
        self._part, self._grad = part, torch.is_grad_enabled()
        self._filters: Optional[dict[tuple, _Standardized]] = None

    def filters(self) -> dict[tuple, _Standardized]:
        """The standardized filters of the part, by `_key`.

        Computed on first use, because a compiled forward never uses them.
        """
        if self._filters is None:
            with torch.set_grad_enabled(self._grad):
                self._filters = self._standardize()
        return self._filters

    def _standardize(self) -> dict[tuple, _Standardized]:
        by_settings: dict[tuple[float, str, bool], dict[tuple, Any]] = {}
        for conv in self._part.modules():
            if isinstance(conv, WSConv2d) and _can_share(conv):
                tensors = conv.weight, conv.affine()
                settings = conv.ws_eps, conv.ws_mode, tensors[1] is not None
                by_settings.setdefault(settings, {})[_key(conv, *tensors)] = tensors
        filters = {}
        for (eps, mode, has_affine), convs in by_settings.items():
            weights, affines = zip(*convs.values())
            results = standardize_weights(weights, eps, mode, affines if has_affine else ())
            for (key, tensors), standardized in zip(convs.items(), results):
                filters[key] = _Standardized(tensors, _state(*tensors), standardized)
        return filters


class _Running(threading.local):
    """The running calls of parts in this thread, outermost first."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_running = _Running()


class _Part(nn.Module):
    plain_class: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if in_graph_capture():
            return super().__call__(*args, **kwargs)
        _running.calls.append(_Call(self))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _running.calls.pop()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles as the plain class, which pickle can find by its name."""
        state = super().__reduce_ex__(max(protocol, 2))[2:]
        return _new_part, (self.plain_class,), *state


@functools.cache
def _part_class(plain: type[nn.Module]) -> type[nn.Module]:
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    names["__annotations__"] = getattr(plain, "__annotations__", {})  # TorchScript reads them
    return type(plain.__name__, (_Part, plain), {**names, "plain_class": plain})


def _new_part(plain: type[nn.Module]) -> nn.Module:
    return standardize_together(plain.__new__(plain))


def _can_share(conv: WSConv2d) -> bool:
    """Whether its part may standardize for it; see `standardize_together`."""
    if hasattr(type(conv), "weight"):  # a property that computes the weight
        return False
    weight = conv.weight
    return (
        type(weight) is nn.Parameter
        and weight.dim() == 4
        # inference tensors have no version
        and not any(tensor.is_inference() for tensor in (weight, *(conv.affine() or ())))
        and not weight._backward_hooks
        and not conv._forward_pre_hooks
    )


def _key(conv: WSConv2d, weight: torch.Tensor, affine: Optional[Affine]) -> tuple:
    """What the filters depend on, but for the values of tensors."""
    return (id(weight), *map(id, affine or ()), conv.ws_eps, conv.ws_mode)


def _state(weight: torch.Tensor, affine: Optional[Affine]) -> tuple:
    """Changes whenever filters standardized earlier become invalid."""
    stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
    return stream, *((t._version, t.data_ptr()) for t in (weight, *(affine or ())))
