"""Shape of a set of prompt vectors: how many directions it fills and whether it has collapsed."""

import torch
from torch import Tensor


def effective_rank(prompt: Tensor) -> Tensor:
    """Exponential of the entropy of the normalized singular values, between 1 and min(P, d).

    Roy & Vetterli (2007), "The effective rank". Vectors are not centred: copies of one vector have rank 1.

    Args:
        prompt: Shape `[..., P, d]`.

    Returns:
        Shape `[...]`.
    """
    values = torch.linalg.svdvals(prompt.float())
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def mean_pairwise_cosine(prompt: Tensor) -> Tensor:
    """Mean cosine between different virtual tokens, in [-1, 1]; 1 means total collapse. Needs P >= 2, else nan.

    Args:
        prompt: Shape `[..., P, d]`.

    Returns:
        Shape `[...]`.
    """
    unit = torch.nn.functional.normalize(prompt.float(), dim=-1)
    count = prompt.shape[-2]
    total = unit.sum(-2).square().sum(-1) - unit.square().sum((-1, -2))
    return total / (count * (count - 1)) if count > 1 else torch.full_like(total, torch.nan)
