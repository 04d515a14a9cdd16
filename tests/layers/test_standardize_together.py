"""Convs of a part that are standardized together: results are as for each conv alone.

The tests run on the CPU with torch's kernels, on the CPU with the Triton path and replaced kernels,
and on a GPU with the Triton kernels. TRITON_INTERPRET=1 makes the CPU interpret these.
"""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ws_detectron.layers import (
    WS_MODES,
    WSConv2d,
    standardize,
    standardize_alone,
    standardize_together,
    ws_conv,
)
from ws_detectron.layers.standardize import has_contiguous_filters, in_graph_capture

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class StandIn:
    """The functions of `triton_kernels` in torch operations."""

    @staticmethod
    def standardize(
        weights: Sequence[torch.Tensor], eps: float, unbiased: bool, root: bool, affines: Any
    ) -> tuple[torch.Tensor, Any]:
        rows = standardize.ws_modes().items()
        (mode,) = (name for name, row in rows if row == (unbiased, root))
        forms = [(eps, mode, pair) for pair in affines or [None] * len(weights)]
        results = [standardize._by_formula(w, *form) for w, form in zip(weights, forms)]
        return torch.cat([flat(result) for result in results]), forms

    @staticmethod
    def standardize_backward(
        weights: Sequence[torch.Tensor], gradient: torch.Tensor, statistics: Any
    ) -> torch.Tensor:
        parts = []
        sizes = [weight.numel() for weight in weights]
        for weight, part, form in zip(weights, gradient.split(sizes), statistics):
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()
                result = flat(standardize._by_formula(leaf, *form))
            parts.append(flat(torch.autograd.grad(result, leaf, part)[0]))
        return torch.cat(parts)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """In memory order."""
    return (tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)).flatten()


def use_stand_in(patch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which each launch in a forward appends its number of weights."""
    kernels: Any = StandIn
    if INTERPRETED:
        from ws_detectron.layers import triton_kernels as kernels
    launches: list[int] = []
    plain = kernels.standardize

    def counting(weights: Sequence[torch.Tensor], *args: Any) -> tuple[torch.Tensor, Any]:
        launches.append(len(weights))
        return plain(weights, *args)

    def runs(weight: torch.Tensor) -> bool:
        return weight.dtype == torch.float32 and has_contiguous_filters(weight)

    patch.setattr(kernels, "standardize", counting)
    patch.setattr(standardize, "_kernels", lambda: kernels)
    patch.setattr(standardize, "_runs_in_triton", runs)
    patch.setattr(standardize, "_triton_is_ready", lambda: not in_graph_capture())
    return launches


@pytest.fixture(params=["cpu", "stand-in", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        assert standardize._kernels() is not None
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    elif request.param == "stand-in":
        use_stand_in(monkeypatch)
    return request.param


@pytest.fixture
def device(kernels: str) -> str:
    return "cuda" if kernels == "cuda" else "cpu"


class Net(nn.Module):
    """Three convs, whose calls can be skipped or repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            WSConv2d(4, 4, 3, padding=1, norm=nn.GroupNorm(2, 4), ws_eps=0.05) for _ in "abc"
        )  # eps is large enough that the place of it in the formula shows
        self.calls = "abc"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.calls:
            x = x + getattr(self, name)(x)
        return x.square().mean()


@pytest.fixture
def net(device: str) -> Net:
    torch.manual_seed(0)
    net = Net().to(device)
    assert standardize_together(net) is net
    return net


def alone(net: nn.Module) -> nn.Module:
    """A copy whose convs standardize alone."""
    other = copy.deepcopy(net)
    for module in other.modules():
        standardize_alone(module)
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
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for number, x in enumerate(images):
        net.calls = calls[number] if calls else net.calls
        optimizer.zero_grad()
        net(x).backward()
        optimizer.step()


def train_both(net: nn.Module, device: str, number: int, calls: Sequence[str] = ()) -> None:
    """A net, and a copy of it whose convs standardize alone, which must stay the same."""
    other = alone(net)
    images = [x.to(net.a.weight.dtype) for x in inputs(device, number)]
    train(net, images, calls)
    train(other, images, calls)
    same(net, other)


CALLS = [
    ["abc"] * 4,
    ["abc", "abbc", "abcabc", "abcbca"],  # called several times
    ["abc", "abc", "ac", "abc", "bc", "abc", "cba", "abc"],  # left out, in another order
]


@pytest.mark.parametrize("calls", CALLS, ids=["all", "repeated", "left out"])
@pytest.mark.parametrize("mode", WS_MODES)
def test_trains_as_each_conv_alone(net: Net, device: str, calls: list[str], mode: str) -> None:
    """`grad` of an unused conv stays None; with zeros, weight decay would apply."""
    for conv in (net.a, net.b, net.c):
        conv.ws_mode = mode
    train_both(net, device, len(calls), calls)


def test_one_launch_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = use_stand_in(monkeypatch)
    net = Net()
    train(net, inputs("cpu", 1), ["abcb"])
    assert launches == [1, 1, 1, 1]
    standardize_together(net)
    train(net, inputs("cpu", 2), ["abcb", "ac"])
    assert launches[4:] == [3, 3]


def test_large_parts_take_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = use_stand_in(monkeypatch)
    monkeypatch.setattr(standardize, "LAUNCH_BYTES", 2 * 4 * 4 * 9 * 4)
    train_both(standardize_together(Net()), "cpu", 3)
    assert launches == [2, 1] * 3 + [1, 1, 1] * 3


class Towers(nn.Module):
    """Two towers on the levels of an FPN, as in RetinaNet's head."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(WSConv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
            for _ in range(2)
        )

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        return [sum(tower(x).square().mean() for x in levels) for tower in self.towers]  # type: ignore


def test_shared_convs_sum_their_gradients(device: str) -> None:
    head = standardize_together(Towers().to(device))
    other = alone(head)
    levels = [torch.randn(2, 4, size, size, device=device) for size in (16, 8, 4, 2, 1)]
    for model in (head, other):
        for loss in model(levels):  # two graphs that share nothing but the launch
            loss.backward()
    same(head, other)


def test_shared_convs_standardize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = use_stand_in(monkeypatch)
    sum(standardize_together(Towers())([torch.randn(2, 4, n, n) for n in (8, 4, 2)])).backward()
    assert launches == [2]


def test_a_compiled_forward_standardizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = use_stand_in(monkeypatch)
    net = standardize_together(Net())
    (x,) = inputs("cpu", 1)
    expected = alone(net)(x)
    launches.clear()
    net.forward = torch.compile(net.forward, backend="aot_eager")  # type: ignore[method-assign]
    torch.testing.assert_close(net(x), expected)
    assert not launches


def test_the_first_conv_may_be_called_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = use_stand_in(monkeypatch)

    class FirstWithout(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.a(x)
            return self.c(self.b(x)).square().mean()

    part = standardize_together(FirstWithout())
    other = alone(part)
    (x,) = inputs("cpu", 1)
    part(x).backward()
    assert launches == [3] and part.a.weight.grad is None
    other(x).backward()
    same(part, other)


def test_nested_parts_standardize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = use_stand_in(monkeypatch)
    inner = standardize_together(Net())
    outer = standardize_together(nn.Sequential(WSConv2d(4, 4, 1, ws_eps=0.05), inner))
    other = alone(outer)
    (x,) = inputs("cpu", 1)
    outer(x).backward()
    assert launches == [4]
    other(x).backward()
    same(outer, other)
    inner(x)
    assert launches[-1] == 3


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


def test_steps_between_backwards_of_one_launch(net: Net, device: str) -> None:
    """A weight may be modified after its own gradient has been computed."""

    class Separate(Net):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.a(x).square().mean(), self.b(x).square().mean()]

    part = Separate().to(device)
    standardize_together(part)
    other = alone(part)
    (x,) = inputs(device, 1)
    for model in (part, other):
        for loss, conv in zip(model(x), (model.a, model.b)):
            loss.backward()
            torch.optim.SGD(conv.parameters(), lr=0.1).step()
    same(part, other)


def test_a_weight_written_to_before_the_backward_is_refused(net: Net, device: str) -> None:
    loss = net(inputs(device, 1)[0])
    with torch.no_grad():
        net.b.weight += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_place(conv: WSConv2d) -> None:
    with torch.no_grad():
        conv.weight[0, 0] += 1.0


def data_in_place(conv: WSConv2d) -> None:
    conv.weight.data.pow_(3)


def data_replaced(conv: WSConv2d) -> None:
    conv.weight.data = conv.weight.data[:, [1, 0, 2, 3]] ** 3


def weight_replaced(conv: WSConv2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach() ** 3)


def eps_changed(conv: WSConv2d) -> None:
    conv.ws_eps = 0.5


def mode_changed(conv: WSConv2d) -> None:
    conv.ws_mode = "bit"


def checkpoint_loaded(conv: WSConv2d) -> None:
    conv.load_state_dict({k: v**3 for k, v in conv.state_dict().items()})


def state_dict_edited(conv: WSConv2d) -> None:
    conv.state_dict()["weight"].pow_(3)


def moved_to_double(conv: WSConv2d) -> None:
    conv.double().float()
    data_in_place(conv)


def affine_set(conv: WSConv2d) -> None:
    gamma = conv.weight.detach()[:, :1, :1, :1] + 3
    conv.set_affine((gamma, gamma**2))


def affine_edited(conv: WSConv2d) -> None:
    conv.weight_gamma.mul_(2)


CHANGES = [
    in_place, data_in_place, data_replaced, weight_replaced, eps_changed, mode_changed,
    checkpoint_loaded, state_dict_edited, moved_to_double, affine_set,
]  # fmt: skip


@pytest.mark.parametrize("when", ["between calls", "in a pre-hook", "frozen", "without gradients"])
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(net: Net, device: str, change: Any, when: str) -> None:
    net.requires_grad_(when != "frozen")
    other = alone(net)
    (x,) = inputs(device, 1)
    results = []
    for model in (net, other):
        with torch.set_grad_enabled(when != "without gradients"):
            before = model(x)
            if when == "in a pre-hook":
                model.b.register_forward_pre_hook(lambda conv, _: change(conv))
            else:
                change(model.b)
            results.append(model(x))
            results.append(model.b(x))  # without its part
        assert not torch.allclose(before, results[-2])
    torch.testing.assert_close(results[:2], results[2:])


def test_changes_of_a_shared_conv_within_a_call(net: Net, device: str) -> None:
    """Only changes that autograd can see."""

    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            self.change(self.a)
            return self.a(x)

    for change in (*CHANGES, affine_edited):
        if change in (data_in_place, state_dict_edited, moved_to_double):
            continue
        part = Twice().to(device)
        part.change = change
        if change is affine_edited:
            give_affine(part.a)
        standardize_together(part)
        other = alone(part)
        (x,) = inputs(device, 1)
        torch.testing.assert_close(part(x), other(x), msg=change.__name__)


def test_frozen_and_frozen_later_and_trained_again(net: Net, device: str) -> None:
    other = alone(net)
    images = inputs(device, 7)
    for model in (net, other):
        for number, x in enumerate(images):
            model.a.weight.requires_grad = number not in (0, 3)
            model.zero_grad()
            model(x).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=0.1)
    same(net, other)


def test_no_gradient_is_computed_for_frozen_filters(net: Net, device: str) -> None:
    net.b.weight.requires_grad = False
    needed = []
    net.c.norm.register_forward_hook(
        lambda *_: needed.extend(s.requires_grad for s in standardized_now())
    )
    net(inputs(device, 1)[0])
    assert needed == [True, False, True]


def test_gradients_are_asked_for_in_the_middle(net: Net, device: str) -> None:
    """A call may enable gradients or unfreeze a conv after it has started."""

    class Middle(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.b.weight.requires_grad = True
            with torch.enable_grad():
                return self.b(x).square().mean()

    part = standardize_together(Middle().to(device))
    (x,) = inputs(device, 1)
    for part.b.weight.requires_grad, grad in ((True, False), (False, True)):
        part.zero_grad()
        with torch.set_grad_enabled(grad):
            loss = part(x)
        loss.backward()
        assert part.b.weight.grad is not None and part.b.weight.grad.any()


def test_other_settings_and_tied_weights(net: Net, device: str) -> None:
    net.b.ws_eps, net.c.ws_mode = 0.5, "bit"
    net.c.weight = net.a.weight
    train_both(net, device, 4)


def give_affine(conv: WSConv2d) -> None:
    gamma, beta = torch.randn(2, conv.out_channels, 1, 1, 1, device=conv.weight.device)
    conv.set_affine((gamma.to(conv.weight.dtype), beta.to(conv.weight.dtype)))


@pytest.mark.parametrize("count", [1, 3])
def test_affine_settings_and_tied_weights(net: Net, device: str, count: int) -> None:
    net.c.weight = net.a.weight
    for conv in (net.a, net.b, net.c)[:count]:
        give_affine(conv)
    train_both(net, device, 3)


def test_affine_convs_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = use_stand_in(monkeypatch)
    net = standardize_together(Net())
    give_affine(net.a)
    give_affine(net.c)
    train(net, inputs("cpu", 1))
    assert launches == [2, 1]


def test_views_of_one_memory(net: Net, device: str) -> None:
    """As with optimizers that flatten parameters."""
    weights = list(net.parameters())
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(weights).detach().clone(), weights
    )
    assert net.b.weight.storage_offset() > 0
    train_both(net, device, 3)


def test_memory_that_moves_between_forward_and_backward(net: Net, device: str) -> None:
    """As in sharded training; the old memory is overwritten."""
    other = alone(net)
    (x,) = inputs(device, 1)
    for model in (net, other):
        loss = model(x)
        for conv in (model.a, model.b, model.c):
            before, conv.weight.data = conv.weight.data, conv.weight.data.clone()
            if model is net:
                before.fill_(1e9)
        loss.backward()
    same(net, other)


def test_another_shape_before_the_backward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)
    net = standardize_together(Net())
    loss = net(inputs("cpu", 1)[0])
    net.c.weight.data = net.c.weight.data.view(8, 2, 3, 3)
    with pytest.raises(RuntimeError, match=r"shape \[8, 2, 3, 3\]"):
        loss.backward()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is for one thread")
def test_threads_may_call_one_model(net: Net, device: str) -> None:
    failed: list[BaseException] = []
    images = inputs(device, 4)
    expected = [alone(net)(x) for x in images]

    def forwards(x: torch.Tensor, y: torch.Tensor) -> None:
        try:
            for _ in range(30):
                torch.testing.assert_close(net(x), y)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=forwards, args=each) for each in zip(images, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_calls_are_those_of_a_thread(net: Net, device: str) -> None:
    seen = []

    def look() -> None:
        seen.append(list(ws_conv._running.calls))

    def in_a_thread(*args: Any) -> None:
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    net.b.norm.register_forward_hook(in_a_thread)
    net(inputs(device, 1)[0])
    here, there = seen
    assert len(here) == 1 and not there


def test_evaluation_between_forward_and_backward(net: Net, device: str) -> None:
    other = alone(net)
    x, y, z = inputs(device, 3)
    for model in (net, other):
        loss = model(x)
        with torch.no_grad():
            model.eval()
            model(y)
            model.train()
        (loss + model(z)).backward()
    same(net, other)


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept_after_a_call(net: Net, device: str, grad: bool) -> None:
    kept = []
    handle = net.b.norm.register_forward_hook(
        lambda *_: kept.extend(map(weakref.ref, standardized_now()))
    )
    with torch.set_grad_enabled(grad):
        loss = net(inputs(device, 1)[0])
    handle.remove()
    assert len(kept) == 3 and not ws_conv._running.calls
    if grad:
        loss.backward()
    assert all(ref() is None for ref in kept)


def standardized_now() -> list[torch.Tensor]:
    return [s.standardized for call in ws_conv._running.calls for s in call.filters().values()]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_fails_keeps_nothing(net: Net, device: str, error: type) -> None:
    def fail(*args: Any) -> None:
        raise error

    handle = net.b.norm.register_forward_hook(fail)
    with pytest.raises(error):
        net(inputs(device, 1)[0])
    handle.remove()
    assert not ws_conv._running.calls


def test_hooks_on_a_weight_are_not_called_without_a_gradient(net: Net, device: str) -> None:
    seen = []
    net.b.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    train(net, inputs(device, 4), ["abc", "abc", "ac", "abc"])
    assert seen == [net.b.weight.shape] * 3


def test_any_default_dtype(net: Net, device: str) -> None:
    other = alone(net)
    images = inputs(device, 2)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        train(net, images)
    finally:
        torch.set_default_dtype(default)
    train(other, images)
    same(net, other)


@pytest.mark.parametrize(
    "change",
    [lambda net: net.to(memory_format=torch.channels_last), lambda net: net.double()],
    ids=["channels_last", "float64"],
)
def test_other_formats(net: Net, device: str, change: Any) -> None:
    give_affine(net.b)
    change(net)
    train_both(net, device, 3)


def test_inference_mode(device: str) -> None:
    """Also for a model created in inference mode."""
    with torch.inference_mode():
        net = standardize_together(Net().to(device))
        give_affine(net.b)
        (x,) = inputs(device, 1)
        torch.testing.assert_close(net(x), alone(net)(x))


@pytest.mark.parametrize("what", ["conv", "part"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first_all", [False, True])
def test_activation_checkpointing(
    device: str, kernels: str, reentrant: bool, what: str, first_all: bool
) -> None:
    """Of a conv in a part, or of a whole part; backward after each forward, or after all."""

    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.a(x)
            x = x + checkpoint(self.b, x, use_reentrant=reentrant)
            return (x + checkpoint(self.b, x, use_reentrant=reentrant) + self.c(x)).square().mean()

    part = standardize_together((Checkpointed if what == "conv" else Net)().to(device))
    other = alone(part)
    images = [x.requires_grad_() for x in inputs(device, 3)]
    for model in (part, other):
        losses = []
        for x in images:
            if what == "conv":
                losses.append(model(x))
            else:
                losses.append(checkpoint(model, x, use_reentrant=reentrant))
            if not first_all:
                losses.pop().backward()
        if first_all:  # an evaluation in between, as DefaultTrainer's hooks make it
            with torch.no_grad():
                model(images[0])
        for loss in losses:
            loss.backward()
    same(part, other)


def test_twice_differentiable(net: Net, device: str) -> None:
    give_affine(net.b)
    other = alone(net)
    (x,) = inputs(device, 1)
    for model in (net, other):
        weights = [model.a.weight, model.b.weight, model.c.weight]
        gradients = torch.autograd.grad(model(x), weights, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    same(net, other)


def test_copies(net: Net, device: str) -> None:
    """Also between forward and backward, and during a call, as evaluation may do it."""
    give_affine(net.b)
    images = inputs(device, 2)
    copies = [net]
    handle = net.b.norm.register_forward_hook(lambda *_: copies.append(copy.deepcopy(net)))
    loss = net(images[0])
    handle.remove()
    copies += [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.copy(net)]
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    loss.backward()
    net.zero_grad()
    other = alone(net)
    train(other, images)
    for each in copies[1:-2] + copies[-1:]:
        each.b.norm._forward_hooks.clear()
        assert type(each) is type(net) and each.a.weight is not net.a.weight
        train(each, images)
        same(each, other)
    # a copy of one conv does not drag the others along
    assert len(pickle.dumps(net.a)) < 0.5 * len(pickle.dumps(net))


def test_replaced_deleted_and_folded_convs(net: Net, device: str) -> None:
    train(net, inputs(device, 2))
    net.c = WSConv2d(4, 4, 3, padding=1, norm=nn.GroupNorm(2, 4)).to(device)
    del net.b
    net.calls = "ac"
    train_both(net, device, 2)


@pytest.mark.parametrize("parameters", [False, True])
def test_functional_weights(net: Net, device: str, parameters: bool) -> None:
    (x,) = inputs(device, 1)
    swapped = {n: p.detach().flip(0).requires_grad_() for n, p in net.named_parameters()}
    if parameters:
        swapped = {n: nn.Parameter(p) for n, p in swapped.items()}
    other = alone(net)
    other.load_state_dict(swapped)
    torch.testing.assert_close(torch.func.functional_call(net, swapped, (x,)), other(x))


def test_computed_weights_are_standardized_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They return a new tensor at every access."""
    launches = use_stand_in(monkeypatch)
    net = standardize_together(Net())
    torch.nn.utils.parametrizations.weight_norm(net.b)
    net(inputs("cpu", 1)[0])
    assert launches == [2, 1]


def test_weights_are_computed_no_more_often_than_alone(net: Net, device: str) -> None:
    """Spectral norm does a step of power iteration at every access."""
    torch.nn.utils.parametrizations.spectral_norm(net.b)
    other = alone(net)
    for model in (net, other):
        model(inputs(device, 1)[0])
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_parametrized_weights(net: Net, device: str) -> None:
    other = alone(net)
    (x,) = inputs(device, 1)
    for model in (net, other):
        torch.nn.utils.parametrizations.weight_norm(model.a)
        model(x).backward()
    same(net, other)


class Annotated(nn.Module):
    sizes: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.sizes = WSConv2d(4, 4, 1), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for size in self.sizes:
            x = x + size
        return self.conv(x)


def test_scripts_keep_the_annotations_of_a_class() -> None:
    (x,) = inputs("cpu", 1)
    part = standardize_together(Annotated())
    torch.testing.assert_close(torch.jit.script(part)(x), part(x))


def test_keeps_name_and_docs_of_its_class(net: Net, device: str) -> None:
    assert isinstance(net, Net) and repr(net) == repr(alone(net))
    assert type(net).__name__ == "Net" and standardize_together(net) is net
    assert type(standardize_alone(net)) is Net
    conv = WSConv2d(4, 4, 1)
    assert type(standardize_together(conv)) is WSConv2d


def test_scripted_traced_and_compiled(net: Net, device: str) -> None:
    give_affine(net.b)
    net.forward(inputs(device, 1)[0])
    part = standardize_together(nn.Sequential(net.a, net.b, net.c).to(device))
    (x,) = inputs(device, 1)
    expected = alone(part)(x)
    torch.testing.assert_close(torch.jit.script(part)(x), expected)
    torch.testing.assert_close(torch.jit.trace(part, x)(x), expected)
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def _train_on_two(rank: int, folder: str, device: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_stand_in(patch)
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
        for unused in (False, True):
            torch.manual_seed(0)
            net = standardize_together(Net())
            models = net, alone(net)
            images = torch.randn(4, 2, 1, 4, 5, 5)[:, rank]
            for model in models:
                wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                for number, x in enumerate(images):
                    model.calls = "ac" if unused and number == 2 else "abcb"
                    optimizer.zero_grad()
                    with wrapped.no_sync():
                        wrapped(x).backward()
                    wrapped(x).backward()
                    optimizer.step()
            same(*models)
            torch.save(net.state_dict(), f"{folder}/{unused}_{rank}.pth")
        dist.destroy_process_group()


@pytest.mark.skipif(INTERPRETED, reason="slow, and the same with a stand-in")
def test_distributed(tmp_path: Path) -> None:
    mp.spawn(_train_on_two, (str(tmp_path), "cpu"), nprocs=2)
    for unused in (False, True):
        first, second = (torch.load(tmp_path / f"{unused}_{rank}.pth") for rank in range(2))
        torch.testing.assert_close(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_record_torchs_kernels() -> None:
    net = standardize_together(Net().cuda())
    x = torch.randn(1, 4, 5, 5, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net(x).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = net(x)
        loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    x.copy_(torch.randn_like(x))
    graph.replay()
    other = alone(net)
    other.zero_grad()
    other(x).backward()
    same(net, other)


@pytest.mark.skipif(INTERPRETED, reason="the kernels are those of this run")
def test_the_same_with_the_real_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is installed with torch on Linux only")
    chosen = "launch or (stand-in and (left or formats or moves or settings))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        [*command, "-k", chosen],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:]
