"""Makes scenes: small COCO-format data sets whose masks are exact to the pixel."""

import logging
from pathlib import Path

from detectron2.data import DatasetCatalog

from ws_detectron.errors import exit_on_user_error
from ws_detectron.evaluation.inputs import write_image
from ws_detectron.lab.scenes import SceneSpec, ensure_scenes, register_scenes
from ws_detectron.lab.scenes.dataset import contact_sheet, summarize
from ws_detectron.lab.scenes.scene import KINDS, SPLITS
from ws_detectron.utils.command_line import ToolParser, closing, within
from ws_detectron.utils.io import check_folder, refuse_overwrite

EXAMPLE = """example:
  python tools/make_scenes.py --kind shapes --image-size 128 --preview scenes.png

By default the scenes are written to the cache ($WS_DETECTRON_CACHE, else ~/.cache/ws_detectron),
where the data sets scenes_<kind>_<size>_<split> are read.
"""
PREVIEW_IMAGES = 12


def main() -> None:
    parser = ToolParser(__doc__, EXAMPLE)
    parser.add_argument("--kind", choices=KINDS, default="shapes", help="type of the objects")
    parser.add_argument("--image-size", type=int, default=128, help="height and width, pixels")
    parser.add_argument("--train", type=int, help="training images; default: by size; 0: none")
    parser.add_argument("--val", type=int, help="validation images; default: by size; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--objects", type=int, nargs=2, metavar=("LEAST", "MOST"), help="per image")
    scale, ends = "longer side of an object as a share of the image size", ("LEAST", "MOST")
    parser.add_argument("--object-scale", type=float, nargs=2, metavar=ends, help=scale)
    parser.add_argument("--min-visible", type=float, help="least visible share of an object")
    parser.add_argument("--output", metavar="DIR", help="root folder of the data sets")
    parser.add_argument("--workers", type=within(int, 1), default=1, help="processes")
    parser.add_argument("--preview", metavar="PNG", help="picture of the first annotated images")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fields = ("seed", "objects", "object_scale", "min_visible")
    changes = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    specs = []
    for split, count in zip(SPLITS, (args.train, args.val)):
        counted = changes if count is None else {**changes, "num_images": count}
        if count != 0:
            specs.append(SceneSpec.for_size(args.kind, args.image_size, split, **counted))
    if args.preview:
        check_folder(Path(args.preview).parent)
    for spec in specs:
        print(summarize(ensure_scenes(spec, args.output, args.workers)))
    if args.preview and specs:
        register_scenes("scenes_preview", specs[0], args.output)
        records = DatasetCatalog.get("scenes_preview")
        refuse_overwrite(args.preview, [record["file_name"] for record in records])
        records = records[:PREVIEW_IMAGES]
        write_image(Path(args.preview), contact_sheet("scenes_preview", records))
    names = [f"('scenes_{args.kind}_{args.image_size}_{split}',)" for split in SPLITS]
    data = ["DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1]]
    then = "docs/data.md has the config that names a data set in a folder of yours"
    print(
        closing(
            f"made {sum(spec.num_images for spec in specs)} images of {args.kind}",
            {"preview": args.preview} if args.preview and specs else {},
            then if args.output else ["train_net.py", "--config-file", "<config>", *data],
        )
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
