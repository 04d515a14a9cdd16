"""What a conversion did with each key."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Optional


@dataclass(frozen=True)
class KeyEntry:
    """One key of the file that was read.

    Attributes:
        source: the key.
        target: the key it became; None if it was left out.
        note: the reason it was left out, or how its tensor was changed; may be empty.
    """

    source: str
    target: Optional[str]
    note: str = ""


@dataclass
class ConversionRecord:
    """Every key of a converted file, and what was assumed on the way.

    Attributes:
        entries: one for each key.
        assumptions: what the file does not say and the conversion took for granted.
    """

    entries: list[KeyEntry] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Counts, the reasons for ignored keys, and the assumptions, one a line."""
        mapped = [entry for entry in self.entries if entry.target is not None]
        changed = Counter(entry.note for entry in mapped if entry.note)
        ignored = Counter(entry.note for entry in self.entries if entry.target is None)
        lines = [f"{len(mapped)} tensors mapped, {sum(ignored.values())} ignored"]
        lines += [f"  changed: {count}: {note}" for note, count in changed.items()]
        lines += [f"  ignored: {count}: {note}" for note, count in ignored.items()]
        lines += [f"  assumed: {assumption}" for assumption in self.assumptions]
        return "\n".join(lines)

    def table(self) -> str:
        """All keys as tab-separated lines `source, target, note`."""
        lines = ["source\ttarget\tnote"]
        lines += [f"{e.source}\t{e.target or '-'}\t{e.note}" for e in self.entries]
        return "\n".join(lines) + "\n"
