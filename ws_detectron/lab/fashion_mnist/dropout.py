"""Dropout with cheap random numbers, on a CPU."""

import torch
from torch import nn
from torch.nn import functional as F

from ws_detectron.layers.standardize import in_graph_capture

_VALUES = 256  # of a byte


class ByteDropout(nn.Module):
    """`nn.Dropout` that decides with one random byte for each value.

    One draw of torch's generator gives 8 bytes, while `nn.Dropout` takes a draw for each value; on
    a CPU that was 6 % of a training step of the classifier. In training y = x*b/(1 - p), b = 0 with
    probability p; in evaluation y = x. On other devices it is `nn.Dropout`.

    Args:
        p: probability of a zero, a multiple of 1/256 below 1, so that a byte meets it exactly.

    Raises:
        ValueError: `p` is not such a number.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1 or p * _VALUES != int(p * _VALUES):
            raise ValueError(f"p must be a multiple of 1/{_VALUES} in [0, 1), got {p}")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drops values of x, of any shape; the memory format stays."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or in_graph_capture():
            return F.dropout(x, self.p)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
        words.random_(-(2**63), None)  # all 64 bits
        kept = words.view(torch.uint8)[: x.numel()] >= int(self.p * _VALUES)
        scale = kept.to(x.dtype).mul_(1 / (1 - self.p))
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            n, channels, height, width = x.shape
            return x * scale.view(n, height, width, channels).permute(0, 3, 1, 2)
        return x * scale.view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"
