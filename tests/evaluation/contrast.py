"""How well one colour is seen on another."""

from typing import Any

from matplotlib.colors import to_rgb


def contrast(one: Any, other: Any) -> float:
    """Of two colours, by WCAG 2.1: 1 to 21."""

    def luminance(colour: Any) -> float:
        parts = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))

    dark, bright = sorted(map(luminance, (one, other)))
    return (bright + 0.05) / (dark + 0.05)
