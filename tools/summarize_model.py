"""What a model consists of, by part: parameters, what is frozen, WS convs, FLOPs, activations."""

import itertools
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from tabulate import tabulate

import ws_detectron.lab.scenes  # noqa: F401  registers the scenes_* data sets
from ws_detectron.engine import Trainer, load_config
from ws_detectron.engine.checks import check_datasets
from ws_detectron.engine.inference import load_model_for_inference
from ws_detectron.engine.lazy import load_lazy_config
from ws_detectron.errors import UserError, exit_on_user_error
from ws_detectron.modeling.summary import feature_stability, summarize, summary_line
from ws_detectron.utils.command_line import ToolParser, add_overrides, closing, overrides, within

EXAMPLES = """
examples:
  python tools/summarize_model.py \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_gn_ws_1img.yaml

  # of another model, for another image
  python tools/summarize_model.py --config-file <config> --size 512 512 MODEL.RESNETS.DEPTH 101

  # and how much of its features noise of 0.1 standard deviation leaves, on 8 test images
  python tools/summarize_model.py --config-file <run>/config.yaml --stability 8 \\
      MODEL.WEIGHTS <run>/model_final.pth
"""

NOTE = """
One image of {height} x {width} pixels on the CPU, with WS folded and as many boxes in the heads as
the config allows. FLOPs: multiply-adds, as fvcore counts them. Activations: outputs of convolutions
and linear layers, in 32 bits; a training keeps those of norm layers as well."""


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLES)
    parser.add_argument(
        "--config-file", required=True, help="path or name of a config, YAML or .py"
    )
    parser.add_argument(
        "--size", nargs=2, type=within(int, 1), metavar=("HEIGHT", "WIDTH"),
        help="of the image; default: 3:4 at INPUT.MIN_SIZE_TEST, or 800 for a LazyConfig",
    )  # fmt: skip
    parser.add_argument(
        "--stability", type=within(int, 1), metavar="IMAGES",
        help="also print how much of its features the backbone keeps under noise, on as many "
        "images of DATASETS.TEST; with random weights where MODEL.WEIGHTS is empty",
    )  # fmt: skip
    add_overrides(parser, device=False)
    args = parser.parse_args()
    with exit_on_user_error():
        short = 800
        if args.config_file.endswith(".py"):
            if args.stability:
                raise UserError("--stability reads DATASETS.TEST, which a LazyConfig has not")
            model = instantiate(load_lazy_config(args.config_file, overrides(args)).model)
        else:
            cfg = load_config(args.config_file, overrides(args))
            cfg.MODEL.DEVICE, short = "cpu", cfg.INPUT.MIN_SIZE_TEST
            torch.manual_seed(max(cfg.SEED, 0))
            model = Trainer.build_model(cfg)
        height, width = args.size or (short, short * 4 // 3)
        parts = summarize(model, height, width)
        cosines = stability(cfg, model, args.stability) if args.stability else {}
    columns = "part", "parameters", "frozen", "convs", "with WS", "GFLOPs", "activations, MiB"
    rows = [
        (p.part, f"{p.parameters:,}", f"{p.frozen:,}", p.convs, p.ws_convs, p.flops / 1e9,
         4 * p.activations / 2**20)
        for p in parts
    ]  # fmt: skip
    align = "left", *["right"] * 6
    print(tabulate(rows, columns, "github", floatfmt=",.1f", colalign=align))
    print(NOTE.format(height=height, width=width))
    if cosines:
        found = ", ".join(f"{stage} {cosine:.2f}" for stage, cosine in cosines.items())
        weights = cfg.MODEL.WEIGHTS or "random weights"
        print(f"\nFeatures kept under noise (cosine, {args.stability} images, {weights}): {found}")
    tool = "lazyconfig_train_net.py" if args.config_file.endswith(".py") else "train_net.py"
    train = [tool, "--config-file", args.config_file, *overrides(args)]
    print(closing(f"\nModel: {summary_line(model)}", {}, train))


def stability(cfg: CfgNode, model: Any, count: int) -> dict[str, float]:
    """Stage -> mean of `feature_stability` over the first images of DATASETS.TEST.

    Of `model` where MODEL.WEIGHTS is empty, else of those weights.
    """
    check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    model = load_model_for_inference(cfg) if cfg.MODEL.WEIGHTS else model.eval()
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    images = [image for batch in itertools.islice(loader, count) for image in batch]
    found = [feature_stability(backbone, model.preprocess_image([x]).tensor) for x in images]
    return {stage: sum(some[stage] for some in found) / len(found) for stage in found[0]}


if __name__ == "__main__":
    main()
