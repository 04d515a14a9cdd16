"""Run folders as training leaves them: metrics by detectron2's own writer, config by its dump."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from detectron2.utils.events import EventStorage, JSONWriter

from ws_detectron.engine import load_config

QUICKSTART = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"


def write_run(
    folder: Path,
    *,
    top: float = 60.0,
    seconds: float = 0.5,
    iterations: Sequence[range] = (range(100),),
    options: Sequence[str] = (),
    evaluate_every: Optional[int] = 50,
) -> Path:
    """A run with a row each 20 iterations, in as many starts as there are ranges.

    The loss falls as 3 / (1 + iteration / 20), box AP rises to `top` at iteration 100.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cfg = load_config(QUICKSTART, ["OUTPUT_DIR", str(folder), *options])
    (folder / "config.yaml").write_text(cfg.dump())
    for start in iterations:
        writer = JSONWriter(str(folder / "metrics.json"))
        with EventStorage(start.start) as storage:
            for iteration in start:
                storage.iter = iteration
                storage.put_scalars(total_loss=3 / (1 + iteration / 20), time=seconds)
                last = iteration == start.stop - 1
                if evaluate_every and ((iteration + 1) % evaluate_every == 0 or last):
                    ap = top * (iteration + 1) / 100
                    figures = {"AP": ap, "AP50": ap + 10, "APl": float("nan"), "AP-star": ap}
                    for task, factor in (("bbox", 1.0), ("segm", 0.5)):
                        scaled = {f"{task}/{k}": factor * v for k, v in figures.items()}
                        storage.put_scalars(**scaled, smoothing_hint=False)
                if (iteration + 1) % 20 == 0 or last:
                    writer.write()
        writer.close()
    return folder
