# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ratios with their confidence intervals. Arithmetic only."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_RESAMPLES: Final = 4_000


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of two quantities that were measured side by side, round by round.

    It is the median of the rounds' ratios: what disturbs a whole round cancels out,
    and what disturbs one of the two in a few rounds does not count. The interval is
    the percentile bootstrap's over the rounds.
    """
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    source = random.Random(0)
    medians = sorted(
        statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    return Ratio(
        statistics.median(ratios),
        medians[int(_RESAMPLES * 0.025)],
        medians[int(_RESAMPLES * 0.975)],
    )


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of the medians of two quantities that were measured in pairs.

    The interval is the percentile bootstrap's over the pairs.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    source = random.Random(0)

    def ratio(chosen: Sequence[tuple[float, float]]) -> float:
        return statistics.median(a for a, _ in chosen) / statistics.median(b for _, b in chosen)

    ratios = sorted(ratio(source.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    return Ratio(ratio(pairs), ratios[int(_RESAMPLES * 0.025)], ratios[int(_RESAMPLES * 0.975)])
