"""`WSConv2d`: detectron2's Conv2d with standardized filters."""

from typing import Any

import torch
from detectron2.layers import Conv2d
from torch.nn import functional as F

from .reuse import FilterCache, records_saved_tensors, shared_filters
from .standardize import check_ws_arguments, in_graph_capture, standardize_weight

DEFAULT_WS_EPS = 1e-5
DEFAULT_WS_MODE = "official"


class WSConv2d(Conv2d):
    """`detectron2.layers.Conv2d` whose filters are standardized at every forward.

    y = activation(norm(conv2d(x, standardize_weight(weight), bias))), with x of shape
    (N, I, H, W). The optimizer, and so the gradient, works on `weight` itself, through its
    standardization (arXiv:1903.10520, section 3). Parameters have the names and shapes of the
    plain `Conv2d`, so a state dict of one loads into the other; what the other then *computes*
    differs, because the mean and the scale of a WS filter mean nothing.

    Args:
        args, kwargs: as for `detectron2.layers.Conv2d`, `norm` and `activation` included.
        ws_eps: `eps` of `standardize_weight`.
        ws_mode: `mode` of `standardize_weight`. The default is the form that the published GN+WS
            weights were trained with.

    Raises:
        ValueError: `ws_eps` or `ws_mode` is not allowed, or `padding_mode` is not "zeros"
            (detectron2's Conv2d takes other modes without a word and then pads with zeros).
    """

    ws_eps: float
    ws_mode: str

    def __init__(
        self,
        *args: Any,
        ws_eps: float = DEFAULT_WS_EPS,
        ws_mode: str = DEFAULT_WS_MODE,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_ws_arguments(ws_eps, ws_mode)
        if self.padding_mode != "zeros":
            raise ValueError(f"WSConv2d pads with zeros only; got padding_mode={self.padding_mode}")
        self.ws_eps = ws_eps
        self.ws_mode = ws_mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolves, normalizes and activates.

        Args:
            x: (N, I, H, W); N may be 0, as the ROI heads need where nothing was detected.

        Returns:
            (N, O, H', W').
        """
        if torch.jit.is_scripting():
            weight = standardize_weight(self.weight, self.ws_eps, self.ws_mode)
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
        """`standardize_weight(self.weight, ...)`, computed no more often than `weight` changes.

        Frozen filters, and those of a module in evaluation without gradients, are kept until
        somebody writes to `weight`; how that is noticed, `FilterCache` says.

        Returns:
            (O, I/g, kh, kw); not to be written to.
        """
        weight, settings = self.weight, (self.ws_eps, self.ws_mode)
        if in_graph_capture():
            return standardize_weight(weight, *settings)
        if torch.is_grad_enabled() and weight.requires_grad:
            self.__dict__.pop("_filters", None)  # frees what an evaluation kept
            if records_saved_tensors():
                return standardize_weight(weight, *settings)
            shared = shared_filters()
            if shared is None:
                return self._standardize()
            # the weight itself may be edited between two calls by nothing but the forward; it is
            # kept, as its id would be given away
            key = (id(self), id(weight), weight._version)
            if key not in shared:
                shared[key] = weight, self._standardize()
            return shared[key][1]
        if weight.requires_grad and self.training:  # about to change again
            return standardize_weight(weight, *settings)
        cache = self.__dict__.setdefault("_filters", FilterCache())
        standardized = cache.get(weight, settings)
        if standardized is None:
            with torch.inference_mode(False), torch.no_grad():
                standardized = standardize_weight(weight, *settings)
            cache.keep(weight, settings, standardized)
        return standardized

    def _standardize(self) -> torch.Tensor:
        """For training: in one launch with others, if there is a group of them and a GPU."""
        group = self.__dict__.get("_launch_group")
        standardized = None if group is None else group.take(self)
        if standardized is None:
            standardized = standardize_weight(self.weight, self.ws_eps, self.ws_mode)
        return standardized

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ws_eps={self.ws_eps}, ws_mode={self.ws_mode}"
