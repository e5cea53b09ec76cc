"""The structured priors against scipy, scikit-learn and the memory a wide model has."""

import tracemalloc

import numpy as np
import pytest
import torch
from prior_cases import reference
from scipy import stats
from sklearn.covariance import LedoitWolf
from torch.utils._python_dispatch import TorchDispatchMode

from priors_peft.priors import StructuredPrior


def test_full_is_the_ledoit_wolf_gaussian():
    rows = reference(60, 8)
    fitted = LedoitWolf().fit(rows.double().numpy())
    expected = stats.multivariate_normal(fitted.location_, fitted.covariance_).logpdf(rows[:5]).sum()
    assert StructuredPrior.fit(rows).log_prob(rows[:5]).item() == pytest.approx(expected, rel=1e-4)


def test_given_shrinkage_is_taken():
    rows = reference(60, 8)
    covariance = np.cov(rows.double().numpy().T, bias=True)
    expected = 0.7 * covariance + 0.3 * covariance.trace() / 8 * np.eye(8)
    triangle = StructuredPrior.fit(rows, shrinkage=0.3).scale_tril
    np.testing.assert_allclose(triangle @ triangle.mT, expected, atol=1e-4)


@pytest.mark.parametrize("structure", ["low_rank", "block", "mixture"])
def test_own_density_is_torchs(structure):
    prior = StructuredPrior.fit(reference(100, 12), structure=structure).double()
    prompt = prior.sample(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.log_prob(prompt), prior.distribution.log_prob(prompt).sum(), rtol=1e-6, atol=1e-6)


def test_low_rank_finds_the_covariance_it_is_right_about():
    generator = torch.Generator().manual_seed(0)
    factor, noise = 2 * torch.randn(30, 3, generator=generator), torch.linspace(0.5, 1, 30)
    rows = torch.randn(20_000, 3, generator=generator) @ factor.mT + noise * torch.randn(
        20_000, 30, generator=generator
    )
    triangle = StructuredPrior.fit(rows, structure="low_rank", rank=3).scale_tril
    expected = factor @ factor.mT + noise.square().diag()
    torch.testing.assert_close(triangle @ triangle.mT, expected, atol=0.6, rtol=0)
    np.testing.assert_allclose((triangle @ triangle.mT).diagonal(), rows.var(0), rtol=5e-3)


def test_no_direction_is_lost_without_shrinkage():
    triangle = StructuredPrior.fit(reference(20, 40), shrinkage=1e-15).scale_tril.double()
    variances = torch.linalg.eigvalsh(triangle @ triangle.mT)
    assert variances.min() > 0.5e-6 * variances.mean()


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().size() // tensor.element_size())
        return result


@pytest.mark.parametrize("structure", ["low_rank", "block", "mixture"])
def test_wide_structures_never_build_a_square(structure):
    dim, rows = 8192, torch.randn(128, 8192, generator=torch.Generator().manual_seed(0))
    settings = {"mixture": {"components": 2}, "low_rank": {"rank": 16}}.get(structure, {})
    tracemalloc.start()  # numpy reports its arrays to it; torch's are seen by the mode
    with LargestTensor() as largest:
        prior = StructuredPrior.fit(rows, structure=structure, **settings)
        prompt = prior.sample(20, torch.Generator().manual_seed(0)).requires_grad_()
        prior.log_prob(prompt).backward()
        prior.to_whitened(prior.to_prompt(prompt.detach()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.elements <= rows.numel()
    assert peak < dim * dim * 4 / 4


def test_block_keeps_correlations_inside_blocks_and_drops_the_others():
    rows = reference(4000, 6)
    triangle = StructuredPrior.fit(rows, structure="block", block_size=3).scale_tril
    covariance, empirical = triangle @ triangle.mT, torch.cov(rows.mT)
    torch.testing.assert_close(covariance[:3, :3], empirical[:3, :3], atol=0.02, rtol=0.02)
    assert not covariance[:3, 3:].any()


def test_mixture_finds_its_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-5.0, 0, 0, 0], [5.0, 0, 0, 0]])
    rows = torch.cat([centres[0] + torch.randn(300, 4, generator=generator),
                      centres[1] + 0.5 * torch.randn(900, 4, generator=generator)])  # fmt: skip
    prior = StructuredPrior.fit(rows, structure="mixture", components=2)
    order = prior.locs[:, 0].argsort()
    torch.testing.assert_close(prior.weights[order], torch.tensor([0.25, 0.75]), atol=0.01, rtol=0)
    torch.testing.assert_close(prior.locs[order], centres, atol=0.2, rtol=0)
    # its moments, and scipy's density of the mixture it says it is
    parts = [
        weight * stats.multivariate_normal(loc, np.diag(scale**2)).pdf(rows[:5])
        for weight, loc, scale in zip(prior.weights.numpy(), prior.locs.numpy(), prior.scales.numpy(), strict=True)
    ]
    assert prior.log_prob(rows[:5]).item() == pytest.approx(np.log(sum(parts)).sum(), rel=1e-5)
    between = torch.einsum("k,ki,kj->ij", prior.weights, prior.locs - prior.loc, prior.locs - prior.loc)
    covariance = between + (prior.weights @ prior.scales.square()).diag()
    torch.testing.assert_close(prior.scale_tril @ prior.scale_tril.mT, covariance)
