import pytest
import torch

from ws_detectron.layers import ws_conv


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of filters in each joint standardization; a conv by itself fails."""
    found: list[int] = []
    together = ws_conv.standardize_weights

    def counting(weights: list[torch.Tensor], *args: object) -> list[torch.Tensor]:
        found.append(len(weights))
        return together(weights, *args)

    monkeypatch.setattr(ws_conv, "standardize_weights", counting)
    monkeypatch.setattr(ws_conv, "standardize_weight", None)  # no conv by itself
    return found
