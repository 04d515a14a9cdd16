"""Random draws that are the same on every machine and with every version of numpy.

numpy guarantees that the raw output of `PCG64` and of `SeedSequence` never changes, but not the
methods of `Generator` (NEP 19, "Random Number Generator Policy"). Scenes must be equal everywhere,
so they are drawn from the raw output, with integer arithmetic.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """A stream of random draws that depends only on its seed words."""

    def __init__(self, *seed_words: int) -> None:
        """
        Args:
            seed_words: integers in [0, 2**32); streams with different words are independent.

        Raises:
            ValueError: there is no word, or one is out of range.
        """
        if not seed_words or not all(0 <= word < 2**32 for word in seed_words):
            raise ValueError(f"seed words must be integers in [0, 2**32), got {seed_words}")
        # SeedSequence does not distinguish (1,) and (1, 0); the number of words does.
        self._bits = np.random.PCG64(np.random.SeedSequence((len(seed_words), *seed_words)))

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included, less than 2**31 apart.

        Scaling 32 random bits makes probabilities differ by at most 2**-32.
        """
        span = high - low + 1
        if not 0 < span <= 2**31:
            raise ValueError(f"need low <= high less than 2**31 apart, got [{low}, {high}]")
        return low + ((int(self._bits.random_raw()) >> 32) * span >> 32)

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high), from 53 random bits."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def log_uniform(self, low: float, high: float) -> float:
        """A float in [low, high) whose logarithm is uniform."""
        return low * (high / low) ** self.uniform(0.0, 1.0)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def chance(self, percent: int) -> bool:
        """True with a probability of `percent` %."""
        return self.integer(0, 99) < percent

    def noise(self, amplitude: int, shape: tuple[int, ...]) -> np.ndarray:
        """Integers in [-amplitude, amplitude], int16, `amplitude` <= 127.

        Each value is made from one random byte, so probabilities differ by up to 1/256.
        """
        if not 0 <= amplitude <= 127:
            raise ValueError(f"amplitude must be in [0, 127], got {amplitude}")
        count = int(np.prod(shape))
        words = self._bits.random_raw(-(-count // 8))
        # "<u8": little-endian on every machine
        octets = words.astype("<u8").view(np.uint8)[:count].reshape(shape).astype(np.uint16)
        return ((octets * np.uint16(2 * amplitude + 1)) >> 8).astype(np.int16) - np.int16(amplitude)
