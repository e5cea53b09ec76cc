"""One small prior of every family and structure, in any dimension, for the laws that all of them must hold."""

from collections.abc import Callable

import torch
from torch import Tensor

from priors_peft.priors import (
    DistributionPrior,
    EmpiricalPrior,
    ExclusionPrior,
    GaussianPrior,
    InterpolationPrior,
    Prior,
    StructuredPrior,
    TextPrior,
)


TOKENS = 3


def reference(rows: int, dim: int, seed: int = 0) -> Tensor:
    """Correlated rows around a mean, of different scales."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, 4, generator=generator) @ torch.randn(4, dim, generator=generator)
    scales = torch.linspace(0.3, 1, dim)
    return 0.7 * few + scales * torch.randn(rows, dim, generator=generator) + torch.randn(dim, generator=generator)


def prompts(dim: int, tokens: int = TOKENS) -> Tensor:
    """Seven trained prompts."""
    return reference(7 * tokens, dim).unflatten(0, (7, tokens))


def text(dim: int, tokens: int = TOKENS, **settings) -> TextPrior:
    rows = reference(100, dim)
    return TextPrior.fit(rows, token_embeddings=rows[:2], num_virtual_tokens=tokens, **settings)


def laplace(dim: int) -> DistributionPrior:
    scale = torch.linspace(0.5, 2, dim)
    return DistributionPrior(torch.distributions.Independent(torch.distributions.Laplace(torch.ones(dim), scale), 1))


# Families whose virtual tokens have their own locations take their number as the second argument.
CASES: dict[str, Callable[..., Prior]] = {
    "gaussian": lambda dim, tokens=TOKENS: GaussianPrior.fit(reference(100, dim)),
    "diagonal": lambda dim, tokens=TOKENS: GaussianPrior.fit(reference(100, dim), diagonal=True),
    "full": lambda dim, tokens=TOKENS: StructuredPrior.fit(reference(100, dim)),
    "low_rank": lambda dim, tokens=TOKENS: StructuredPrior.fit(reference(100, dim), structure="low_rank", rank=3),
    "block": lambda dim, tokens=TOKENS: StructuredPrior.fit(reference(100, dim), structure="block"),
    "mixture": lambda dim, tokens=TOKENS: StructuredPrior.fit(reference(100, dim), structure="mixture", components=3),
    "exclusion": lambda dim, tokens=TOKENS: ExclusionPrior.fit(reference(100, dim), quantile=0.9, scale=1.3),
    "rejection": lambda dim, tokens=TOKENS: ExclusionPrior.fit(reference(100, dim), method="rejection"),
    "line": lambda dim, tokens=TOKENS: InterpolationPrior.fit((reference(100, dim), 0.5 * reference(90, dim, 1))),
    "great_circle": lambda dim, tokens=TOKENS: InterpolationPrior.fit(
        (reference(100, dim) + 3, reference(90, dim, 1) + 4), path="great_circle", concentration=(2, 3)
    ),
    "text": text,
    "text_full": lambda dim, tokens=TOKENS: text(dim, tokens, covariance="full", spread=0.5),
    "empirical": lambda dim, tokens=TOKENS: EmpiricalPrior.fit(prompts(dim, tokens), rank=2),
    "empirical_mixture": lambda dim, tokens=TOKENS: EmpiricalPrior.fit(prompts(dim, tokens), structure="mixture"),
    "user": lambda dim, tokens=TOKENS: laplace(dim),
}
EXCLUDING = ("exclusion", "rejection")
