"""How often the likeliest token is right, by how likely it is said to be."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


BINS = 10


@dataclass
class Calibration:
    """How often the likeliest token is right, by how likely it is said to be (Guo et al., 2017).

    Args:
        error: Expected calibration error, in [0, 1].
        counts: Tokens in each of ten equal intervals of confidence.
        confidence: Mean probability of the likeliest token in each; 0 where there are none.
        accuracy: Share of them that are right; 0 where there are none.
    """

    error: float
    counts: list[int]
    confidence: list[float]
    accuracy: list[float]

    @property
    def chance(self) -> float:
        """The error to expect of as many tokens by chance alone, if they were as often right as they are sure.

        With n tokens of mean confidence p in an interval, the mean absolute deviation of a binomial share
        (De Moivre, 1730), 2 (1 - p) k Pr(k) / n with k = floor(np) + 1, weighted by n. A little more than it is where
        confidences differ within an interval.
        """
        deviations = (count * _mean_deviation(count, p) for count, p in zip(self.counts, self.confidence, strict=True))
        return sum(deviations) / max(sum(self.counts), 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def _mean_deviation(count: int, p: float) -> float:
    """Of a share of `count` trials that come true with probability p, from p."""
    if not count or not 0 < p < 1:
        return 0.0
    k = math.floor(count * p) + 1
    chosen = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
    return 2 * k / count * math.exp(chosen + k * math.log(p) + (count - k + 1) * math.log1p(-p))


def calibration(confidence: Tensor, right: Tensor) -> Calibration:
    """Calibration of predictions with a confidence in [0, 1] `[n]` that were right or not `[n]`."""
    return calibration_of(row_bins(torch.zeros_like(right, dtype=torch.long), 1, confidence.double(), right)[0])


def row_bins(rows: Tensor, batch_size: int, confidence: Tensor, right: Tensor) -> Tensor:
    """What `calibration_of` is made of, row by row, so that batches and processes can be put together.

    Args:
        rows: Row of each token, shape `[n]`.
        batch_size: B.
        confidence: Probability of its likeliest token, shape `[n]`.
        right: Whether that is the token, shape `[n]`.

    Returns:
        Tokens, sum of confidence and number right in each interval, of the type of `confidence`, shape `[B, 3, 10]`.
    """
    interval = (confidence * BINS).long().clamp(0, BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, right.to(confidence)], -1)
    found = confidence.new_zeros(batch_size * BINS, 3).index_add(0, rows * BINS + interval, values)
    return found.view(batch_size, BINS, 3).transpose(1, 2)


def calibration_of(bins: Tensor) -> Calibration:
    """Calibration of the sum over rows of their `row_bins`, shape `[3, 10]`."""
    counts, confidence, right = bins.double()
    error = (confidence - right).abs().sum() / counts.sum().clamp_min(1)
    mean, accuracy = (total / counts.clamp_min(1) for total in (confidence, right))
    return Calibration(error.item(), counts.long().tolist(), mean.tolist(), accuracy.tolist())
