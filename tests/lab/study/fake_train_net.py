"""Stand-in for tools/train_net.py: takes its command line and writes the files of a training.

Box AP is 100 * (1 - |LR per image - 0.005| / 0.01) + seed, so that a search has something to find;
mask AP is half of it. A folder that holds a file `fail` ends it with an error, `die` kills it,
`hang` keeps it from ending, and `nothing` lets it detect nothing.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--resume", action="store_true")
parser.add_argument("--config-file")
parser.add_argument("--num-gpus", type=int, default=1)
parser.add_argument("--dist-url")
parser.add_argument("opts", nargs=argparse.REMAINDER)
args = parser.parse_args()
options = dict(zip(args.opts[::2], args.opts[1::2]))
folder = Path(options["OUTPUT_DIR"])
iterations, batch = int(options["SOLVER.MAX_ITER"]), int(options["SOLVER.IMS_PER_BATCH"])
with open(folder / "starts.txt", "a") as file:
    environ = {k: os.environ.get(k, "") for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    json.dump({"resume": args.resume, "processes": args.num_gpus, **environ}, file)
    file.write("\n")


def write(**row: float) -> None:
    with open(folder / "metrics.json", "a") as file:
        file.write(json.dumps(row) + "\n")


for iteration in range(iterations):
    write(iteration=iteration, total_loss=3 / (1 + iteration), time=0.25)
while (folder / "hang").exists():
    time.sleep(0.05)
if (folder / "die").exists():
    os.kill(os.getpid(), signal.SIGKILL)
if (folder / "fail").exists():
    print("error: training diverged at iteration 3: loss_mask is nan", file=sys.stderr)
    sys.exit(3)
if (folder / "refuse").exists():
    print("error: MODEL.DEVICE is 'cuda', but no CUDA device was found", file=sys.stderr)
    sys.exit(2)
ap = 100 * (1 - abs(float(options["SOLVER.BASE_LR"]) / batch - 0.005) / 0.01) + int(options["SEED"])
if (folder / "nothing").exists():
    write(iteration=iterations, **{"bbox/AP": float("nan")})
else:
    write(iteration=iterations, **{"bbox/AP": ap, "segm/AP": ap / 2})
for name in ("model_0000004", "model_final", "model_best"):
    (folder / f"{name}.pth").touch()
(folder / "last_checkpoint").write_text("model_final.pth")
record = {"starts": 1, "peak_memory_bytes": 2**30, "device": "a processor", "threads": 1}
record |= {"versions": {"torch": "2.11"}, "date": "2026-01-02"}
(folder / "run_record.json").write_text(json.dumps(record))
