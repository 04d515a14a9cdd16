"""Summaries of models, against sums by hand."""

from typing import Any

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from ws_detectron.layers import WSConv2d
from ws_detectron.modeling.summary import (
    PartSummary,
    feature_stability,
    frozen_parts,
    summarize,
    summary_line,
)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # 3*8*9 = 216 weights and 2*8 of the norm
        self.bottom_up = WSConv2d(3, 8, 3, padding=1, bias=False, norm=nn.GroupNorm(2, 8))
        self.fpn = Conv2d(8, 4, 1)  # 32 weights and 4 biases

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fpn(self.bottom_up(x))


class RoIHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.box_head = nn.Linear(16, 5)  # 80 weights and 5 biases
        self.test_score_thresh = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        boxes = self.box_head(x[:, :, :2, :2].flatten(1))
        # the score of a detection would be 0.05
        return boxes if self.test_score_thresh < 0.05 else boxes[:0]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.roi_heads = RoIHeads()
        self.mask = nn.ConvTranspose2d(1, 1, 2)  # 4 weights and a bias

    def forward(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        boxes = self.roi_heads(self.backbone(inputs[0]["image"][None]))
        return self.mask(boxes[:, None, :, None])


def test_parts_count_as_by_hand() -> None:
    model = Detector().train()
    model.backbone.bottom_up.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # 6 x 10 pixels; a linear layer of 16 inputs and 5 outputs; 5 x 1 becomes 6 x 2, of 4 weights
    # at each of 5 inputs
    expected = [
        PartSummary("backbone.bottom_up", 232, 232, 1, 1, 216 * 60, 8 * 60),
        PartSummary("backbone, rest", 36, 0, 1, 0, 32 * 60, 4 * 60),
        PartSummary("roi_heads.box_head", 85, 0, 0, 0, 80, 5),
        PartSummary("mask", 5, 0, 1, 0, 4 * 5, 12),
        PartSummary("model", 358, 232, 3, 1, 248 * 60 + 80 + 20, 12 * 60 + 17),
    ]
    found = summarize(model, 6, 10)
    for row in (found[0], found[-1]):  # fvcore counts a norm layer, too: 5 operations per value
        row.flops -= 5 * 480
    assert found == expected
    assert model.training and isinstance(model.backbone.bottom_up, WSConv2d)
    assert model.roi_heads.test_score_thresh == 0.5
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_line_of_a_log() -> None:
    model = Detector()
    assert (
        summary_line(model) == "0.00 M parameters, 1 WS convs (official, eps 1e-05), frozen: none"
    )
    model.backbone.requires_grad_(False)
    model.wide = Conv2d(1200, 1000, 1, bias=False)
    assert summary_line(model).startswith("1.20 M parameters, 1 WS convs")
    assert summary_line(model).endswith("frozen: backbone")
    assert summary_line(nn.ReLU()) == "0.00 M parameters, 0 WS convs, frozen: none"


@pytest.mark.parametrize(
    ("frozen", "named"),
    [
        ([], []),
        (["backbone.fpn.bias"], ["backbone.fpn.bias"]),
        (["backbone.bottom_up", "mask"], ["backbone.bottom_up", "mask"]),
        (["backbone.bottom_up", "backbone.fpn"], ["backbone"]),
        (["backbone", "roi_heads", "mask"], ["all"]),
    ],
)
def test_frozen_parts_are_named_once(frozen: list[str], named: list[str]) -> None:
    model = Detector()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    assert frozen_parts(model) == named


def test_stability_is_the_correlation_with_noise() -> None:
    class Stages(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            half = torch.cat((3 * x + 7, torch.zeros_like(x)), 1)  # one part is constant
            return {"same": half, "sign": (x > 100).float() - x}

    images = 5 + 2 * torch.randn(2, 3, 64, 64)
    found = feature_stability(Stages(), images, noise=0.75)
    # x and x + 0.75 n have the correlation 1 / sqrt(1 + 0.75 ** 2)
    assert found == pytest.approx({"same": 0.8, "sign": 0.8}, abs=0.02)
    assert feature_stability(Stages(), images, noise=0.0) == pytest.approx({"same": 1, "sign": 1})
