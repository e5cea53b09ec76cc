"""Low-rank structure: a covariance of a few directions plus a diagonal, for models too wide for a [d, d] matrix."""

from typing import Self

import torch
from torch import Tensor

from .base import Prior, check_reference
from .structured import StructuredPrior


# Residual variances of single coordinates are drawn towards their mean as if this many more rows had shown it.
PSEUDO_ROWS = 10


class LowRankPrior(StructuredPrior):
    r"""p(θ_p) = N(θ_p; µ, Σ) with Σ = S (I + U (T² − I) Uᵀ) S, S = diag(s), T = diag(t), UᵀU = I.

    This is low rank plus diagonal, WWᵀ + S² with S⁻¹W = U √(T² − I), written in the coordinates where its square root
    is closed: A = S (I + U (T − I) Uᵀ) and A⁻¹ = (I + U (T⁻¹ − I) Uᵀ) S⁻¹, both applied in O(dr).

    Args:
        loc: Mean µ, shape `[d]`, or `[P, d]`.
        scale: s > 0, standard deviation of each coordinate outside the directions, shape `[d]`.
        directions: U, orthonormal columns, shape `[d, r]`.
        stretch: t >= 1, standard deviation along each direction in units of s, shape `[r]`.
    """

    root = "scale"
    scale: Tensor
    directions: Tensor
    stretch: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, directions: Tensor, stretch: Tensor) -> None:
        Prior.__init__(self)
        if scale.shape != loc.shape[-1:] or directions.shape != (*scale.shape, *stretch.shape):
            raise ValueError(
                f"scale, directions and stretch must have shapes [d], [d, r] and [r] for loc of shape "
                f"{tuple(loc.shape)}, got {tuple(scale.shape)}, {tuple(directions.shape)} and {tuple(stretch.shape)}"
            )
        if not bool((scale > 0).all()):
            raise ValueError(f"scale must be positive, got minimum {scale.min().item():.3g}")
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.register_buffer("directions", directions)
        self.register_buffer("stretch", stretch)

    @classmethod
    def fit(cls, reference: Tensor, *, rank: int = 64) -> Self:  # type: ignore[override]
        """Fit mean, principal directions and the variance outside them to a reference.

        Args:
            reference: Shape `[n, d]`.
            rank: Number of directions r; at most half the rows and d − 1, so that the diagonal can be estimated too.
        """
        centred = check_reference(reference)
        mean = centred.mean(0)
        centred = centred - mean
        root = low_rank_root(*principal_factors(centred, rank, len(centred) - 1))
        return cls(mean.float(), *(part.float() for part in root))

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        """Cholesky factor of Σ, shape `[d, d]`: made on demand, nothing else needs it. `to_prompt` uses the A above."""
        identity = torch.eye(self.dim, dtype=torch.float64, device=self.loc.device)
        root = stretched(identity, self.directions.double(), self.stretch.double()) * self.scale.double()
        return torch.linalg.cholesky(root.mT @ root).to(self.loc)

    @property
    def distribution(self) -> torch.distributions.Distribution:
        factor = self.scale[:, None] * self.directions * (self.stretch.square() - 1).sqrt()
        diagonal = self.scale.square()
        return torch.distributions.LowRankMultivariateNormal(self.loc, factor, diagonal, validate_args=False)

    # The distribution above would factor its r × r capacitance matrix anew at each call; U and t hold that factor.
    def log_prob(self, prompt: Tensor) -> Tensor:
        normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
        volume = self.scale.log().sum() + self.stretch.log().sum()
        return (normal.log_prob(self.to_whitened(prompt)).sum(-1) - volume).sum(-1)

    def to_prompt(self, z: Tensor) -> Tensor:
        return self.loc + stretched(z.to(self.loc.dtype), self.directions, self.stretch) * self.scale

    def to_whitened(self, prompt: Tensor) -> Tensor:
        return stretched((self._checked(prompt) - self.loc) / self.scale, self.directions, self.stretch.reciprocal())


def stretched(rows: Tensor, directions: Tensor, stretch: Tensor) -> Tensor:
    """x (I + U (T − I) Uᵀ) for rows x of shape `[..., d]`: lengthened along the directions, as they were elsewhere."""
    return rows + (rows @ directions * (stretch - 1)) @ directions.mT


def low_rank_root(factor: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, U and t with WWᵀ + D = S (I + U (T² − I) Uᵀ) S, from W `[d, r]` and the diagonal of D `[d]`."""
    scale = diagonal.sqrt()
    directions, values, _ = torch.linalg.svd(factor / scale[:, None], full_matrices=False)
    return scale, directions, (1 + values.square()).sqrt()


def principal_factors(centred: Tensor, rank: int, freedom: int) -> tuple[Tensor, Tensor]:
    """W `[d, r]` and the diagonal of D `[d]` of the low-rank covariance WWᵀ + D of centred rows.

    Probabilistic principal components (Tipping & Bishop, 1999): variance λ_k − σ² along direction v_k, σ² the mean
    variance outside the directions. D is then what makes each coordinate's variance the reference's own.

    Args:
        centred: Rows of mean 0 in float64, shape `[n, d]`.
        rank: Number of directions asked for.
        freedom: Degrees of freedom the rows have left, n − 1 where one mean was taken off.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
    from sklearn.utils.extmath import randomized_svd

    dim = centred.shape[1]
    variance = centred.square().sum(0) / freedom
    # With as many directions as rows nothing would be left to estimate the diagonal from.
    rank = min(rank, freedom // 2, dim - 1)
    if rank == 0:
        directions, values = centred.new_empty(dim, 0), centred.new_empty(0)
    else:
        _, singular, rows = randomized_svd(centred.numpy(), rank, random_state=0)
        directions, values = torch.from_numpy(rows.T.copy()), torch.from_numpy(singular).square() / freedom
    residual = (variance - directions.square() @ values).clamp_min(0)
    noise = residual.sum() / (dim - rank)
    diagonal = residual + noise * directions.square().sum(-1)
    left = freedom - rank
    diagonal = (left * diagonal + PSEUDO_ROWS * noise) / (left + PSEUDO_ROWS)
    # A reference that lies within the directions leaves no variance outside them at all.
    floor = 1e-6 * variance.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return directions * (values - noise).clamp_min(0).sqrt(), diagonal.clamp_min(floor)
