"""The Triton kernels, compared with the formula in float64, interpreted and on a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ws_detectron.layers import WS_MODES, standardize_weight
from ws_detectron.layers.standardize import _by_formula, _kernels

pytest.importorskip("triton", reason="Triton is installed with torch on Linux only")

# The interpreter is chosen when Triton is imported, so this runs in a separate process.
SCRIPT = """
import json, torch
from ws_detectron.layers.standardize import _by_formula, ws_modes
from ws_detectron.layers.triton_kernels import standardize_backward, standardize as forward

torch.manual_seed(0)
weights = {
    "stem of R-50": 0.02 * torch.randn(3, 147),
    "3x3 of res5": 0.01 * torch.randn(2, 4608) + 0.5,
    "1x1": torch.randn(5, 64),
    "tiny deviation": 1e-4 * torch.randn(4, 32),
    "constant": torch.full((2, 9), 0.3),
    "constant and long": torch.full((2, 4608), 0.3),
    "one value": torch.randn(3, 1),
}
upstreams = {name: torch.randn_like(weight) for name, weight in weights.items()}
report = {}

def compare(names, mode, form, affine):
    chosen = [weights[name] for name in names]
    affines = [tuple(torch.randn(2, len(weight), 1)) for weight in chosen] if affine else []
    flat, statistics = forward(chosen, 1e-5, *form, affines)
    upstream = torch.cat([upstreams[name].flatten() for name in names])
    gradients = standardize_backward(chosen, upstream, statistics)
    sizes = [weight.numel() for weight in chosen]
    pairs = affines or [None] * len(names)
    for name, result, gradient, pair in zip(
        names, flat.split(sizes), gradients.split(sizes), pairs
    ):
        exact = weights[name].double().requires_grad_()
        expected = _by_formula(exact, 1e-5, mode, pair and tuple(t.double() for t in pair))
        (expected * upstreams[name]).sum().backward()
        scale = max(1.0, exact.grad.abs().max().item())
        errors = (
            (result.view_as(exact) - expected.detach()).abs(),
            (gradient.view_as(exact) - exact.grad).abs() / scale,
        )
        case = f"{name} of {len(names)}, {mode}, {affine}"
        report[case] = [float(e.nan_to_num(1e9).max()) for e in errors]

for mode, form in ws_modes().items():
    compare([*weights], mode, form, affine=mode == "aws")
    for name in weights:
        compare([name], mode, form, affine=False)
compare(["3x3 of res5"], "official", ws_modes()["official"], affine=True)
print(json.dumps(report))
"""


def test_kernels_equal_the_formula_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert len(report) == 7 * 4 * 2 + 1
    for case, (value, gradient) in report.items():
        # the mean 0.5 of float32 is rounded by up to 3e-8, which is 3e-6 of the deviation 0.01
        if case.startswith("constant") and case.endswith("False"):  # without affine
            assert value == 0, case
        assert value < 1e-5 and gradient < 1e-5, (case, value, gradient)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FILTERS = {
    "stem of R-50": (64, 3, 7, 7),
    "1x1": (64, 64, 1, 1),
    "3x3 of res5": (512, 512, 3, 3),
    "grouped": (256, 4, 3, 3),
    "one value": (8, 1, 1, 1),
    "long": (2, 2048, 3, 3),
}


@on_gpu
def test_kernels_can_be_built_on_this_gpu() -> None:
    """Otherwise the tests below would test the fallback."""
    assert _kernels() is not None


@on_gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", WS_MODES)
@pytest.mark.parametrize("shape", FILTERS.values(), ids=FILTERS)
def test_value_and_gradient_on_a_gpu(shape: tuple, mode: str, memory_format) -> None:
    weight = (0.01 * torch.randn(shape) + 0.003).to("cuda", memory_format=memory_format)
    weight[0] = 0.3  # a constant filter
    weight.requires_grad_()
    upstream = torch.randn_like(weight)
    result = standardize_weight(weight, 1e-5, mode)
    assert result.is_contiguous(memory_format=memory_format)
    result.backward(upstream)
    exact = weight.detach().double().requires_grad_()
    expected = _by_formula(exact, 1e-5, mode)
    expected.backward(upstream.double())
    assert not result[0].any()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-5)
    scale = exact.grad.abs().max().item() or 1.0
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * scale)


@on_gpu
def test_same_bits_every_time_and_differentiable_twice_on_a_gpu() -> None:
    weight = torch.randn(64, 32, 3, 3, device="cuda", requires_grad=True)
    upstream = torch.randn_like(weight)

    def both() -> tuple[torch.Tensor, ...]:
        result = standardize_weight(weight)
        return result, *torch.autograd.grad(result, weight, upstream)

    assert all(torch.equal(first, second) for first, second in zip(both(), both()))

    def second(function) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(
            (function(weight, 1e-5, "paper") ** 3).sum(), weight, create_graph=True
        )
        (result,) = torch.autograd.grad((gradient * upstream).sum(), weight)
        return result

    torch.testing.assert_close(
        second(standardize_weight), second(_by_formula), rtol=1e-3, atol=1e-4
    )
