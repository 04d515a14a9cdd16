"""Patches that make the Python files of detectron2 v0.5 run today, without compiled ops.

`wheel.py` applies them to the unpacked source. Each patch gives its reason and how often its text
occurs; another count means that the source is not the expected one, and stops the installation.
"""

from dataclasses import dataclass
from pathlib import Path


class PatchError(Exception):
    """A patch that does not fit the source tree."""


@dataclass(frozen=True)
class Patch:
    """Replaces all `count` occurrences of `old` in `file` with `new`.

    An empty `old` creates a new file.
    """

    name: str
    file: str  # relative to the folder that holds the package `detectron2`
    reason: str
    old: str
    new: str
    count: int = 1

    def apply(self, root: Path) -> None:
        """Patches the file below `root`.

        Raises:
            PatchError: the file is missing, already exists (new file), or does not contain the old
                text exactly `count` times.
        """
        path = root / self.file
        if not self.old:
            if path.exists():
                raise PatchError(f"patch {self.name}: {self.file} already exists")
            path.write_bytes(self.new.encode("utf-8"))
            return
        if not path.is_file():
            raise PatchError(f"patch {self.name}: no file {self.file}")
        text = path.read_bytes().decode("utf-8")
        found = text.count(self.old)
        if found != self.count:
            raise PatchError(
                f"patch {self.name}: {self.file} contains the text to replace {found} times, "
                f"expected {self.count}: {self.old!r}"
            )
        path.write_bytes(text.replace(self.old, self.new).encode("utf-8"))


_PLACEHOLDER = '''\
"""Stands in for detectron2's compiled ops, which this pure-Python build does not have."""


def __getattr__(name):
    # The import system, inspect and copy probe modules for special names such as __path__.
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise NotImplementedError(
        f"detectron2._C.{name} is a compiled op, and this is a pure-Python build of detectron2 "
        "(0.5+purepy). Rotated boxes, deformable convolution and the fast COCO evaluator need a "
        "compiled detectron2: "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
    )
'''

_NUMPY_ALIASES = "NumPy 1.24 removed the aliases of Python's own types"
_MESHGRID = "torch warns at every call without `indexing`, and the default is to change"

PATCHES = (
    Patch(
        name="compiled-ops-placeholder",
        file="detectron2/_C.py",
        reason="modules that import _C must import; calling a missing op must say what is missing",
        old="",
        new=_PLACEHOLDER,
    ),
    Patch(
        name="coco-evaluator-default",
        file="detectron2/evaluation/coco_evaluation.py",
        reason="the fast evaluator is compiled; fall back as detectron2 0.6 does without it",
        old="        self._use_fast_impl = use_fast_impl\n",
        new=(
            "        if use_fast_impl:\n"
            '            self._logger.info("Fast COCO eval is not built, using pycocotools.")\n'
            "        self._use_fast_impl = False\n"
        ),
    ),
    Patch(
        name="coco-evaluation-default",
        file="detectron2/evaluation/coco_evaluation.py",
        reason="as above, for direct callers of the function",
        old="kpt_oks_sigmas=None, use_fast_impl=True, img_ids=None",
        new="kpt_oks_sigmas=None, use_fast_impl=False, img_ids=None",
    ),
    Patch(
        name="collect-env-without-ops",
        file="detectron2/utils/collect_env.py",
        reason="default_setup() prints this report, which asks _C for its compiler",
        old=(
            "        import detectron2._C as _C\n"
            "    except ImportError as e:\n"
            '        data.append(("detectron2._C", f"not built correctly: {e}"))\n'
        ),
        new=(
            "        import detectron2._C as _C\n"
            "\n"
            "        _C.get_compiler_version()\n"
            "    except NotImplementedError:\n"
            '        data.append(("detectron2._C", "not built: pure-Python build"))\n'
            "    except ImportError as e:\n"
            '        data.append(("detectron2._C", f"not built correctly: {e}"))\n'
        ),
    ),
    Patch(
        name="pillow-linear",
        file="detectron2/data/transforms/transform.py",
        reason="Pillow 10 removed Image.LINEAR, the old name of BILINEAR",
        old="interp=Image.LINEAR",
        new="interp=Image.BILINEAR",
    ),
    Patch(
        name="caffe2-optional",
        file="detectron2/export/__init__.py",
        reason="torch 2 has no caffe2; tracing and scripting do not need it (as detectron2 0.6)",
        old="from .api import *\n",
        new=(
            "try:\n"
            "    from caffe2.proto import caffe2_pb2 as _caffe2_pb2\n"
            "except ImportError:\n"
            "    pass\n"
            "else:\n"
            "    from .api import *\n"
        ),
    ),
    Patch(
        name="lr-scheduler-base-class",
        file="detectron2/engine/hooks.py",
        reason=(
            "torch 2 schedulers derive from LRScheduler; as _LRScheduler they are not recognized, "
            "their state is not saved, and a resumed run restarts them from 0"
        ),
        old="isinstance(self.scheduler, torch.optim.lr_scheduler._LRScheduler)",
        new="isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler)",
        count=2,
    ),
    Patch(
        name="model-zoo-import",
        file="detectron2/model_zoo/model_zoo.py",
        reason="setuptools 82 removed pkg_resources",
        old="import pkg_resources\n",
        new="",
    ),
    Patch(
        name="model-zoo-path",
        file="detectron2/model_zoo/model_zoo.py",
        reason="setuptools 82 removed pkg_resources",
        old=(
            "pkg_resources.resource_filename(\n"
            '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
            "    )\n"
        ),
        new='os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)\n',
    ),
    Patch(
        name="meshgrid-anchors",
        file="detectron2/modeling/anchor_generator.py",
        reason=_MESHGRID,
        old="torch.meshgrid(shifts_y, shifts_x)",
        new='torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
    Patch(
        name="meshgrid-panoptic-deeplab",
        file="detectron2/projects/panoptic_deeplab/post_processing.py",
        reason=_MESHGRID,
        old="        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n",
        new=(
            "        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n"
            '        indexing="ij",\n'
        ),
    ),
    Patch(
        name="numpy-voc-evaluation",
        file="detectron2/evaluation/pascal_voc_evaluation.py",
        reason=_NUMPY_ALIASES,
        old="R]).astype(np.bool)",
        new="R]).astype(bool)",
        count=2,
    ),
    Patch(
        name="numpy-sem-seg-int",
        file="detectron2/evaluation/sem_seg_evaluation.py",
        reason=_NUMPY_ALIASES,
        old="dtype=np.int)",
        new="dtype=int)",
        count=2,
    ),
    Patch(
        name="numpy-sem-seg-float",
        file="detectron2/evaluation/sem_seg_evaluation.py",
        reason=_NUMPY_ALIASES,
        old="np.float)",
        new="float)",
        count=5,
    ),
    Patch(
        name="numpy-masks",
        file="detectron2/structures/masks.py",
        reason=_NUMPY_ALIASES,
        old="np.bool)",
        new="bool)",
        count=2,
    ),
    Patch(
        name="numpy-voc-dataset",
        file="detectron2/data/datasets/pascal_voc.py",
        reason=_NUMPY_ALIASES,
        old="dtype=np.str)",
        new="dtype=str)",
    ),
    Patch(
        name="numpy-class-histogram",
        file="detectron2/data/build.py",
        reason=_NUMPY_ALIASES,
        old="dtype=np.int)",
        new="dtype=int)",
    ),
    Patch(
        name="numpy-class-ids",
        file="detectron2/data/build.py",
        reason=_NUMPY_ALIASES,
        old="dtype=np.int\n",
        new="dtype=int\n",
    ),
    Patch(
        name="numpy-visualizer",
        file="detectron2/utils/visualizer.py",
        reason=_NUMPY_ALIASES,
        old="astype(np.bool)",
        new="astype(bool)",
        count=3,
    ),
    Patch(
        name="numpy-video-visualizer",
        file="detectron2/utils/video_visualizer.py",
        reason=_NUMPY_ALIASES,
        old="dtype=np.bool)",
        new="dtype=bool)",
    ),
    Patch(
        name="panopticapi-import",
        file="detectron2/projects/panoptic_deeplab/dataset_mapper.py",
        reason="panopticapi is on no registry; the model must import without it",
        old="from panopticapi.utils import rgb2id\n",
        new="",
    ),
    Patch(
        name="panopticapi-use",
        file="detectron2/projects/panoptic_deeplab/dataset_mapper.py",
        reason="as above: imported where panoptic ground truth is read",
        old="        # Generates training targets for Panoptic-DeepLab.\n",
        new=(
            "        from panopticapi.utils import rgb2id\n"
            "\n"
            "        # Generates training targets for Panoptic-DeepLab.\n"
        ),
    ),
    Patch(
        name="rotated-nms-error",
        file="detectron2/layers/nms.py",
        reason="this compiled op is not called through _C; let it fail as clearly as the others",
        old="    return torch.ops.detectron2.nms_rotated(boxes, scores, iou_threshold)\n",
        new=(
            "    from detectron2 import _C\n"
            "\n"
            "    return _C.nms_rotated(boxes, scores, iou_threshold)\n"
        ),
    ),
    Patch(
        name="gather-bytes",
        file="detectron2/utils/comm.py",
        reason="torch 2 deprecates typed storages and warns in every process that gathers results",
        old=(
            "    storage = torch.ByteStorage.from_buffer(buffer)\n"
            "    tensor = torch.ByteTensor(storage).to(device=device)\n"
        ),
        new=(
            "    tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8)\n"
            "    tensor = tensor.to(device=device)\n"
        ),
    ),
    Patch(
        name="annotated-boxes",
        file="detectron2/data/detection_utils.py",
        reason="torch warns, rightly, that making a tensor of a list of arrays is slow",
        old="    target.gt_boxes = Boxes(boxes)\n",
        new="    target.gt_boxes = Boxes(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))\n",
    ),
    Patch(
        name="profiler-saves-once",
        file="detectron2/engine/hooks.py",
        reason="torch 2 can save a trace only once: TensorBoard's copy or the one in output_dir",
        old=(
            "        self._profiler.__exit__(None, None, None)\n"
            "        PathManager.mkdirs(self._output_dir)\n"
            "        out_file = os.path.join(\n"
            '            self._output_dir, "profiler-trace-iter'
        ),
        new=(
            "        self._profiler.__exit__(None, None, None)\n"
            '        if getattr(self, "_save_tensorboard", False):\n'
            "            return\n"
            "        PathManager.mkdirs(self._output_dir)\n"
            "        out_file = os.path.join(\n"
            '            self._output_dir, "profiler-trace-iter'
        ),
    ),
    Patch(
        name="clip-without-gradient",
        file="detectron2/solver/build.py",
        reason="torch 2.11 cannot clip the values of a parameter that got no gradient in a step",
        old=(
            '                for p in group["params"]:\n                    per_param_clipper(p)\n'
        ),
        new=(
            '                for p in group["params"]:\n'
            "                    if p.grad is not None:\n"
            "                        per_param_clipper(p)\n"
        ),
    ),
)
