"""Two CPU processes against one: gradients, and how often they are exchanged."""

import os
import subprocess
import sys
from pathlib import Path

import exhaustive
import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

SCRIPT = """
import sys
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from ws_detectron.engine import launch
from ws_detectron.engine.accumulation import accumulated_step
from ws_detectron.engine.hooks import share_statistics
import exhaustive

def main(path):
    found = {}
    for variant, parts in (("bn", 1), ("gn_ws", 2)):
        model = exhaustive.model(variant)
        model = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
        exchanges = []
        def counting(state, bucket):
            exchanges.append(bucket.is_last())
            mean = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return mean.then(lambda future: future.value()[0] / 2)
        model.register_comm_hook(None, counting)
        loader = [[image] for image in exhaustive.images(2 * parts)[comm.get_rank()::2]]
        loop = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.0))
        with EventStorage():
            accumulated_step(loop, parts)
        found[variant, parts] = exhaustive.gradients(model.module), sum(exchanges)
    torch.manual_seed(comm.get_rank())
    norm = torch.nn.BatchNorm2d(2, momentum=1.0)  # keeps the statistics of its last batch
    batch = torch.randn(4, 2, 3, 3) * (1 + comm.get_rank()) + 3 * comm.get_rank()
    norm(batch)
    share_statistics(torch.nn.Sequential(norm))
    place = comm.get_rank(), comm.get_local_rank(), comm.get_world_size()
    found["ranks"] = comm.all_gather(place)
    found["statistics"] = comm.all_gather((batch, norm.running_mean, norm.running_var))
    if comm.is_main_process():
        torch.save(found, path)

if __name__ == "__main__":
    launch(main, 2, device="cpu", dist_url="auto", args=(sys.argv[1],))
"""


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """(variant, images per process) -> gradients, exchanges of the whole model."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "job.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "job.py", str(folder / "gradients.pth")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "gradients.pth", weights_only=True)


def of_one_process(variant: str, images: int) -> dict[str, torch.Tensor]:
    model = exhaustive.model(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with EventStorage():
        SimpleTrainer(model, [exhaustive.images(images)], optimizer).run_step()
    return exhaustive.gradients(model)


def test_each_process_has_its_rank(of_two_processes: dict) -> None:
    assert of_two_processes["ranks"] == [(0, 0, 2), (1, 1, 2)]


def test_with_gn_and_ws_processes_and_parts_are_one_batch(of_two_processes: dict) -> None:
    """2 processes x 2 parts x 1 image against 1 x 4 images; gradients are exchanged once."""
    found, exchanges = of_two_processes["gn_ws", 2]
    assert exhaustive.distance(found, of_one_process("gn_ws", 4)) < 1e-5
    assert exchanges == of_two_processes["bn", 1][1] == 1


def test_with_bn_they_are_not(of_two_processes: dict) -> None:
    found, _ = of_two_processes["bn", 1]
    assert exhaustive.distance(found, of_one_process("bn", 2)) > 0.1


def test_processes_share_the_statistics_of_all_their_images(of_two_processes: dict) -> None:
    batches, means, variances = zip(*of_two_processes["statistics"])
    pixels = torch.cat(batches)
    for mean, variance in zip(means, variances):
        torch.testing.assert_close(mean, pixels.mean((0, 2, 3)))
        # BN keeps each process' unbiased variance, of 36 values: v_r * 36/35
        between = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).var(0, unbiased=False)
        within = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
        torch.testing.assert_close(variance, within + between)
