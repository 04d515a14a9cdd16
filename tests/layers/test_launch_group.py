"""Filters standardized together: as each conv alone would, whatever a training does in between.

On the CPU with a stand-in for the Triton kernels, on a GPU with them; with the variable
TRITON_INTERPRET=1 set, on the CPU with them, too, interpreted.
"""

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ws_detectron.layers import (
    WS_MODES,
    LaunchGroup,
    WSConv2d,
    launch_group,
    standardize_once_per_forward,
    standardize_weight,
)
from ws_detectron.layers.standardize import _load_triton_kernels, _standardize_by_formula
from ws_detectron.modeling import convert_to_ws, fold_ws

try:  # Triton is installed with torch on Linux only; the stand-in needs none
    from ws_detectron.layers.triton_kernels import FilterTable
except ImportError:
    FilterTable = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Table:
    """A `FilterTable` of torch operations."""

    def __init__(self, weights: Sequence[torch.Tensor], addresses: Sequence[int]) -> None:
        self.weights, self.sizes = weights, [weight.numel() for weight in weights]

    def forward(self, eps: float, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        results = [_standardize_by_formula(weight, eps, mode) for weight in self.weights]
        statistics = torch.tensor([eps, WS_MODES.index(mode)])
        return torch.cat([flat(result) for result in results]), statistics

    def backward(self, gradient: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        eps, mode = statistics.tolist()
        parts = []
        for weight, part in zip(self.weights, gradient.split(self.sizes)):
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()
                result = flat(_standardize_by_formula(leaf, eps, WS_MODES[int(mode)]))
            parts.append(flat(torch.autograd.grad(result, leaf, part)[0]))
        return torch.cat(parts)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """In the order in which it lies in memory."""
    return (tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)).flatten()


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cuda":
        assert _load_triton_kernels() is not None  # it tries them once, which is a launch
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    else:
        kernels = SimpleNamespace(FilterTable=FilterTable if INTERPRETED else Table)
        monkeypatch.setattr(launch_group, "triton_kernels_for", lambda weight: kernels)
    return request.param


@pytest.fixture
def launches(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many weights each launch of a forward is of."""
    found: list[int] = []
    kind = Table if device == "cpu" and not INTERPRETED else FilterTable
    forward = kind.forward

    def counting(self, eps: float, mode: str):
        found.append(len(self.sizes))
        return forward(self, eps, mode)

    monkeypatch.setattr(kind, "forward", counting)
    yield found


class Net(nn.Module):
    """Three convs, of which calls may be left out or repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            WSConv2d(4, 4, 3, padding=1, norm=nn.GroupNorm(2, 4)) for _ in "abc"
        )
        self.calls = "abc"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.calls:
            x = x + getattr(self, name)(x)
        return x.square().mean()


@pytest.fixture
def net(device: str) -> Net:
    net = Net().to(device)
    convert_to_ws(net)
    return net


def alone(net: nn.Module) -> nn.Module:
    """A copy without a group."""
    other = copy.deepcopy(net)
    for module in other.modules():
        module.__dict__.pop("_launch_group", None)
    return other


def inputs(device: str, number: int) -> list[torch.Tensor]:
    return [torch.randn(1, 4, 5, 5, device=device) for _ in range(number)]


def same(net: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(net.named_parameters(), other.parameters()):
        assert (one.grad is None) == (two.grad is None), name
        torch.testing.assert_close(one, two, msg=name)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


def train(net: nn.Module, images: Sequence[torch.Tensor], calls: Sequence[str] = ()) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for number, x in enumerate(images):
        net.calls = calls[number] if calls else net.calls
        optimizer.zero_grad()
        net(x).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "calls",
    [
        ["abc"] * 4,
        ["abc", "abbc", "abcabc", "abcbca"],  # called several times
        ["abc", "abc", "ac", "abc", "bc", "abc", "cba", "abc"],  # left out, in another order
        ["a", "ab", "abc", "b", "c", "cb"],
    ],
    ids=",".join,
)
def test_trains_as_each_conv_alone(net: Net, device: str, calls: list[str], launches: list) -> None:
    other = alone(net)
    images = inputs(device, len(calls))
    train(net, images, calls)
    done = list(launches)
    train(other, images, calls)
    same(net, other)
    assert done and launches == done  # no launch for convs without a group


def test_one_launch_for_each_forward_after_the_first(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 4), ["abc", "abc", "abcb", "abcb"])
    assert launches == [3, 3, 3]


def test_what_nobody_takes_is_left_out_until_it_is_called_again(
    net: Net, device: str, launches: list
) -> None:
    train(net, inputs(device, 7), ["abc", "abc", "ab", "ab", "abc", "abc", "abc"])
    # the launch before a conv is missed is still of it; so is the first after it has come back
    assert launches == [3, 3, 2, 2, 3, 3]


def test_accumulating_and_two_forwards_before_the_backwards(net: Net, device: str) -> None:
    other = alone(net)
    first, *images = inputs(device, 3)
    for model in (net, other):
        model(first).backward()
        for x in images:  # the same weights, another graph
            model(x).backward()
        losses = [model(x) for x in images]
        losses[1].backward()
        losses[0].backward()
    same(net, other)


def test_backwards_of_graphs_that_share_nothing_else(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 1))
    other = alone(net)
    (x,) = inputs(device, 1)
    for model in (net, other):
        model.zero_grad()
        losses = []
        for model.calls in "abc":
            losses.append(model(x))
        for loss in losses:
            loss.backward()
    assert launches == [3]
    same(net, other)


def test_a_weight_written_to_before_the_backward_is_refused(net: Net, device: str) -> None:
    train(net, inputs(device, 1))
    loss = net(inputs(device, 1)[0])
    with torch.no_grad():
        net.b.weight += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["in place", "data", "replaced", "eps", "mode"])
def test_never_stale(net: Net, device: str, how: str) -> None:
    """What changes a conv after the launch that was to serve it."""
    train(net, inputs(device, 2))

    def change(module: nn.Module, args: tuple) -> None:
        with torch.no_grad():
            if how == "in place":
                module.weight[0, 0] += 1.0
            if how == "data":
                module.weight.data = module.weight.data[:, [1, 0, 2, 3]] ** 3
            if how == "replaced":
                module.weight = nn.Parameter(module.weight**3)
        module.ws_eps = 0.5 if how == "eps" else module.ws_eps
        module.ws_mode = "bit" if how == "mode" else module.ws_mode

    other = alone(net)
    (x,) = inputs(device, 1)
    losses = []
    for model in (net, other):
        model.b.register_forward_pre_hook(change)
        losses.append(model(x))
    torch.testing.assert_close(*losses)


def test_frozen_first_conv_hands_over(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 2))
    net.a.weight.requires_grad = False
    train(net, inputs(device, 2))
    assert launches == [3, 2, 2]


def test_a_conv_that_is_trained_again_begins_the_forward(
    net: Net, device: str, launches: list
) -> None:
    """Also for an optimizer that leaves no trace in the weights' versions."""
    other = alone(net)
    images = inputs(device, 7)
    for model in (net, other):
        for number, x in enumerate(images):
            model.a.weight.requires_grad = number > 2
            model.zero_grad()
            model(x).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=0.1)
    assert launches[-2:] == [3, 3]
    same(net, other)


def test_order_is_learned_anew(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 8), ["c", "abc", "abc", "abc", "abc", "bc", "bc", "bc"])
    # `c` begins the first launch, too late for what was called before it; `b`, which leaves for
    # that, is back in the third; the first without `a` is still of it
    assert launches == [3, 2, 3, 3, 3, 2, 2]


@pytest.mark.parametrize("how", ["frozen", "folded", "deleted"])
def test_a_forward_that_was_given_up_ends_when_its_first_conv_is_gone(
    net: Net, device: str, launches: list, how: str
) -> None:
    train(net, inputs(device, 2))
    net(inputs(device, 1)[0])  # no backward
    if how == "frozen":
        net.a.weight.requires_grad = False
    elif how == "folded":
        fold_ws(net.a)
    else:
        del net.a
        net.calls = "bc"
    launches.clear()
    train(net, inputs(device, 3))
    assert launches == [2, 2, 2]


def test_views_of_one_memory(net: Net, device: str) -> None:
    """As flattened optimizers make of the weights."""
    train(net, inputs(device, 2))
    other = alone(net)
    for model in (net, other):
        weights = list(model.parameters())
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(weights).detach().clone(), weights
        )
    assert net.b.weight.storage_offset() > 0
    images = inputs(device, 3)
    train(net, images)
    train(other, images)
    same(net, other)


def test_another_shape_before_the_backward_is_refused(net: Net, device: str) -> None:
    train(net, inputs(device, 2))
    loss = net(inputs(device, 1)[0])
    net.c.weight.data = net.c.weight.data.view(8, 2, 3, 3)
    with pytest.raises(RuntimeError, match=r"another shape .* \[8, 2, 3, 3\]"):
        loss.backward()


def test_other_settings_do_not_share_a_launch(net: Net, device: str, launches: list) -> None:
    net.b.ws_eps, net.c.ws_mode = 0.5, "bit"
    other = alone(net)
    images = inputs(device, 4)
    train(net, images)
    assert launches == [1, 1, 1]
    train(other, images)
    same(net, other)


def test_tables_do_not_pile_up(net: Net, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_group, "_MOST_TABLES", 2)
    for x in inputs(device, 9):
        net(x).backward()
        for parameter in net.parameters():
            parameter.data = parameter.data.clone()
        assert len(net.a._launch_group._tables) <= 3


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is for one thread")
def test_threads_may_train_on_one_model(net: Net, device: str) -> None:
    """None may take what is of another's launch under way, or nothing at all."""
    train(net, inputs(device, 2))
    failed: list[BaseException] = []

    def forwards(x: torch.Tensor) -> None:
        try:
            for _ in range(30):
                assert torch.isfinite(net(x))
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=forwards, args=(x,)) for x in inputs(device, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_evaluation_between_forward_and_backward(net: Net, device: str) -> None:
    """It keeps filters of its own, for which the weights may get other memory."""
    train(net, inputs(device, 2))
    other = alone(net)
    x, y, z = inputs(device, 3)
    for model in (net, other):
        model.zero_grad()
        loss = model(x)
        with torch.no_grad():
            model.eval()
            model(y)
            model.train()
        (loss + model(z)).backward()
    same(net, other)


def test_memory_that_moves_between_forward_and_backward(net: Net, device: str) -> None:
    """As the weights of sharded training do; what they held before is overwritten."""
    train(net, inputs(device, 2))
    other = alone(net)
    (x,) = inputs(device, 1)
    for model in (net, other):
        model.zero_grad()
        loss = model(x)
        for conv in (model.a, model.b, model.c):
            before, conv.weight.data = conv.weight.data, conv.weight.data.clone()
            before.fill_(1e9)
        loss.backward()
    same(net, other)


def test_another_shape_in_the_same_memory(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 2))
    net.b = WSConv2d(9, 4, 2, bias=False, norm=nn.GroupNorm(2, 4)).to(device)
    net.b._launch_group = net.a._launch_group
    x, y = torch.randn(1, 4, 5, 5, device=device), torch.randn(1, 9, 5, 5, device=device)
    for shape in ((4, 9, 2, 2), (8, 9, 2, 1), (8, 9, 2, 1)):
        net.b.norm = nn.GroupNorm(2, shape[0]).to(device)
        net.b.weight.data, net.b.weight.grad = net.b.weight.data.view(shape), None
        (net.a(x).mean() + net.b(y).square().mean()).backward()
        expected = standardize_weight(net.b.weight.detach().clone(), mode="official")
        net.a(x)
        torch.testing.assert_close(net.b.standardized_weight().detach(), expected)
    assert launches[-1] >= 2


def test_hooks_on_a_weight_are_not_called_without_a_gradient(net: Net, device: str) -> None:
    seen = []
    net.b.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    train(net, inputs(device, 4), ["abc", "abc", "ac", "abc"])
    assert seen == [net.b.weight.shape] * 3


def test_steps_between_backwards_of_one_launch(net: Net, device: str) -> None:
    """A weight may be written to once its own gradient has been computed."""
    train(net, inputs(device, 1))
    other = alone(net)
    x, y = inputs(device, 2)
    for model in (net, other):
        model.zero_grad()
        losses = []
        for model.calls in ("a", "b"):
            losses.append(model(x))
        for loss, conv in zip(losses, (model.a, model.b)):
            loss.backward()
            torch.optim.SGD(conv.parameters(), lr=0.1).step()
    same(net, other)


def test_folded_convs_have_left(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 2))
    fold_ws(net.b)
    train(net, inputs(device, 2))
    assert launches == [3, 2, 2]


def test_nothing_is_held_after_a_backward(net: Net, device: str) -> None:
    train(net, inputs(device, 2))
    net.calls = "ab"
    loss = net(inputs(device, 1)[0])
    assert net.a._launch_group._ready
    loss.backward()
    assert not net.a._launch_group._ready


def test_any_default_dtype(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 1))
    images = inputs(device, 2)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        train(net, images)
    finally:
        torch.set_default_dtype(default)
    assert launches == [3, 3]


def test_no_gradient_for_what_was_not_used(net: Net, device: str, launches: list) -> None:
    """None, not zeros: decay and momentum of an optimizer would move the weight by those."""
    train(net, inputs(device, 2))
    net.zero_grad(set_to_none=True)
    net.calls = "ac"
    net(inputs(device, 1)[0]).backward()
    assert launches[-1] == 3
    assert net.a.weight.grad is not None and net.b.weight.grad is None


def test_large_groups_take_several_launches(
    net: Net, device: str, launches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_group, "LAUNCH_BYTES", 2 * 4 * 4 * 9 * 4)
    other = alone(net)
    images = inputs(device, 3)
    train(net, images)
    assert launches == [2, 1, 2, 1]
    train(other, images)
    same(net, other)


def test_channels_last(net: Net, device: str, launches: list) -> None:
    net.to(memory_format=torch.channels_last)
    assert not net.a.weight.is_contiguous()
    other = alone(net)
    images = inputs(device, 3)
    train(net, images)
    assert launches == [3, 3]
    train(other, images)
    same(net, other)


@pytest.mark.parametrize("unused", [False, True])
def test_distributed(net: Net, device: str, launches: list, unused: bool, tmp_path: Path) -> None:
    """Gradients leave by hooks on each weight, those of a launch one after the other."""
    other = alone(net)
    images = inputs(device, 4)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for model in (net, other):
            wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for number, x in enumerate(images):
                model.calls = "ac" if unused and number == 2 else "abc"
                optimizer.zero_grad()
                with wrapped.no_sync():
                    wrapped(x).backward()
                wrapped(x).backward()
                optimizer.step()
    finally:
        dist.destroy_process_group()
    assert launches.count(3) >= 5
    same(net, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(net: Net, device: str, launches: list, reentrant: bool) -> None:
    other = alone(net)
    images = [x.requires_grad_() for x in inputs(device, 3)]
    for model in (net, other):
        for x in images:
            y = model.a(x)
            y = checkpoint(model.b, y, use_reentrant=reentrant)
            checkpoint(model.c, y, use_reentrant=reentrant).square().mean().backward()
    same(net, other)
    assert launches == [1, 1]  # none in the parts that are computed again


def test_twice_differentiable(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 1))
    other = alone(net)
    (x,) = inputs(device, 1)
    for model in (net, other):
        model.zero_grad()
        weights = [model.a.weight, model.b.weight, model.c.weight]
        gradients = torch.autograd.grad(model(x), weights, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    assert launches == [3]
    same(net, other)


def test_with_convs_that_are_shared_within_a_forward(net: Net, device: str, launches: list) -> None:
    other = alone(net)
    standardize_once_per_forward(net)
    images = inputs(device, 3)
    train(net, images, ["abcbcb"] * 3)
    assert launches == [3, 3]
    train(other, images, ["abcbcb"] * 3)
    same(net, other)


def test_a_copy_has_a_group_of_its_own(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 2))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        groups = {id(conv._launch_group) for conv in (other.a, other.b, other.c)}
        assert len(groups) == 1 and id(net.a._launch_group) not in groups
        launches.clear()
        train(other, inputs(device, 2))
        assert launches == [3]
    # a copy of one conv does not drag the others along
    assert len(pickle.dumps(net.a)) < 0.5 * len(pickle.dumps(net))


def test_deleted_convs_are_forgotten(net: Net, device: str, launches: list) -> None:
    train(net, inputs(device, 2))
    del net.b
    net.calls = "ac"
    train(net, inputs(device, 1))
    assert launches == [3, 2]


@pytest.mark.parametrize("weight", [torch.zeros(2, 3), nn.Parameter(torch.zeros(0, 3, 1, 1))])
def test_other_than_ordinary_weights_stay_out(device: str, weight: torch.Tensor) -> None:
    conv = SimpleNamespace(weight=weight, ws_eps=1e-5, ws_mode="paper")
    assert LaunchGroup().take(conv) is None


@pytest.mark.skipif(INTERPRETED, reason="the kernels are those of this run")
def test_the_same_with_the_real_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is installed with torch on Linux only")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "cpu"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_joins_on_the_cpu() -> None:
    net = Net()
    convert_to_ws(net)
    train(net, inputs("cpu", 2))
    assert not net.a._launch_group._members
