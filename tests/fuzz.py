"""Changes small files at random: reading them must succeed or raise UserError, in time and memory.

    PYTHONPATH=. python tests/fuzz.py weights --minutes 2
    PYTHONPATH=. python tests/fuzz.py yaml --seed 7 --count 500 --keep failures

Each input is read in a child process with limits. A failure is printed with its number; the same
seed makes the same inputs. What failed once belongs into the tests.
"""

import argparse
import copy
import io
import itertools
import json
import pickle
import pickletools
import random
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from hostile_weights import all_files, safetensors, saved
from limited import Outcome, run_limited
from torch import nn

from ws_detectron.checkpoint import (
    METADATA_KEY,
    WeightMetadata,
    WSCheckpointer,
    WSForm,
    convert_file,
    describe_file,
    read_weight_file,
)
from ws_detectron.checkpoint.reading import check_finite, unwrap_state
from ws_detectron.engine import load_config
from ws_detectron.errors import UserError
from ws_detectron.evaluation.coco_eval import evaluate, load_annotations, load_predictions
from ws_detectron.evaluation.runs import read_run
from ws_detectron.lab.study import read_study

SECONDS, MEGABYTES = 5.0, 512
BATCH = 100

Random = random.Random
Change = Callable[[Random, bytes, list[bytes]], bytes]
ODD_BYTES = [b"", b"\x00", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\n", b"9" * 30, b"-1", b"\x1b[2J"]
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"),
    "", "1", "nan", "\x1b[2J", "\ud800", "x" * 10_000, [], [[]], [1], {}, {"a": 1}, {"counts": ""},
    {"size": [5, 5], "counts": "0"}, {"size": [2**31, 2**31], "counts": [2**62]}, [1e9] * 6,
    [[float("nan")] * 8], [[1.0] * 5], [0, 0, -5, 5],
]  # fmt: skip


def change_bytes(chance: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Flips, cuts, repeats, and parts of other files."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        start = chance.randrange(len(changed) + 1)
        end = min(start + chance.choice([1, 1, 2, 4, 8, 50]), len(changed))
        kind = chance.randrange(6)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[start:end]
        elif kind == 2:
            del changed[start:]
        elif kind == 3:
            changed[start:start] = changed[start:end] * chance.choice([1, 2, 100])
        elif kind == 4:
            other = chance.choice(corpus)
            at = chance.randrange(len(other) + 1)
            changed[start:end] = other[at : at + chance.choice([1, 8, 100])]
        else:
            changed[start:end] = chance.choice(ODD_BYTES)
    return bytes(changed)


def change_pickle(chance: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Opcodes removed, repeated, moved, and taken from other files; inside a zip file as well."""
    if data.startswith(b"PK"):
        return _change_archive(chance, data, corpus)
    ops = _opcodes(data)
    others = [other for other in corpus if not other.startswith(b"PK")]
    for _ in range(chance.choice([1, 1, 2, 3])):
        place, kind = chance.randrange(len(ops) + 1), chance.randrange(5)
        if kind == 0:
            del ops[place : place + 1]
        elif kind == 1:
            ops[place:place] = ops[place : place + chance.choice([1, 3])] * chance.choice([1, 30])
        elif kind == 2:
            ops.insert(place, chance.choice(ops or [b"."]))
        elif kind == 3:
            ops.insert(place, chance.choice(_opcodes(chance.choice(others)) or [b"."]))
        elif ops:
            at = chance.randrange(len(ops))
            ops[at] = ops[at][:1] + change_bytes(chance, ops[at][1:], corpus)
    return b"".join(ops)


def _opcodes(data: bytes) -> list[bytes]:
    """The opcodes of a pickle with their arguments; what cannot be parsed is the last."""
    starts = []
    try:
        starts = [position for *_, position in pickletools.genops(data) if position is not None]
        end = len(data)
    except Exception:
        end = len(data)
    return [data[start:stop] for start, stop in zip(starts, [*starts[1:], end])]


def _change_archive(chance: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """One entry changed, with its right checksum."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return change_bytes(chance, data, corpus)
    for name in list(entries):
        if name.endswith("data.pkl"):
            entries[name] = change_pickle(chance, entries[name], corpus)
        elif chance.random() < 0.1:
            entries[name] = change_bytes(chance, entries[name], corpus)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def change_words(chance: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Words of a text file moved, repeated and exchanged."""
    words = re.findall(rb"\w+|\s+|.", data) or [b""]
    others = re.findall(rb"\w+|\s+|.", chance.choice(corpus)) or [b""]
    tags = [b"!!python/tuple ", b"!!int ", b"&a ", b"*a", b"<<: ", b"? ", b"- ", b"[", b"{", b"\t"]
    for _ in range(chance.choice([1, 2, 4])):
        place, kind = chance.randrange(len(words)), chance.randrange(4)
        if kind == 0:
            words[place] = chance.choice(others)
        elif kind == 1:
            words.insert(place, chance.choice(tags) * chance.choice([1, 1, 60]))
        elif kind == 2:
            words[place] = json.dumps(chance.choice(ODD_VALUES)).encode("utf-8", "surrogatepass")
        else:
            del words[place : place + chance.choice([1, 5])]
            words = words or [b""]
    return b"".join(words)


def change_json(chance: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Values replaced by odd ones, removed, and copied to other places."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return change_words(chance, data, corpus)
    for _ in range(chance.choice([1, 1, 2, 4])):
        places = list(_places(content))
        if not places:
            break
        parent, key = chance.choice(places)
        kind = chance.randrange(4)
        if kind == 0 and isinstance(parent, dict):
            del parent[key]
        elif kind == 1:
            other, other_key = chance.choice(places)
            try:
                parent[key] = json.loads(json.dumps(other[other_key]))
            except (KeyError, IndexError):  # removed a moment ago
                continue
        elif kind == 2 and isinstance(parent, list):
            parent.append(json.loads(json.dumps(parent[key])))
        else:
            parent[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    try:
        return json.dumps(content).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer too long for Python to print
        return data


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(content, dict):
        items: Any = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    else:
        return
    for key, value in items:
        yield content, key
        yield from _places(value)


class Target(NamedTuple):
    """A kind of files.

    Attributes:
        files: that are changed.
        read: reads one as the tools do.
        changes: ways to change them.
        ending: of the file name.
    """

    files: Callable[[], dict[str, bytes]]
    read: Callable[[Path], Any]
    changes: tuple[Change, ...]
    ending: str


def weight_files() -> dict[str, bytes]:
    state = {"stem.conv1.weight": torch.ones(2, 2, 1, 1), "stem.conv1.norm.weight": torch.ones(2)}
    arrays = {key: value.numpy() for key, value in state.items()}
    full = {"model": state, "iteration": 3, "optimizer": {"state": {0: {"momentum": state}}}}
    blobs = {"conv1_w": np.ones((2, 3, 1, 1), "f4"), "res_conv1_bn_s": np.ones(2, "f4")}
    files = {f"pickle {p}": pickle.dumps({"model": arrays}, p) for p in range(6)}
    files |= {"caffe2": pickle.dumps({"blobs": blobs}, 2), "zip": saved(full)}
    # legacy files with one storage only, as their order is that of their addresses
    one = {"model": {"stem.conv1.weight": state["stem.conv1.weight"]}, "iteration": 3}
    metadata = WeightMetadata("timm-bit", ws_convs={"stem.conv1": WSForm("bit", 1e-8)}).as_dict()
    files["converted"] = saved({"model": state, METADATA_KEY: metadata})
    files |= {"legacy": saved(one, zipped=False), "state": saved(state)}
    entry = {"dtype": "F32", "shape": [2, 2, 1, 1], "data_offsets": [0, 16]}
    files["safetensors"] = safetensors({"stem.conv.weight": entry}, bytes(16))
    kernel, stored = "resnet/root_block/standardized_conv2d/kernel", io.BytesIO()
    np.savez(stored, **{kernel: np.ones((1, 1, 2, 2), "f4")})
    files["npz"] = stored.getvalue()
    for name, content in all_files().items():
        if len(content) < 5000 and "legacy" not in name:
            files[name] = content
    return files


def read_weights(path: Path) -> None:
    """Every way to a weight file; the first that refuses it does not end the others."""
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": nn.Conv2d(2, 2, 1)})})
    refused: list[UserError] = []
    ways: tuple[Callable[[], Any], ...] = (
        lambda: check_finite(unwrap_state(read_weight_file(path), str(path))[0], str(path)),
        lambda: convert_file(path, ws=True),
        lambda: convert_file(path, "detectron2", ws=True),
        lambda: describe_file(path),
        lambda: WSCheckpointer(model).load(str(path)),
    )
    for way in ways:
        try:
            way()
        except UserError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def yaml_files() -> dict[str, bytes]:
    text = Path(__file__).parents[1].joinpath("configs/quickstart").glob("*gn_ws.yaml")
    files = {path.name: path.read_bytes() for path in text}
    files["flow"] = b"A: &a {x: 1, y: [1.5, yes, null]}\nB: [*a, *a]\nC: {<<: *a, z: 2001-01-01}\n"
    files["config"] = b"MODEL:\n  WEIGHTS: ''\n  RPN: {IOU_LABELS: [0, -1, 1]}\nSEED: 1\nVERSION: 2"
    files["base"] = b"_BASE_: [other.yaml, other.yaml]\nSOLVER: {STEPS: (1, 2), BASE_LR: 1e-3}\n"
    files["tag"] = b"SEED: !!python/object/apply:eval ['1']\n"
    variants = {"bn": "a.yaml", "gn": {"config": "b.yaml", "overrides": {"SOLVER.BASE_LR": 0.1}}}
    study = {
        "variants": variants,
        "batches": [1, 2],
        "seeds": [1],
        "images": 8,
        "comparisons": [["gn", "bn"]],
    }
    files["study"] = yaml.safe_dump(study).encode()
    return files


def read_yaml_files(path: Path) -> None:
    """As a config, as a study, and as the config of a run, whose reading never fails."""
    path.with_name("other.yaml").write_text("SOLVER: {MAX_ITER: 5}\n")
    if path.name != "config.yaml":
        run = path.with_suffix("")
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_bytes(path.read_bytes())
        read_run(run, "run")
    try:
        read_study(path)
    except UserError:
        pass
    load_config(str(path))


def _coco() -> dict[str, Any]:
    square = [8.0, 8.0, 24.0, 8.0, 24.0, 24.0, 8.0, 24.0]
    annotations = [
        {"id": i, "image_id": 1 + i % 2, "category_id": 1 + i % 3, "bbox": [8, 8, 16, 16],
         "area": 256, "iscrowd": 0, "segmentation": [square]}
        for i in range(1, 5)
    ]  # fmt: skip
    annotations[-1]["segmentation"] = {"size": [32, 32], "counts": [264, 16, 744]}
    return {
        "images": [{"id": i, "width": 32, "height": 32, "file_name": f"{i}.png"} for i in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)],
    }


def _predictions() -> list[dict[str, Any]]:
    return [
        {"image_id": 1 + i % 2, "category_id": 1 + i % 3, "bbox": [8.0, 8.0, 16.0, 16.0],
         "score": 0.9, "segmentation": {"size": [32, 32], "counts": "Z88h0000000000000000000X>"}}
        for i in range(4)
    ]  # fmt: skip


def annotation_files() -> dict[str, bytes]:
    coco = _coco()
    boxes = {**coco, "annotations": [dict(a, segmentation=[]) for a in coco["annotations"]]}
    return {name: json.dumps(c).encode() for name, c in (("masks", coco), ("boxes", boxes))}


def read_annotations(path: Path) -> None:
    evaluate(load_annotations(path), _predictions(), annotations_name=str(path))


def prediction_files() -> dict[str, bytes]:
    boxes = [{k: v for k, v in p.items() if k != "segmentation"} for p in _predictions()]
    return {"masks": json.dumps(_predictions()).encode(), "boxes": json.dumps(boxes).encode()}


def read_predictions(path: Path) -> None:
    evaluate(_coco(), load_predictions(path), predictions_name=str(path))


TARGETS = {
    "weights": Target(weight_files, read_weights, (change_bytes, change_pickle), ".pth"),
    "yaml": Target(yaml_files, read_yaml_files, (change_bytes, change_words), ".yaml"),
    "annotations": Target(annotation_files, read_annotations, (change_bytes, change_json), ".json"),
    "predictions": Target(prediction_files, read_predictions, (change_bytes, change_json), ".json"),
}


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """The files themselves, then changed ones without end; the same for the same seed."""
    corpus = list(target.files().values())
    yield from corpus
    for number in itertools.count():
        chance = Random(f"{seed} {number}")
        yield chance.choice(target.changes)(chance, chance.choice(corpus), corpus)


def failures(target: Target, folder: Path, contents: list[bytes]) -> Iterator[Outcome]:
    """What neither succeeds nor is refused in one short message."""
    paths = [folder / f"{number}{target.ending}" for number in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    outcomes = run_limited(target.read, paths, seconds=SECONDS, megabytes=MEGABYTES)
    for outcome in outcomes:
        good = outcome.status == "done" or (
            outcome.status == "refused"
            and len(outcome.message) < 2000
            and outcome.message.replace("\n", "").isprintable()
        )
        if not good:
            yield outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--count", type=int, help="of inputs, instead of the minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where failing files are written")
    args = parser.parse_args()
    target, tried, kinds = TARGETS[args.target], 0, set()
    stream = inputs(target, args.seed)
    end = time.monotonic() + 60 * args.minutes
    while tried < args.count if args.count else time.monotonic() < end:
        contents = list(itertools.islice(stream, BATCH))
        with tempfile.TemporaryDirectory() as folder:
            for outcome in failures(target, Path(folder), contents):
                kind = (outcome.status, *outcome.message.strip().splitlines()[-3:])
                if kind in kinds:
                    continue
                kinds.add(kind)
                number = tried + outcome.index
                print(f"input {number}: {outcome.status}, {outcome.seconds:.1f} s")
                print("  " + "\n  ".join(outcome.message.strip().splitlines()[-8:]), flush=True)
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    name = f"{args.target}_{args.seed}_{number}{target.ending}"
                    (args.keep / name).write_bytes(contents[outcome.index])
        tried += len(contents)
    print(f"{args.target}: {tried} inputs, {len(kinds)} kinds of failures")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
