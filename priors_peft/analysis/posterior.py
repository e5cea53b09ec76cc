"""How wide a prompt's posterior is beside its prior, and what prompts drawn from it agree on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inference.base import inference_from
from ..inference.posterior import GaussianPosterior, MixturePosterior, SampledPosterior
from ..inference.variational import divergence
from ..prompt import PriorPromptEncoder
from .common import Result, check_points
from .tokens import best_tokens


# Prompts drawn from a posterior, where it is not draws itself.
DRAWS = 32


@dataclass(frozen=True, eq=False)
class PosteriorSpread(Result):
    """How wide a posterior is in its prior's whitened coordinates, virtual token by virtual token.

    Attributes:
        deviation: Posterior standard deviation in prior standard deviations, mean over coordinates, shape `[P]`.
        determined: Share of the directions that the data determine, 1 − mean variance, shape `[P]`: MacKay's (1992) number
            of well-determined parameters γ = Σ (1 − s²) over all directions. Below 0 where the posterior is wider.
    """

    deviation: Tensor
    determined: Tensor


def posterior_spread(variance: Tensor) -> PosteriorSpread:
    """Spread of a posterior beside its prior.

    Args:
        variance: Of each whitened coordinate, in the prior's variances, shape `[P, d]`.
    """
    variance = check_points("variance", variance, "[P, d]").double()
    return PosteriorSpread(variance.sqrt().mean(-1), 1 - variance.mean(-1))


def nearest_agreement(
    nearest: Tensor, draws: Tensor, vocabulary: Tensor, metric: str = "cosine", excluded: Any = None
) -> Tensor:
    """Share of draws whose virtual token has the same nearest token as the prompt's.

    Args:
        nearest: Ids of the prompt's nearest tokens, shape `[P]`.
        draws: Prompts, shape `[n, P, d]`.
        vocabulary: Shape `[V, d]`.
        metric: As in `tokens.nearest_tokens`.
        excluded: Ids of rows that don't count.

    Returns:
        Shape `[P]`.
    """
    return (best_tokens(draws, vocabulary, metric, excluded)[1] == nearest).double().mean(0)


@torch.no_grad()
def posterior_draws(encoder: PriorPromptEncoder, seed: int = 0) -> Tensor | None:
    """Prompts θ drawn from a posterior, shape `[n, S, P, d]`: 32, or all it is made of; None of a point."""
    if encoder.posterior is None:
        return None
    kept = encoder.posterior.draws if isinstance(encoder.posterior, SampledPosterior) else range(DRAWS)
    return encoder.samples(min(DRAWS, len(kept)), torch.Generator().manual_seed(seed))


@torch.no_grad()
def kl_divergence(encoder: PriorPromptEncoder, seed: int = 0) -> float | None:
    """KL(q ‖ p) in nats of a Gaussian posterior, by one draw where the prior is not Gaussian; None of others.

    Of a mixture the mean over its Gaussians, which is above it by log C at most.
    """
    if not isinstance(encoder.posterior, (GaussianPosterior, MixturePosterior)):
        return None
    return divergence(encoder, encoder.component_samples(torch.Generator().manual_seed(seed))).item()


@torch.no_grad()
def local_variance(encoder: PriorPromptEncoder) -> Tensor:
    """Posterior variance of each coordinate in the prior's, shape `[S, P, d]`; of a mixture the mean within its Gaussians.

    How far apart those lie says what the data leave open, not how narrow they make a prompt.
    """
    if not isinstance(encoder.posterior, MixturePosterior):
        return encoder.variance()
    parts = encoder.posterior.parts(encoder.coordinate)
    return torch.stack([gaussian.variance(mean) for mean, gaussian in parts]).mean(0)


def initial_deviation(inference: str, settings: dict[str, Any]) -> float | None:
    """Standard deviation that training began with, in prior standard deviations; None where nothing began."""
    return getattr(inference_from(inference, settings), "initial_scale", None)
