"""How sure a share is that was counted on some samples."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson(successes: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a binomial proportion (Wilson, JASA 1927), as shares in [0, 1].

    Raises:
        ValueError: no samples, more successes than samples, or a confidence outside (0, 1).
    """
    if not 0 <= successes <= samples or samples < 1:
        raise ValueError(f"need 0 <= successes <= samples and a sample, got {successes} of {samples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / samples
    middle = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return max(0.0, middle - half), min(1.0, middle + half)
