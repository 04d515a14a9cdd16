"""Metadata of weight files: their origin, and what a model needs to use them.

Files written by this package contain it as a dict of plain values under the key `METADATA_KEY`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from ws_detectron.errors import WeightsError
from ws_detectron.layers import check_ws_arguments

METADATA_KEY = "ws_detectron"
_VERSION = 1


@dataclass(frozen=True)
class WSForm:
    """The `mode` and `eps` of `standardize_weight` with which a conv was trained."""

    mode: str
    eps: float

    def __str__(self) -> str:
        return f"{self.mode}, eps {self.eps:g}"


@dataclass(frozen=True)
class Preprocessing:
    """How a detector normalizes an image (0 to 255).

    Attributes:
        input_format: channel order, "RGB" or "BGR" (detectron2's INPUT.FORMAT).
        pixel_mean: subtracted per channel, in that order (MODEL.PIXEL_MEAN).
        pixel_std: divided by per channel, in that order (MODEL.PIXEL_STD).
    """

    input_format: Optional[str]
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


@dataclass(frozen=True)
class WeightMetadata:
    """The metadata of one file.

    Attributes:
        source: the framework that the weights are from, or "training".
        origin: name of the file that was converted; empty for weights trained here.
        sha256: of that file.
        architecture: of the ResNet, such as "R-50"; empty if unknown.
        ws_known: False if it is unknown which convs were trained with WS; `ws_convs` is empty then.
        ws_convs: name of each conv trained with WS -> its mode and eps. In a file of a ResNet
            only, names are relative to the ResNet, like the keys.
        norm: "GN" or "BN" after the convs of the ResNet; empty if unknown or none.
        gn_groups: number of groups of the GN layers.
        preprocessing: None if unknown.
        stride_in_1x1: whether bottlenecks have their stride in the first 1x1 conv
            (MODEL.RESNETS.STRIDE_IN_1X1); None if unknown or not applicable.
    """

    source: str
    origin: str = ""
    sha256: str = ""
    architecture: str = ""
    ws_known: bool = True
    ws_convs: Mapping[str, WSForm] = field(default_factory=dict)
    norm: str = ""
    gn_groups: Optional[int] = None
    preprocessing: Optional[Preprocessing] = None
    stride_in_1x1: Optional[bool] = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values that every safe loader accepts."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any, path: str) -> "WeightMetadata":
        """The inverse of `as_dict`.

        Args:
            values: from an untrusted file.
            path: the file, for messages.

        Raises:
            WeightsError: a value is missing or invalid.
        """
        try:
            values = dict(values)
            if values.pop("version") != _VERSION:
                raise ValueError("written by another version of ws_detectron")
            forms = {str(name): WSForm(**form) for name, form in values.pop("ws_convs").items()}
            for form in set(forms.values()):
                check_ws_arguments(form.eps, form.mode)
            given = values.pop("preprocessing")
            preprocessing = given and Preprocessing(
                given["input_format"],
                tuple(float(value) for value in given["pixel_mean"]),
                tuple(float(value) for value in given["pixel_std"]),
            )
            return cls(ws_convs=forms, preprocessing=preprocessing, **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{path}: the entry {METADATA_KEY!r} cannot be used ({error!r})"
            ) from None


@dataclass(frozen=True)
class KeyEntry:
    """What became of one key.

    Attributes:
        source: the key in the input file.
        target: the key in the output; None if it was left out.
        note: why it was left out, or how its tensor was changed; may be empty.
    """

    source: str
    target: Optional[str]
    note: str = ""


@dataclass
class ConversionRecord:
    """What became of every key of a file, and what was assumed.

    Attributes:
        entries: one for each key.
        assumptions: what the conversion assumed because the file does not tell.
    """

    entries: list[KeyEntry] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Counts, reasons for changes and ignored keys, and assumptions, one per line."""
        mapped = [entry for entry in self.entries if entry.target is not None]
        changed = Counter(entry.note for entry in mapped if entry.note)
        ignored = Counter(entry.note for entry in self.entries if entry.target is None)
        lines = [f"{len(mapped)} tensors mapped, {sum(ignored.values())} ignored"]
        lines += [f"  changed: {count}: {note}" for note, count in changed.items()]
        lines += [f"  ignored: {count}: {note}" for note, count in ignored.items()]
        lines += [f"  assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)

    def table(self) -> str:
        """All keys as TSV with the columns source, target and note."""
        lines = ["source\ttarget\tnote"]
        lines += [f"{e.source}\t{e.target or '-'}\t{e.note}" for e in self.entries]
        return "\n".join(lines) + "\n"
