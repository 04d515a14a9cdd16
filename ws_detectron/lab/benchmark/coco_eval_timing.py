"""Times COCO evaluation by faster-coco-eval and by pycocotools, on the same data."""

from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

from ws_detectron.evaluation.coco_eval import TASKS, CocoResult, compute
from ws_detectron.evaluation.coco_files import load_annotations
from ws_detectron.evaluation.coco_report import TITLES

from .perturb import Perturbation, perturbed_predictions
from .timing import interleave

BACKENDS = ("faster-coco-eval", "pycocotools")


def enlarged(annotations: dict[str, Any], num_images: int) -> dict[str, Any]:
    """A COCO set of any size, which repeats the images of a small one in order, with new ids.

    Args:
        annotations: as returned by `load_annotations`.
        num_images: number of images of the new set.
    """
    images = annotations["images"]
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for annotation in annotations["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    copies: list[dict[str, Any]] = []
    copied_objects: list[dict[str, Any]] = []
    for number in range(1, num_images + 1):
        image = images[(number - 1) % len(images)]
        copies.append({**image, "id": number})
        for annotation in objects[image["id"]]:
            copied_objects.append({**annotation, "id": len(copied_objects) + 1, "image_id": number})
    return {**annotations, "images": copies, "annotations": copied_objects}


def measure_coco_eval(
    annotations: str, rounds: int, num_images: int = 5000, background: float = 30, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Times both evaluators, from annotations and predictions in memory to the metrics.

    Args:
        annotations: a COCO instances file, whose images are repeated under new ids.
        rounds: as for `interleave`.
        num_images: number of images to evaluate.
        background: mean number of predictions per image that are on no object.
        seed: seed of the predictions, see `perturbed_predictions`.

    Yields:
        For boxes, masks and both: `facts`, and `seconds` and `cpu_seconds`, name -> seconds of each
        round.
    """
    source = load_annotations(annotations)
    truth = enlarged(source, num_images)
    predictions = perturbed_predictions(truth, seed, Perturbation(background=background))
    seconds: dict[str, dict[str, list[float]]] = {}
    cpu: dict[str, dict[str, list[float]]] = {t: {name: [] for name in BACKENDS} for t in TASKS}
    results: dict[str, CocoResult] = {}
    difference = 0.0

    def evaluate(task: str, backend: str) -> None:
        start = process_time()
        reference = backend == "pycocotools"
        results[backend] = compute(truth, predictions, [task], reference=reference)
        cpu[task][backend].append(process_time() - start)

    for task in TASKS:
        actions = {name: lambda task=task, name=name: evaluate(task, name) for name in BACKENDS}
        seconds[task] = interleave(actions, rounds, 0, "cpu")
        difference = max(difference, largest_difference(*results.values()))
    facts = {
        "images": num_images,
        "objects": len(truth["annotations"]),
        "predictions": len(predictions),
        "source": f"{len(source['images'])} images of {Path(annotations).name}",
        "seed": seed,
        "largest_difference_in_percent": difference,
    }
    for task in (*TASKS, "both"):
        wall, used = (_sum(of) if task == "both" else of[task] for of in (seconds, cpu))
        facts_of_task = {"task": TITLES.get(task, task), **facts}
        yield {"facts": facts_of_task, "seconds": wall, "cpu_seconds": used}


def _sum(of_tasks: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Seconds of all tasks together, round by round."""
    tasks = of_tasks.values()
    return {name: [sum(r) for r in zip(*(task[name] for task in tasks))] for name in BACKENDS}


def largest_difference(one: CocoResult, other: CocoResult) -> float:
    """The largest difference of two results' metrics, including those by category, in %.

    Infinite if a metric is undefined in only one of them.
    """
    pairs = [
        (values[name], of_other[key][name])
        for of_one, of_other in _groups(one, other)
        for key, values in of_one.items()
        for name in values
    ]
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def _groups(one: CocoResult, other: CocoResult) -> Iterator[tuple[dict, dict]]:
    yield one.metrics, other.metrics
    for task, by_category in one.per_category.items():
        yield by_category, other.per_category[task]
