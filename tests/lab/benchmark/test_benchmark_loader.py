"""The training loader beside detectron2's; times are not judged here."""

from pathlib import Path

from ws_detectron.lab.benchmark.train_loader import measure_loader


def test_both_loaders_load_the_same_number_of_images(coco_root: Path, monkeypatch) -> None:
    monkeypatch.setattr("ws_detectron.lab.benchmark.train_loader.IMAGES", 4)
    (part,) = measure_loader("cpu", rounds=2, warmup=0, batches=[2], short_side=32)
    assert {name: len(seconds) for name, seconds in part["seconds"].items()} == {
        "detectron2's": 2, "ours": 2
    }  # fmt: skip
    assert all(seconds > 0 for of in part["seconds"].values() for seconds in of)
    assert part["facts"]["images"] == 2 and part["facts"]["seeding_of_a_step_in_us"] > 0
