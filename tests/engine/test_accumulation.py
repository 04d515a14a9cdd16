"""Gradient accumulation: what it equals, and that an iteration is still one optimizer step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import exhaustive
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.accumulation import accumulated_step
from ws_detectron.engine.loaders import build_train_loader
from ws_detectron.errors import ConfigError


def detector_gradients(variant: str, parts: int) -> dict[str, torch.Tensor]:
    """Gradients of four images in equal parts; 1: detectron2's own step."""
    model, images = exhaustive.model(variant), exhaustive.images(4)
    loader = [images[i : i + 4 // parts] for i in range(0, 4, 4 // parts)]
    loop = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.0))
    with EventStorage():
        if parts == 1:
            loop.run_step()
        else:
            accumulated_step(loop, parts)
    return exhaustive.gradients(model)


def test_with_gn_and_ws_parts_are_the_batch() -> None:
    found, expected = detector_gradients("gn_ws", 4), detector_gradients("gn_ws", 1)
    assert len(expected) > 100
    assert exhaustive.distance(found, expected) < 1e-5


def test_with_bn_they_are_not() -> None:
    found, expected = detector_gradients("bn", 4), detector_gradients("bn", 1)
    assert exhaustive.distance(found, expected) > 0.1


class Squares(nn.Module):
    """Loss (w - mean of the batch)² for each of two losses, and a counter in the storage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: list[float]) -> dict[str, torch.Tensor]:
        get_event_storage().put_scalar("images", len(batch))
        mean = torch.tensor(batch).mean()
        return {"a": (self.weight - mean) ** 2, "b": 3 * (self.weight - mean) ** 2}


def step(
    batches: list[list[float]], loss: type[Squares] = Squares, **clipping: object
) -> tuple[float, EventStorage]:
    """The weight after one step of LR 1 from 1.0, and what was logged at iteration 7."""
    model = loss()
    cfg = load_config("", [w for pair in clipping.items() for w in pair])
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(model.parameters(), lr=1.0)
    loop = SimpleTrainer(model, batches, optimizer)
    loop.iter = 7
    with EventStorage(7) as storage:
        accumulated_step(loop, len(batches))
    return model.weight.item(), storage


def test_gradient_is_that_of_the_mean_loss_and_losses_are_means() -> None:
    # d/dw of (w-m)² + 3 (w-m)² at w = 1 is 8 (1 - m): -8 at m = 2, -24 at m = 4; mean -16
    weight, storage = step([[2.0], [4.0]])
    assert weight == pytest.approx(1 + 16)
    logged = {name: value for name, (value, _) in storage.latest().items()}
    # (1-2)² = 1 and (1-4)² = 9: mean 5
    assert (logged["a"], logged["b"], logged["total_loss"]) == (5, 15, 20)
    assert {iteration for _, iteration in storage.latest().values()} == {7}
    assert all(len(history.values()) == 1 for history in storage.histories().values())


def test_the_sum_is_clipped_and_not_the_parts() -> None:
    """Parts of -8 and 24 have the mean 8; each clipped to 1 before, they would cancel out."""
    options = {
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    }
    weight, _ = step([[2.0], [-2.0]], **options)
    assert weight == pytest.approx(1 - 1, abs=1e-5)


def test_not_finite_is_said() -> None:
    with pytest.raises(FloatingPointError):
        step([[2.0], [float("nan")]])


class Scaled(SimpleTrainer):
    """A loop as AMPTrainer, which wants CUDA, leaves it: with a gradient scaler."""

    precision = torch.bfloat16

    def __init__(self, model: nn.Module, batches: list, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, batches, optimizer)
        self.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch has no scaler for the CPU")
def test_amp_runs_the_model_in_low_precision_and_unscales_once() -> None:
    model = Squares()
    loop = Scaled(model, [[2.0], [4.0]], torch.optim.SGD(model.parameters(), lr=1.0))
    kinds: list[torch.dtype] = []
    linear = nn.Linear(1, 1)
    model.register_forward_hook(lambda *_: kinds.append(linear(torch.ones(1)).dtype))
    with EventStorage():
        accumulated_step(loop, 2)
    assert model.weight.item() == pytest.approx(1 + 16)
    assert loop.grad_scaler.get_scale() == 2048  # updated once: it doubles at each update
    assert kinds == [torch.bfloat16] * 2


class MainLoop(SimpleTrainer):
    """With what the loops of detectron2's main branch have, each of which notes its turn."""

    def __init__(self, model: nn.Module, batches: list, **options: bool) -> None:
        super().__init__(model, batches, torch.optim.SGD(model.parameters(), lr=1.0))
        self.turns: list[object] = []
        self.zero_grad_before_forward = options.get("zero_grad_before_forward", False)
        self.async_write_metrics = options.get("async_write_metrics", False)
        self.log_grad_scaler = False
        self.concurrent_executor = self
        self.iter = 7
        model.register_forward_pre_hook(lambda *_: self.turns.append("forward"))
        zero_grad, take_step = self.optimizer.zero_grad, self.optimizer.step
        self.optimizer.zero_grad = lambda: (self.turns.append("zero_grad"), zero_grad())
        self.optimizer.step = lambda: (self.turns.append("step"), take_step())

    def submit(self, write: Callable, *args: object, **kwargs: object) -> None:
        self.turns.append("submit")
        write(*args, **kwargs)

    def after_backward(self) -> None:
        gradients = [parameter.grad.item() for parameter in self.model.parameters()]
        self.turns.append(("after_backward", gradients))

    def _write_metrics(
        self, losses: dict, data_time: float, prefix: str = "", iter: Optional[int] = None
    ) -> None:
        self.turns.append(("write", sorted(losses), iter))


@pytest.mark.parametrize("zero_first", [True, False])
@pytest.mark.parametrize("in_thread", [True, False])
def test_what_the_main_branch_calls_in_a_step_is_called(zero_first: bool, in_thread: bool) -> None:
    model = Squares()
    model.weight.grad = torch.tensor(5.0)  # of an earlier step
    options = {"zero_grad_before_forward": zero_first, "async_write_metrics": in_thread}
    loop = MainLoop(model, [[2.0], [4.0]], **options)
    with EventStorage(7):
        accumulated_step(loop, 2)
    start = ["zero_grad", "forward"] if zero_first else ["forward", "zero_grad"]
    write = ["submit", ("write", ["a", "b"], 7)] if in_thread else [("write", ["a", "b"], None)]
    assert loop.turns == [*start, "forward", ("after_backward", [-16.0]), *write, "step"]


def test_a_loss_that_only_some_parts_have_is_zero_in_the_others() -> None:
    class Sometimes(Squares):
        def forward(self, batch: list[float]) -> dict[str, torch.Tensor]:
            losses = super().forward(batch)
            if batch[0] == 4.0:
                del losses["b"]
            return losses

    for batches in ([[2.0], [4.0]], [[4.0], [2.0]]):
        weight, storage = step(batches, Sometimes)
        # d/dw of ((w-2)² + 3 (w-2)² + (w-4)²) / 2 at w = 1 is (-2 - 6 - 6) / 2
        assert weight == pytest.approx(1 + 7)
        logged = {name: value for name, (value, _) in storage.latest().items()}
        assert (logged["a"], logged["b"], logged["total_loss"]) == (5, 1.5, 6.5)


def file_names(accumulate: int, batches: int) -> list[str]:
    cfg = load_config("quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml")
    cfg.DATASETS.TRAIN = ("scenes_shapes_128_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 4
    cfg.SOLVER.ACCUMULATE_STEPS = accumulate
    cfg.freeze()
    loader = iter(build_train_loader(cfg))
    parts = [[image["file_name"] for image in next(loader)] for _ in range(batches)]
    assert {len(part) for part in parts} == {4 // accumulate}
    return [name for part in parts for name in part]


def test_parts_hold_the_images_of_the_batch() -> None:
    assert file_names(2, 4) == file_names(1, 2)


def test_a_batch_that_makes_no_equal_parts_is_refused(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SOLVER.IMS_PER_BATCH = 4
    tiny_cfg.SOLVER.ACCUMULATE_STEPS = 3
    with pytest.raises(ConfigError, match="SOLVER.ACCUMULATE_STEPS is 3"):
        Trainer(tiny_cfg)


def test_a_loader_that_gives_whole_batches_is_refused(tiny_cfg: CfgNode) -> None:
    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> list:
            return [[{}] * 4] * 10

    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.ACCUMULATE_STEPS = 4, 2
    with pytest.raises(ConfigError, match="gives 4 images at once, not 2; build it with"):
        Own(tiny_cfg).train()


def test_losses_of_shape_1_and_of_no_shape_are_added() -> None:
    class Mixed(Squares):
        def forward(self, batch: list[float]) -> dict[str, torch.Tensor]:
            losses = super().forward(batch)
            return {"a": losses["a"].reshape(1), "b": losses["b"]}

    weight, _ = step([[2.0], [4.0]], Mixed)
    assert weight == pytest.approx(1 + 16)  # as above


def test_training_counts_optimizer_steps(tiny_cfg: CfgNode) -> None:
    """Two steps of two parts: two iterations in metrics and schedule, four batches in the model."""
    tiny_cfg.SOLVER.IMS_PER_BATCH = 4
    tiny_cfg.SOLVER.ACCUMULATE_STEPS = 2
    tiny_cfg.SOLVER.WARMUP_ITERS = 0
    tiny_cfg.SOLVER.STEPS = (1,)
    tiny_cfg.DATASETS.TEST = ()
    trainer = Trainer(tiny_cfg)
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.train()
    assert seen == [2, 2, 2, 2]
    assert trainer.scheduler.last_epoch == 2
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)
    lines = (Path(tiny_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 1
