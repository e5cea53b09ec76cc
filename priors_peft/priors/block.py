"""Block structure: coordinates correlate within blocks of neighbours (attention heads, say), not between them."""

from typing import Self

import torch
from torch import Tensor

from .base import Prior, check_reference
from .structured import Shrinkage, StructuredPrior, fit_moments


class BlockPrior(StructuredPrior):
    r"""p(θ_p) = Π_b N(θ_pb; µ_b, Σ_b) with Σ_b = A_b A_bᵀ the covariance of block b.

    Args:
        loc: Mean µ, shape `[d]`.
        blocks: Cholesky factors A_b, lower triangular, shape `[d / size, size, size]`.
    """

    root = "blocks"
    blocks: Tensor

    def __init__(self, loc: Tensor, blocks: Tensor) -> None:
        Prior.__init__(self)
        count, size = blocks.shape[:2]
        if blocks.shape != (count, size, size) or loc.shape != (count * size,):
            raise ValueError(
                f"blocks must have shape [d / size, size, size] for loc of shape {tuple(loc.shape)}, "
                f"got {tuple(blocks.shape)}"
            )
        self.register_buffer("loc", loc)
        self.register_buffer("blocks", blocks)

    @classmethod
    def fit(  # type: ignore[override]
        cls, reference: Tensor, *, block_size: int | None = None, shrinkage: Shrinkage = "ledoit_wolf"
    ) -> Self:
        """Fit mean and the covariance of each block, each with its own shrinkage.

        Args:
            reference: Shape `[n, d]`.
            block_size: Coordinates in a block, a divisor of d; by default the largest one up to 64.
            shrinkage: See `fit_moments`.
        """
        reference = check_reference(reference)
        dim = reference.shape[1]
        divisors = [size for size in range(1, dim + 1) if dim % size == 0]
        size = max(divisor for divisor in divisors if divisor <= 64) if block_size is None else block_size
        if size not in divisors:
            raise ValueError(f"block_size must divide the width {dim} (one of {divisors}), got {block_size!r}")
        moments = [fit_moments(part, shrinkage) for part in reference.split(size, 1)]
        mean = torch.cat([mean for mean, _ in moments])
        return cls(mean.float(), torch.linalg.cholesky(torch.stack([block for _, block in moments])).float())

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        return torch.block_diag(*self.blocks)

    # A batch of small Gaussians, so that no [d, d] is built; reshaping makes it the event shape [d].
    def log_prob(self, prompt: Tensor) -> Tensor:
        parts = torch.distributions.MultivariateNormal(
            self._parts(self.loc), scale_tril=self.blocks, validate_args=False
        )
        return parts.log_prob(self._parts(self._checked(prompt))).sum((-2, -1))

    def to_prompt(self, z: Tensor) -> Tensor:
        parts = torch.einsum("bij,...bj->...bi", self.blocks, self._parts(z.to(self.loc.dtype)))
        return self.loc + parts.flatten(-2)

    def to_whitened(self, prompt: Tensor) -> Tensor:
        centred = self._parts(self._checked(prompt) - self.loc)
        # One solve a block for all virtual tokens at once: broadcasting would copy the blocks for each token.
        columns = centred.reshape(-1, *self.blocks.shape[:2]).permute(1, 2, 0)
        solved = torch.linalg.solve_triangular(self.blocks, columns, upper=False)
        return solved.permute(2, 0, 1).reshape(prompt.shape)

    def _parts(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(-1, self.blocks.shape[:2])
