"""Maximum mean discrepancy: how far the distribution of a prompt's virtual tokens lies from the vocabulary's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..names import check_at_least
from .common import Ids, Result, band, check_points, check_same_width, sample_rows


def squared_mmd(prompt: Tensor, sample: Tensor, bandwidth: float) -> Tensor:
    """Unbiased squared maximum mean discrepancy between the virtual tokens and a sample, with a Gaussian kernel.

    Gretton et al. (2012), equation 3, k(x, y) = exp(−|x − y|² / 2σ²). 0 is expected where both come from one
    distribution, so that values below 0 occur; it is at most 2.

    Args:
        prompt: Shape `[..., P, d]` with P >= 2.
        sample: Shape `[m, d]` with m >= 2.
        bandwidth: σ.

    Returns:
        Shape `[...]`.
    """
    prompt, sample = check_points("prompt", prompt, "[..., P, d]"), check_points("sample", sample, "[m, d]")
    check_same_width("prompt", prompt, "sample", sample)
    check_at_least("the number of virtual tokens", prompt.shape[-2], 2, "a discrepancy compares their spread too")
    check_at_least("the number of rows of sample", len(sample), 2, "pass more of the vocabulary")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be > 0, got {bandwidth!r}: the sample's rows must not be all the same")
    prompt, sample = prompt.double(), sample.double().to(prompt.device)
    within = _pairs_mean(_kernel(sample, sample, bandwidth))
    # A prompt at a time: trajectories and draws would make thousands of rows against the sample.
    flat = prompt.reshape(-1, *prompt.shape[-2:])
    found = [
        _pairs_mean(_kernel(one, one, bandwidth)) + within - 2 * _kernel(one, sample, bandwidth).mean() for one in flat
    ]
    return torch.stack(found).reshape(prompt.shape[:-2])


def median_distance(sample: Tensor) -> float:
    """Median distance between the rows of a sample `[m, d]`: the usual bandwidth of a Gaussian kernel.

    Of the sample alone, without the prompt, so that figures of different prompts and steps compare.
    """
    sample = check_points("sample", sample, "[m, d]").double()
    check_at_least("the number of rows of sample", len(sample), 2, "pass more of the vocabulary")
    upper = torch.ones(len(sample), len(sample), dtype=torch.bool).triu(1)
    return float(_squared_distances(sample, sample).cpu()[upper].median().sqrt())


@dataclass(frozen=True, eq=False)
class MmdTest(Result):
    """Whether the virtual tokens could be rows of the vocabulary.

    Attributes:
        squared_mmd: Unbiased, see `squared_mmd`.
        p_value: Share of relabelled samples, this one included, that are as far apart.
        null_band: 5th and 95th percentile of the relabelled samples' values, shape `[2]`.
        bandwidth: σ of the kernel: the median distance between the sampled vocabulary rows.
        num_rows: Sampled vocabulary rows.
        num_permutations: Relabelled samples.
        seed: Of the sample and of the relabelling.
    """

    squared_mmd: float
    p_value: float
    null_band: Tensor
    bandwidth: float
    num_rows: int
    num_permutations: int
    seed: int


def mmd_test(
    prompt: Tensor,
    vocabulary: Tensor,
    num_rows: int = 1000,
    num_permutations: int = 1000,
    seed: int = 0,
    excluded: Ids | None = None,
) -> MmdTest:
    """Permutation test that virtual tokens and vocabulary rows come from one distribution (Gretton et al. 2012).

    Args:
        prompt: Shape `[P, d]`, P >= 2.
        vocabulary: Shape `[V, d]`.
        num_rows: Rows drawn from the vocabulary.
        num_permutations: How often prompt and rows are relabelled.
        seed: Of both.
        excluded: Ids of rows that don't count.
    """
    prompt = check_points("prompt", prompt, "[P, d]")
    vocabulary = check_points("vocabulary", vocabulary, "[V, d]")
    check_at_least("num_permutations", num_permutations, 1)
    sample = vocabulary[sample_rows(len(vocabulary), num_rows, seed, excluded).to(vocabulary.device)].double()
    bandwidth = median_distance(sample)
    value = float(squared_mmd(prompt, sample, bandwidth))
    together = torch.cat([prompt.double(), sample.to(prompt.device)]).cpu()
    count, rest = len(prompt), len(sample)
    kernel = _kernel(together, together, bandwidth).fill_diagonal_(0)
    rows, total = kernel.sum(1), kernel.sum()
    generator = torch.Generator().manual_seed(seed)
    null = torch.empty(num_permutations, dtype=torch.float64)
    for index in range(num_permutations):
        chosen = torch.randperm(len(together), generator=generator)[:count]
        within = kernel[chosen][:, chosen].sum()
        across = rows[chosen].sum() - within
        others = total - 2 * across - within
        null[index] = within / (count * (count - 1)) + others / (rest * (rest - 1)) - 2 * across / (count * rest)
    return MmdTest(
        squared_mmd=value,
        p_value=float(1 + (null >= value - 1e-12).sum()) / (num_permutations + 1),
        null_band=band(null),
        bandwidth=bandwidth,
        num_rows=rest,
        num_permutations=num_permutations,
        seed=seed,
    )


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    squares = first.square().sum(-1)[:, None] + second.square().sum(-1)
    return (squares - 2 * first @ second.mT).clamp_min(0)


def _kernel(first: Tensor, second: Tensor, bandwidth: float) -> Tensor:
    return (_squared_distances(first, second) / (-2 * bandwidth**2)).exp()


def _pairs_mean(kernel: Tensor) -> Tensor:
    """Mean over pairs of different rows."""
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
