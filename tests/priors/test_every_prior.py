"""The laws of a prior, held by every family and structure."""

import copy
import math

import numpy as np
import pytest
import torch
from prior_cases import CASES, EXCLUDING, TOKENS, reference
from safetensors.torch import load_file, save_file
from scipy import stats

from priors_peft.priors import (
    DistributionPrior,
    EmpiricalPrior,
    ExclusionPrior,
    GaussianPrior,
    InterpolationPrior,
    Prior,
    StructuredPrior,
    TextPrior,
    prior_class,
    prior_family,
    prior_names,
)


every_prior = pytest.mark.parametrize("case", CASES)
GAUSSIAN = ("gaussian", "diagonal", "full", "low_rank", "block", "text", "text_full", "empirical")
SMOOTH = [name for name in CASES if name not in (*EXCLUDING, "user")]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(prior: Prior, count: int) -> torch.Tensor:
    """At least `count` independent virtual tokens, shape `[prompts, P, d]`."""
    generator = seeded()
    if prior.loc.ndim == 1:
        return prior.sample(count, generator)[None]
    return torch.stack([prior.sample(len(prior.loc), generator) for _ in range(count // len(prior.loc))])


def log_volume(prior: Prior) -> torch.Tensor:
    return prior.scale_tril.diagonal().log().sum()


def test_names_lead_to_classes():
    assert prior_names() == ["empirical", "exclusion", "gaussian", "interpolation", "structured", "text"]
    for name in prior_names():
        assert prior_class(name).__name__ == f"{name.capitalize()}Prior"
    with pytest.raises(ValueError, match="one of empirical, .* got 'cauchy'"):
        prior_class("cauchy")


@every_prior
def test_log_prob_is_one_number_a_prompt(case):
    prior = CASES[case](4)
    prompts = torch.stack([torch.stack([prior.sample(TOKENS, seeded(i + j)) for i in range(2)]) for j in range(5)])
    log_prob = prior.log_prob(prompts)
    assert log_prob.shape == (5, 2)
    torch.testing.assert_close(log_prob[3, 1], prior.log_prob(prompts[3, 1]))


@every_prior
def test_integrates_to_one_in_one_dimension(case):
    prior = CASES[case](1, 1).double()
    z = torch.linspace(-25, 25, 200_001, dtype=torch.float64)
    density = (prior.log_prob(prior.to_prompt(z[:, None, None])) + log_volume(prior)).exp()
    assert torch.trapezoid(density, z).item() == pytest.approx(1, abs=5e-4)


@every_prior
def test_integrates_to_one_in_two_dimensions(case):
    prior = CASES[case](2, 1).double()
    # Those with an edge are the same along every circle.
    radius = torch.linspace(0, 25, 20_001 if case in EXCLUDING else 2_001, dtype=torch.float64)
    angles = torch.arange(180, dtype=torch.float64) * math.pi / 90
    if case in EXCLUDING:
        angles = angles[::45]
    ring = torch.stack([angles.cos(), angles.sin()], dim=-1)
    mass = 0.0
    for direction in ring:
        log_prob = prior.log_prob(prior.to_prompt(radius[:, None, None] * direction))
        mass += torch.trapezoid((log_prob + log_volume(prior)).exp() * radius, radius).item() * 2 * math.pi / len(ring)
    # The Laplace density has corners that the angles see; all others are smooth along a circle.
    assert mass == pytest.approx(1, abs=5e-3 if case == "user" else 1e-3)


@every_prior
def test_gradient_is_that_of_the_value(case):
    prior = CASES[case](3).double()
    prompt = prior.sample(TOKENS, seeded()).requires_grad_()
    assert torch.autograd.gradcheck(prior.log_prob, prompt)


@every_prior
def test_samples_follow_the_density_in_one_dimension(case):
    prior = CASES[case](1, 1).double()
    drawn = torch.cat([prior.sample(1, generator) for generator in [seeded()] * 3000]).flatten()
    grid = prior.to_prompt(torch.linspace(-25, 25, 200_001, dtype=torch.float64)[:, None, None]).flatten()
    density = prior.log_prob(grid[:, None, None]).exp().numpy()
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid.numpy()))])
    assert stats.kstest(drawn.numpy(), lambda x: np.interp(x, grid.numpy(), cdf)).pvalue > 1e-3


@every_prior
def test_moments_of_samples_are_loc_and_scale_tril(case):
    prior = CASES[case](2)
    tokens = tokens_of(prior, 12_000)
    centred = (tokens - prior.loc).reshape(-1, 2)
    covariance = prior.scale_tril @ prior.scale_tril.mT * getattr(prior, "variance", 1.0)
    deviation = covariance.diagonal().sqrt()
    np.testing.assert_allclose(centred.mean(0) / deviation, 0, atol=0.05)
    np.testing.assert_allclose(centred.mT @ centred / len(centred) / deviation / deviation[:, None],
                               covariance / deviation / deviation[:, None], atol=0.08)  # fmt: skip


@pytest.mark.parametrize("dim", [2, 64, 2048])
@pytest.mark.parametrize("case", GAUSSIAN)
def test_radius_by_the_density_is_chi(case, dim):
    prior = CASES[case](dim)
    tokens = tokens_of(prior, 300)
    # The radius as the density has it, not as the draw made it; one virtual token off its location at a time.
    if prior.loc.ndim == 2:
        alone = prior.loc.expand(len(tokens), -1, -1).clone()
        alone[:, 0] = tokens[:, 0]
        drop = prior.log_prob(prior.loc) - prior.log_prob(alone)
    else:
        drop = prior.log_prob(prior.loc[None]) - prior.log_prob(tokens[0][:, None])
    assert stats.kstest((2 * drop).double().clamp_min(0).numpy(), stats.chi2(dim).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize("case", SMOOTH)
def test_samples_satisfy_steins_identity(case, dim):
    """E (θ − µ)·∇ log p(θ) = −d for every smooth density: it ties draws to the density in any dimension."""
    prior = CASES[case](dim)
    tokens = tokens_of(prior, 600).requires_grad_()
    (score,) = torch.autograd.grad(prior.log_prob(tokens).sum(), tokens)
    products = ((tokens - prior.loc) * score).sum(-1).detach().flatten().double()
    if case == "empirical_mixture":
        products = products.unflatten(0, (-1, TOKENS)).mean(-1)
    error = products.std() / math.sqrt(len(products))
    assert abs(products.mean() + dim) < 5 * error


@every_prior
def test_whitened_coordinates_are_exact(case):
    prior = CASES[case](64)
    z = torch.randn(TOKENS, 64, generator=seeded())
    prompt = prior.to_prompt(z)
    torch.testing.assert_close(prior.to_whitened(prompt), z, atol=2e-4, rtol=0)
    torch.testing.assert_close(prior.to_prompt(prior.to_whitened(prompt)), prompt, atol=1e-4, rtol=0)
    # AAᵀ is the same for the root that is applied and the triangular one.
    unit = prior.to_prompt(torch.eye(64)[:, None].expand(64, TOKENS, 64))[:, 0] - prior.to_prompt(0 * z)[0]
    torch.testing.assert_close(unit.mT @ unit, prior.scale_tril @ prior.scale_tril.mT, atol=1e-4, rtol=1e-4)
    assert not prior.scale_tril.triu(1).any()


@every_prior
def test_seed_decides_the_sample_and_nothing_else_does(case):
    prior = CASES[case](4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = prior.sample(TOKENS, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(prior.sample(TOKENS, seeded()), first)
    assert not torch.equal(prior.sample(TOKENS, seeded(1)), first)
    assert prior.sample(TOKENS).shape == first.shape == (TOKENS, 4)


@pytest.mark.parametrize("case", [name for name in CASES if name != "user"])
def test_round_trip_through_safetensors_is_exact(case, tmp_path):
    prior = CASES[case](16)
    save_file(prior.state_dict(), tmp_path / "prior.safetensors")
    again = prior_class(prior_family(prior)).from_state_dict(load_file(tmp_path / "prior.safetensors"))
    assert type(again) is type(prior)
    prompt = prior.sample(TOKENS, seeded())
    assert torch.equal(again.sample(TOKENS, seeded()), prompt)
    assert torch.equal(again.log_prob(prompt), prior.log_prob(prompt))
    assert torch.equal(again.to_whitened(prompt), prior.to_whitened(prompt))


@pytest.mark.parametrize("case", [name for name in CASES if name != "user"])
def test_load_state_dict_renews_what_was_derived(case):
    prior = CASES[case](8)
    other = copy.deepcopy(prior)
    for buffer in other.buffers():
        buffer.mul_(1.1)
    other.load_state_dict(prior.state_dict())
    prompt = prior.sample(TOKENS, seeded())
    assert torch.equal(other.log_prob(prompt), prior.log_prob(prompt))
    assert torch.equal(other.to_prompt(prompt), prior.to_prompt(prompt))


@every_prior
def test_prompt_of_another_width_is_refused_by_name(case):
    prior = CASES[case](4)
    for method in (prior.log_prob, prior.to_whitened):
        with pytest.raises(ValueError, match=r"prior's width 4 .* got shape \(3, 5\)"):
            method(torch.zeros(TOKENS, 5))
    if prior.loc.ndim == 2:
        with pytest.raises(ValueError, match=r"prior's 3 virtual tokens, got shape \(2, 4\)"):
            prior.log_prob(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="num_virtual_tokens must be the prior's 3, got 2"):
            prior.sample(2)


@every_prior
def test_prompts_are_evaluated_in_the_priors_precision(case):
    prior = CASES[case](64)
    prompt = prior.sample(TOKENS, seeded()).bfloat16()
    expected = prior.log_prob(prompt.float())
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(prior.log_prob(prompt.to(dtype)), expected)
        assert prior.to_prompt(prompt.to(dtype)).dtype == torch.float32


FITS = {
    "diagonal": lambda rows: GaussianPrior.fit(rows, diagonal=True),
    "full": StructuredPrior.fit,
    "oas": lambda rows: StructuredPrior.fit(rows, shrinkage="oas"),
    "low_rank": lambda rows: StructuredPrior.fit(rows, structure="low_rank"),
    "block": lambda rows: StructuredPrior.fit(rows, structure="block"),
    "mixture": lambda rows: StructuredPrior.fit(rows, structure="mixture", components=2),
    "exclusion": ExclusionPrior.fit,
    "interpolation": lambda rows: InterpolationPrior.fit((rows, rows.flip(0) * 2)),
    "empirical": lambda rows: EmpiricalPrior.fit(rows[:, None]),
}


@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("fit", FITS)
def test_fewer_rows_than_dimensions_are_positive_definite(fit, rows):
    some = reference(rows, 48)
    some[:, 5] = 1.0  # a coordinate that never varies
    prior = FITS[fit](some)
    triangle = prior.scale_tril.double()
    assert torch.linalg.eigvalsh(triangle @ triangle.mT).min() > 0
    tokens = len(prior.loc) if prior.loc.ndim == 2 else 5
    assert torch.isfinite(prior.log_prob(prior.sample(tokens, seeded())))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda rows: GaussianPrior.fit(rows, scale=-1.0), "scale must be > 0, got -1"),
        (lambda rows: StructuredPrior.fit(rows[0]), r"reference must be .* \[n, d\] .* got \(6,\)"),
        (lambda rows: StructuredPrior.fit(rows.numpy()), "reference must be a tensor .* got ndarray"),
        (lambda rows: StructuredPrior.fit(rows / 0), "reference must be finite, got 50 of 50 rows"),
        (lambda rows: StructuredPrior.fit(rows, structure="banded"), "structure must be one of full, .* got 'banded'"),
        (lambda rows: StructuredPrior.fit(rows, rank=3), "structure='full' takes shrinkage, got rank"),
        (lambda rows: StructuredPrior.fit(rows, shrinkage=2), r"shrinkage must be .* in \(0, 1\], got 2"),
        (lambda rows: StructuredPrior.fit(rows, structure="low_rank", rank=0), "rank must be .* >= 1, got 0"),
        (lambda rows: StructuredPrior.fit(rows, structure="block", block_size=4), "block_size must divide .* got 4"),
        (lambda rows: StructuredPrior.fit(rows, structure="mixture", components=99), r"in \[1, 25\], got 99"),
        (lambda rows: ExclusionPrior.fit(rows, method="walk"), "method must be .* got 'walk'"),
        (lambda rows: ExclusionPrior.fit(rows, quantile=99), r"quantile must be in \[0, 1\], got 99"),
        (lambda rows: ExclusionPrior.fit(rows, scale=0), "scale must be > 0, got 0"),
        (lambda rows: ExclusionPrior.fit(rows, method="rejection", c=1), "c must be > 1, got 1"),
        (lambda rows: InterpolationPrior.fit(rows), r"two tensors \(a, b\), got Tensor"),
        (lambda rows: InterpolationPrior.fit((rows, rows[:, :3])), "one width, got 6 and 3"),
        (lambda rows: InterpolationPrior.fit((rows, rows), path="arc"), "path must be .* got 'arc'"),
        (lambda rows: InterpolationPrior.fit((rows, -rows), path="great_circle"), "means that are not opposite"),
        (lambda rows: InterpolationPrior.fit((rows, rows), concentration=(1, 0)), "concentration must be .* got"),
        (
            lambda rows: TextPrior.fit(rows, token_embeddings=rows[0], num_virtual_tokens=2),
            r"token_embeddings must be .* got \(6,\)",
        ),
        (
            lambda rows: TextPrior.fit(rows, token_embeddings=rows[:, :3], num_virtual_tokens=2),
            r"reference's width 6, got \(50, 3\)",
        ),
        (
            lambda rows: TextPrior.fit(rows, token_embeddings=rows, num_virtual_tokens=2, spread=-1),
            "spread must be >= 0, got -1",
        ),
        (lambda rows: EmpiricalPrior.fit(rows), r"shape \[K, P, d\], got \(50, 6\)"),
        (lambda rows: EmpiricalPrior.fit(rows[None]), "at least 2 prompts, got 1"),
        (lambda rows: EmpiricalPrior.fit(rows[:, None], structure="full"), "structure must be .* got 'full'"),
        (lambda rows: EmpiricalPrior.from_state_dict({"loc": rows}), "tensors of a EmpiricalPrior .* got loc"),
        (
            lambda rows: DistributionPrior(torch.distributions.Normal(rows[0], 1.0)),
            r"event shape \[d\] and no batch shape, got \(\) and \(6,\): wrap",
        ),
        (
            lambda rows: DistributionPrior(
                torch.distributions.Independent(torch.distributions.Cauchy(rows[0], torch.ones(6)), 1)
            ),
            "finite mean and variance, got Independent",
        ),
    ],
)
def test_errors_name_the_argument_and_the_value(fit, message):
    with pytest.raises(ValueError, match=message):
        fit(reference(50, 6))
