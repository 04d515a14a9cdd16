"""The Triton kernels against the formula in float64, in Triton's interpreter, so without a GPU.

On a GPU, tests/layers/test_standardize.py and test_ws_conv.py run the compiled kernels.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is installed with torch on Linux only")

# The interpreter is chosen when Triton is imported, so in a process of its own.
SCRIPT = """
import json, torch
from ws_detectron.layers import WS_MODES, standardize
from ws_detectron.layers.triton_kernels import standardize_rows, standardize_rows_backward

torch.manual_seed(0)
weights = {
    "stem of R-50": 0.02 * torch.randn(3, 147),
    "3x3 of res5": 0.01 * torch.randn(2, 4608) + 0.5,
    "1x1": torch.randn(5, 64),
    "tiny deviation": 1e-4 * torch.randn(4, 32),
    "constant": torch.full((2, 9), 0.3),
    "one value": torch.randn(3, 1),
    "empty": torch.randn(0, 9),
}
report = {}
for name, weight in weights.items():
    for mode in WS_MODES:
        result, *statistics = standardize_rows(weight, 1e-5, mode)
        upstream = torch.randn_like(weight)
        gradient = standardize_rows_backward(upstream, weight, *statistics)
        exact = weight.double().requires_grad_()
        expected = standardize._standardize_by_formula(exact, 1e-5, mode)
        (expected * upstream).sum().backward()
        if len(weight):
            scale = max(1.0, exact.grad.abs().max().item())
            errors = (result - expected.detach()).abs(), (gradient - exact.grad).abs() / scale
            report[f"{name}, {mode}"] = [float(e.nan_to_num(1e9).max()) for e in errors]
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
    assert len(report) == 6 * 3
    for case, (value, gradient) in report.items():
        # the mean 0.5 of float32 is rounded by up to 3e-8, which is 3e-6 of the deviation 0.01
        assert value < 1e-5 and gradient < 1e-5, (case, value, gradient)
