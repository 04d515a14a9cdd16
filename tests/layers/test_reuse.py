"""Kept and shared filters: computed once where that is safe, and never stale."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Optional

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ws_detectron.layers import (
    WSConv2d,
    reuse,
    standardize_once_per_forward,
    standardize_weight,
    ws_conv,
)

watched = pytest.mark.skipif(
    reuse._lazy_clone is None or reuse._data_address is None,
    reason="this torch has no copy-on-write clones, so nothing is kept",
)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shape of each weight that a conv standardizes, in order."""
    shapes: list[torch.Size] = []

    def counting(weight: torch.Tensor, eps: float, mode: str) -> torch.Tensor:
        shapes.append(weight.shape)
        return standardize_weight(weight, eps, mode)

    monkeypatch.setattr(ws_conv, "standardize_weight", counting)
    yield shapes


def frozen_conv(**kwargs: object) -> WSConv2d:
    conv = WSConv2d(4, 8, 3, **kwargs)
    conv.weight.requires_grad = False
    return conv


def expected(conv: WSConv2d, x: torch.Tensor) -> torch.Tensor:
    weight = standardize_weight(conv.weight.detach().clone(), conv.ws_eps, conv.ws_mode)
    return F.conv2d(x, weight, conv.bias)


@watched
def test_frozen_filters_are_standardized_once(computed: list) -> None:
    conv, x = frozen_conv(), torch.randn(1, 4, 5, 5, requires_grad=True)
    for _ in range(3):
        y = conv(x)
        torch.testing.assert_close(y, expected(conv, x))
        y.sum().backward()
    assert len(computed) == 1 and x.grad is not None and conv.weight.grad is None


@watched
def test_evaluation_standardizes_once_and_training_frees_it(computed: list) -> None:
    conv, x = WSConv2d(4, 8, 3).eval(), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        conv(x), conv(x)
    assert len(computed) == 1
    conv.train()
    with torch.no_grad():  # as precise BN does between two steps of training
        conv(x), conv(x)
    assert len(computed) == 3
    conv(x).sum().backward()
    assert "_filters" not in vars(conv) and conv.weight.grad is not None


def test_filters_kept_in_inference_mode_serve_training() -> None:
    conv, x = frozen_conv(), torch.randn(1, 4, 5, 5)
    with torch.inference_mode():
        conv(x)
    x.requires_grad_()
    conv(x).sum().backward()
    assert x.grad is not None


def copied_into(conv: WSConv2d) -> None:
    with torch.no_grad():
        conv.weight.copy_(torch.randn_like(conv.weight))


def data_in_place(conv: WSConv2d) -> None:
    conv.weight.data.uniform_()


def one_value_through_data(conv: WSConv2d) -> None:
    conv.weight.data[3, 2, 1, 0] += 1


def data_replaced(conv: WSConv2d) -> None:
    conv.weight.data = torch.randn_like(conv.weight)


def data_transposed(conv: WSConv2d) -> None:
    conv.weight.data = conv.weight.data.transpose(2, 3)


def parameter_replaced(conv: WSConv2d) -> None:
    conv.weight = nn.Parameter(torch.randn_like(conv.weight), requires_grad=False)


def numpy_view(conv: WSConv2d) -> None:
    conv.weight.detach().numpy()[0] = 1.5


def checkpoint_loaded(conv: WSConv2d) -> None:
    conv.load_state_dict({**conv.state_dict(), "weight": torch.randn_like(conv.weight)})


def checkpoint_assigned(conv: WSConv2d) -> None:
    conv.load_state_dict(
        {**conv.state_dict(), "weight": torch.randn_like(conv.weight)}, assign=True
    )
    conv.weight.requires_grad = False


def state_dict_edited(conv: WSConv2d) -> None:
    conv.state_dict()["weight"].zero_()


def eps_and_mode_changed(conv: WSConv2d) -> None:
    conv.ws_eps, conv.ws_mode = 0.5, "bit"


def moved_to_double(conv: WSConv2d) -> None:
    conv.double()


def written_and_kept_by_another(conv: WSConv2d) -> None:
    """Another conv with the same weight makes a copy-on-write clone of the new values."""
    other = frozen_conv()
    other.weight = conv.weight
    conv.weight.data.mul_(torch.rand_like(conv.weight))
    other(torch.randn(1, 4, 5, 5))


def unfrozen_and_trained(conv: WSConv2d) -> None:
    conv.weight.requires_grad = True
    (conv(torch.randn(1, 4, 5, 5)) ** 2).sum().backward()
    torch.optim.SGD([conv.weight], lr=1.0).step()
    conv.weight.requires_grad = False


@pytest.mark.parametrize(
    "change",
    [
        copied_into,
        data_in_place,
        one_value_through_data,
        data_replaced,
        data_transposed,
        parameter_replaced,
        numpy_view,
        checkpoint_loaded,
        checkpoint_assigned,
        state_dict_edited,
        eps_and_mode_changed,
        moved_to_double,
        written_and_kept_by_another,
        unfrozen_and_trained,
    ],
)
def test_kept_filters_are_never_stale(change: Callable[[WSConv2d], None]) -> None:
    conv, x = frozen_conv(), torch.randn(1, 4, 5, 5)
    earlier = conv(x)
    change(conv)
    x = x.to(conv.weight.dtype)
    y = conv(x)
    torch.testing.assert_close(y, expected(conv, x))
    assert not torch.allclose(y.float(), earlier) or change is moved_to_double
    assert y.dtype == conv.weight.dtype


def test_an_alias_from_before_is_watched_too() -> None:
    conv, x = frozen_conv(), torch.randn(1, 4, 5, 5)
    alias = conv.weight.data
    conv(x)
    alias.uniform_()
    torch.testing.assert_close(conv(x), expected(conv, x))


def test_unfreezing_alone_gives_gradients_again() -> None:
    conv, x = frozen_conv(), torch.randn(1, 4, 5, 5)
    conv(x)
    conv.weight.requires_grad = True
    conv(x).square().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.abs().sum() > 0


def test_copies_start_without_kept_filters() -> None:
    conv, x = frozen_conv(), torch.randn(1, 4, 5, 5)
    conv(x)
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    copies = [
        copy.deepcopy(conv),
        copy.copy(conv),
        pickle.loads(pickle.dumps(conv)),
        torch.load(file, weights_only=False),
    ]
    for duplicate in copies:
        torch.testing.assert_close(duplicate(x), conv(x))
    for duplicate in copies:
        with torch.no_grad():
            duplicate.weight.uniform_()
        torch.testing.assert_close(duplicate(x), expected(duplicate, x))
        torch.testing.assert_close(conv(x), expected(conv, x))
    assert "_filters" not in conv.state_dict()


@watched
def test_weights_that_cannot_be_watched_are_not_kept(computed: list) -> None:
    x = torch.randn(1, 4, 5, 5)
    flat = torch.randn(2, 8, 4, 3, 3)
    of_numpy = torch.from_numpy(torch.randn(8, 4, 3, 3).numpy().copy())
    file = io.BytesIO()
    torch.save(torch.randn(8, 4, 3, 3), file)
    file.seek(0)
    weights = [flat[1], of_numpy, torch.randn(8, 4, 3, 3).share_memory_(), torch.load(file)]
    for weight in weights:
        conv = frozen_conv()
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv(x)
        weight.uniform_()
        torch.testing.assert_close(conv(x), expected(conv, x))
    assert len(computed) == 2 * len(weights)


class SharedHead(nn.Module):
    """One conv on three levels, the middle one optionally under activation checkpointing."""

    def __init__(self, checkpointing: Optional[dict] = None) -> None:
        super().__init__()
        self.conv = WSConv2d(4, 4, 3, padding=1, norm=nn.GroupNorm(2, 4))
        self.checkpointing = checkpointing

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        first, second, third = levels
        if self.checkpointing is None:
            second = self.conv(second)
        else:
            second = checkpoint(self.conv, second, **self.checkpointing)
        return self.conv(first).sum() + (second**2).sum() + (self.conv(third) ** 3).sum()


def gradient(head: SharedHead, batches: list[list[torch.Tensor]], first_all: bool) -> torch.Tensor:
    """Of the sum over `batches`; `first_all` runs all forwards before the first backward."""
    head.zero_grad()
    if first_all:
        losses = [head(levels) for levels in batches]
        for loss in losses:
            loss.backward()
    else:
        for levels in batches:
            head(levels).backward()
    return head.conv.weight.grad.clone()


@pytest.mark.parametrize("first_all", [False, True])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_sharing_keeps_the_gradient(
    checkpointing: Optional[dict], first_all: bool, computed
) -> None:
    head = SharedHead(checkpointing).double()
    batches = [
        [torch.randn(2, 4, n, n, dtype=torch.float64, requires_grad=True) for n in (8, 4, 2)]
        for _ in range(2)
    ]
    alone = gradient(head, batches, first_all)
    per_call = len(computed)
    handles = standardize_once_per_forward(head)
    torch.testing.assert_close(gradient(head, batches, first_all), alone)
    assert len(computed) - per_call == (2 if checkpointing is None else per_call - 2)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(gradient(head, batches, first_all), alone)


def test_a_failing_forward_ends_the_sharing(computed: list) -> None:
    head = SharedHead()
    standardize_once_per_forward(head)
    with pytest.raises(ValueError):
        head([torch.randn(1, 4, 4, 4)])
    assert reuse.shared_filters() is None
    levels = [torch.randn(1, 4, n, n) for n in (8, 4, 2)]
    head(levels)
    with torch.no_grad():
        head.conv.weight.uniform_()
    loss = head(levels)
    assert len(computed) == 2
    torch.testing.assert_close(loss, copy.deepcopy(head)(levels))


class _Twice(nn.Module):
    """Calls a conv, lets somebody change it, and calls it again, in one forward."""

    def __init__(self, conv: WSConv2d, change: Callable[["_Twice"], None]) -> None:
        super().__init__()
        self.conv, self.change = conv, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.conv(x)
        self.change(self)
        return torch.stack([first, self.conv(x)])


def _as_often_written(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` at the version of `old`, so that the version does not tell them apart."""
    with torch.no_grad():
        while new._version < old._version:
            new.add_(0)
    assert new._version == old._version
    return new


def _another_parameter(model: _Twice) -> None:
    old = model.conv.weight
    new = nn.Parameter(old.detach().flip(1).square())
    _as_often_written(new, old)
    model.conv.weight = new


def _other_weights_for_a_call(model: _Twice) -> None:
    x = torch.ones(1, 4, 5, 5)
    weight = model.conv.weight
    swapped = _as_often_written(weight.detach().flip(0), weight).requires_grad_()
    other = {"weight": swapped, "bias": model.conv.bias}
    found = torch.func.functional_call(model.conv, other, (x,))
    wanted = standardize_weight(other["weight"], model.conv.ws_eps, model.conv.ws_mode)
    torch.testing.assert_close(found, F.conv2d(x, wanted, model.conv.bias))


@pytest.mark.parametrize("change", [_another_parameter, _other_weights_for_a_call])
@pytest.mark.parametrize("shared", [False, True])
def test_each_call_standardizes_the_weight_that_it_has(
    change: Callable[[_Twice], None], shared: bool
) -> None:
    torch.manual_seed(0)
    conv, x = WSConv2d(4, 8, 3), torch.randn(1, 4, 5, 5)
    before = expected(conv, x)
    model = _Twice(conv, change)
    if shared:
        standardize_once_per_forward(model)
    first, second = model(x)
    torch.testing.assert_close(first, before)
    torch.testing.assert_close(second, expected(conv, x))


@pytest.mark.parametrize("shared", [False, True])
def test_tied_weights_get_the_gradients_of_both_convs(shared: bool) -> None:
    torch.manual_seed(0)
    one, other, x = (
        WSConv2d(4, 4, 3),
        WSConv2d(4, 4, 3, bias=False),
        torch.randn(1, 4, 7, 7).double(),
    )
    other.weight = one.weight
    model = nn.Sequential(one, other).double()
    if shared:
        standardize_once_per_forward(model)
    model(x).square().sum().backward()
    assert one.weight.grad is not None
    found, one.weight.grad = one.weight.grad, None
    filters = standardize_weight(one.weight, one.ws_eps, one.ws_mode)
    F.conv2d(F.conv2d(x, filters, one.bias), filters).square().sum().backward()
    torch.testing.assert_close(found, one.weight.grad)
