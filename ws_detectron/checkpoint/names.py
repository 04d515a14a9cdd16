"""The published GN+WS weights that a config may name: `MODEL.WEIGHTS: "ws://..."`.

File names end in the first eight hexadecimal digits of the SHA-256 of the file.
"""

from dataclasses import dataclass
from typing import Optional

PREFIX = "ws://"
_RESNETS = "https://download.openmmlab.com/pretrain/third_party/"
_DETECTORS = "https://download.openmmlab.com/mmdetection/v2.0/gn%2Bws/"


@dataclass(frozen=True)
class PublishedWeights:
    """One published file.

    Attributes:
        name: without `ws://`.
        url: of the download.
        source: its format, a name in `SOURCES`.
        architecture: of its ResNet.
    """

    name: str
    url: str
    source: str
    architecture: str

    @property
    def filename(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[1]

    @property
    def sha256_prefix(self) -> str:
        """The first eight hexadecimal digits of the file's SHA-256."""
        return self.filename.rsplit("-", 1)[1][:8]


def find_by_sha256(sha256: str) -> Optional[PublishedWeights]:
    """The published file with this SHA-256, or None."""
    for weights in PUBLISHED.values():
        if sha256.startswith(weights.sha256_prefix):
            return weights
    return None


def _resnet(name: str, digits: str, architecture: str) -> PublishedWeights:
    url = f"{_RESNETS}{name}-{digits}.pth"
    return PublishedWeights(f"jhu/{name}", url, "mmdet-resnet", architecture)


def _detector(name: str, ending: str, architecture: str) -> PublishedWeights:
    url = f"{_DETECTORS}{name}/{name}_{ending}.pth"
    return PublishedWeights(f"mmdet/{name}", url, "mmdet", architecture)


_R50, _R101, _X50, _X101 = "R-50", "R-101", "X-50-32x4d", "X-101-32x4d"
_FASTER = "faster_rcnn_{}_fpn_gn_ws-all_1x_coco"
_MASK = "mask_rcnn_{}_fpn_gn_ws-all_{}_coco"
_LONG = "20_23_24e"

# mmengine 0.10.7, hub/openmmlab.json; mmdetection 3.3.0, configs/gn+ws/metafile.yml, whose AP are
# the TEST.EXPECTED_RESULTS of the config of each name
PUBLISHED = {
    weights.name: weights
    for weights in (
        _resnet("resnet50_gn_ws", "15beedd8", _R50),
        _resnet("resnet101_gn_ws", "3e3c308c", _R101),
        _resnet("resnext50_32x4d_gn_ws", "0d87ac85", _X50),
        _resnet("resnext101_32x4d_gn_ws", "34ac1a9e", _X101),
        _detector(_FASTER.format("r50"), "20200130-613d9fe2", _R50),
        _detector(_FASTER.format("r101"), "20200205-a93b0d75", _R101),
        _detector(_FASTER.format("x50_32x4d"), "20200203-839c5d9d", _X50),
        _detector(_FASTER.format("x101_32x4d"), "20200212-27da1bc2", _X101),
        _detector(_MASK.format("r50", "2x"), "20200226-16acb762", _R50),
        _detector(_MASK.format("r101", "2x"), "20200212-ea357cd9", _R101),
        _detector(_MASK.format("x50_32x4d", "2x"), "20200216-649fdb6f", _X50),
        _detector(_MASK.format("x101_32x4d", "2x"), "20200319-33fb95b5", _X101),
        _detector(_MASK.format("r50", _LONG), "20200213-487d1283", _R50),
        _detector(_MASK.format("r101", _LONG), "20200213-57b5a50f", _R101),
        _detector(_MASK.format("x50_32x4d", _LONG), "20200226-969bcb2c", _X50),
        _detector(_MASK.format("x101_32x4d", _LONG), "20200316-e6cd35ef", _X101),
    )
}
