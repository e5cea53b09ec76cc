"""Every algorithm finds the posterior where it is known."""

import math
from types import SimpleNamespace

import pytest
import torch
from toy import Toy, moments

from priors_peft.inference.base import inference_from, inference_names
from priors_peft.inference.laplace import best_precision, curvature, laplace_posterior, log_evidence
from priors_peft.inference.posterior import GaussianPosterior, MixturePosterior, SampledPosterior, posterior_from
from priors_peft.inference.sghmc import HamiltonianMonteCarlo, Sghmc
from priors_peft.inference.svgd import stein_gradients
from priors_peft.inference.variational import Variational, divergence
from priors_peft.priors import ExclusionPrior, GaussianPrior


def close(value, expected, tolerance):
    """Within a share of the largest entry."""
    return bool((value - expected).abs().max() <= tolerance * expected.abs().max())


def fit(toy, encoder, steps):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        toy.loss(encoder).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_variational_optimum_is_the_posterior_mean_and_its_conditional_variances(temperature):
    toy = Toy.make(temperature=temperature)
    encoder = toy.encoder()
    encoder.posterior = Variational().start(encoder)
    fit(toy, encoder, 3000)
    assert close(encoder.coordinate.detach()[0, 0], toy.mean, 0.02)
    # Of independent coordinates the nearest have the posterior's precisions.
    assert close(encoder.posterior.variance(None).detach()[0, 0], 1 / torch.linalg.inv(toy.covariance).diagonal(), 0.1)


@pytest.mark.slow
def test_the_variational_optimum_of_full_rank_is_the_posterior():
    toy = Toy.make()
    encoder = toy.encoder()
    encoder.posterior = Variational(rank=4).start(encoder)
    fit(toy, encoder, 4000)
    mean, covariance = moments(encoder)
    assert close(mean, toy.mean, 0.05) and close(covariance, toy.covariance, 0.15)


@pytest.mark.slow
def test_every_gaussian_of_a_mixture_finds_the_posterior():
    toy = Toy.make()
    encoder = toy.encoder()
    gaussians = [Variational(rank=4).start(encoder) for _ in range(3)]
    means = torch.stack([toy.encoder(seed=seed).coordinate.detach() for seed in (1, 2)])
    encoder.posterior = MixturePosterior(gaussians, means, trained=True)
    fit(toy, encoder, 4000)
    for mean, gaussian in encoder.posterior.parts(encoder.coordinate):
        draws = gaussian.sample(mean.detach(), 20_000, torch.Generator().manual_seed(1)).flatten(1)
        assert close(draws.mean(0), toy.mean, 0.05) and close(draws.T.cov(), toy.covariance, 0.15)
    mean, covariance = moments(encoder)
    assert close(mean, toy.mean, 0.05) and close(covariance, toy.covariance, 0.15)


def mixture(count=3, rank=2, shape=(1, 2, 3)):
    generator = torch.Generator().manual_seed(0)
    gaussians = [
        GaussianPosterior.of_scale(
            torch.rand(shape, generator=generator) + 0.1, torch.randn(rank, *shape, generator=generator)
        )
        for _ in range(count)
    ]
    coordinate, *means = torch.randn(count, *shape, generator=generator)
    return coordinate, MixturePosterior(gaussians, torch.stack(means), trained=False)


def test_a_mixtures_mean_and_variance_are_those_of_its_draws():
    coordinate, posterior = mixture()
    draws = posterior.sample(coordinate, 60_000, torch.Generator().manual_seed(1))
    assert torch.allclose(draws.mean(0), posterior.mean(coordinate), atol=0.03)
    assert torch.allclose(draws.var(0), posterior.variance(coordinate), rtol=0.03)
    posterior.scale_by(torch.full((1, 1, 1), 2.0))
    draws = posterior.sample(2 * coordinate, 60_000, torch.Generator().manual_seed(1))
    assert torch.allclose(draws.var(0), posterior.variance(2 * coordinate), rtol=0.03)


def test_a_mixture_draws_of_each_gaussian_equally_often():
    coordinate, posterior = mixture(rank=0)
    for gaussian in posterior.gaussians:
        gaussian.rho.fill_(-50.0)  # a point
    means = [mean.tolist() for mean, _ in posterior.parts(coordinate)]
    drawn = [posterior.sample(coordinate, count, torch.Generator().manual_seed(count)) for count in range(1, 8)]
    for draws in drawn:
        near = [min(range(3), key=lambda index: (draw - torch.tensor(means[index])).norm()) for draw in draws]
        counts = [near.count(index) for index in range(3)]
        assert max(counts) - min(counts) <= 1
    assert not torch.allclose(drawn[0], drawn[1][:1]) or not torch.allclose(drawn[0], drawn[2][:1])


def test_the_divergence_of_a_mixture_is_above_its_own_by_log_c_where_gaussians_are_far_apart():
    toy = Toy.make()
    scale = torch.full((1, 1, 4), 0.05)
    gaussians = [GaussianPosterior.of_scale(scale) for _ in range(3)]
    means = torch.tensor([[3.0, 0, 0, 0], [0, -3.0, 0, 0]]).view(2, 1, 1, 4)
    encoder = toy.encoder(MixturePosterior(gaussians, means, trained=False))
    parts = encoder.posterior.parts(encoder.coordinate.detach())
    each = [torch.distributions.Normal(mean.flatten(), 0.05) for mean, _ in parts]
    prior = torch.distributions.Normal(0.0, 1.0)
    alone = torch.stack([torch.distributions.kl_divergence(one, prior).sum() for one in each])
    found = divergence(encoder, encoder.component_samples()).item()
    assert found == pytest.approx(alone.mean().item(), rel=1e-5)
    draws = encoder.posterior.sample(encoder.coordinate.detach(), 30_000, torch.Generator().manual_seed(1)).flatten(1)
    log_q = torch.stack([one.log_prob(draws).sum(1) for one in each]).logsumexp(0) - math.log(3)
    assert found - (log_q - prior.log_prob(draws).sum(1)).mean().item() == pytest.approx(math.log(3), abs=0.05)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_variational_posterior_starts_as_wide_as_it_is_said(rank):
    start = Variational(initial_scale=0.1, rank=rank).start(SimpleNamespace(coordinate=torch.zeros(1, 20, 64)))
    assert start.variance(None).mean().sqrt().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_divergence_from_a_gaussian_prior_is_that_of_torch_distributions(rank):
    toy = Toy.make()
    generator = torch.Generator().manual_seed(2)
    scale, factor = torch.rand(1, 1, 4, generator=generator) + 0.1, torch.randn(rank, 1, 1, 4, generator=generator)
    encoder = toy.encoder(GaussianPosterior.of_scale(scale, factor))
    root = toy.prior.scale_tril
    covariance = scale.flatten().square().diag() + factor.flatten(1).mT @ factor.flatten(1)
    q = torch.distributions.MultivariateNormal(encoder().detach()[0, 0], root @ covariance @ root.mT)
    expected = torch.distributions.kl_divergence(q, toy.prior.distribution)
    assert divergence(encoder, encoder.samples(1)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_divergence_from_another_prior_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    gaussian = GaussianPrior(torch.zeros(3), torch.ones(3))
    toy = Toy.make(width=3)
    toy.prior = gaussian
    scale = torch.rand(1, 1, 3, generator=generator) + 0.5
    encoder = toy.encoder(GaussianPosterior.of_scale(scale))
    exact = divergence(encoder, encoder.samples(1)).item()
    gaussian.is_gaussian = False
    torch.manual_seed(0)
    drawn = [divergence(encoder, encoder.samples(1)).item() for _ in range(4000)]
    error = torch.tensor(drawn).std().item() / math.sqrt(len(drawn))
    assert abs(sum(drawn) / len(drawn) - exact) < 4 * error
    far = ExclusionPrior.fit(torch.randn(50, 3, generator=generator), c=2.0)
    toy.prior = far
    encoder = toy.encoder(GaussianPosterior.of_scale(scale))
    assert divergence(encoder, encoder.initial_prompt[None]).isfinite()


def test_the_laplace_posterior_and_evidence_of_a_linear_model_are_exact():
    toy = Toy.make()
    # Gradients whose second moment is the curvature XᵀX.
    gradients = (toy.design * math.sqrt(len(toy.design))).view(len(toy.design), 1, 1, -1)
    values, directions = curvature(gradients)
    encoder = toy.encoder(laplace_posterior(values, directions))
    encoder.coordinate.data[0, 0] = toy.mean
    mean, covariance = moments(encoder, 200_000)
    assert close(mean, toy.mean, 0.01) and close(covariance, toy.covariance, 0.02)
    assert torch.allclose(encoder.posterior.variance(encoder.coordinate)[0, 0], toy.covariance.diagonal(), atol=1e-5)
    likelihood = -toy.nll(encoder()).item()
    evidence = log_evidence(likelihood, toy.mean.square().sum().item(), values, 4)
    assert evidence == pytest.approx(toy.log_evidence, rel=1e-5)


def test_directions_without_curvature_keep_the_priors_spread():
    gradients = torch.zeros(3, 1, 1, 5)
    gradients[:, 0, 0, 0] = torch.tensor([1.0, -2.0, 3.0])
    values, directions = curvature(gradients)
    posterior = laplace_posterior(values, directions)
    assert values.shape == (1,) and values.item() == pytest.approx(14 / 3)
    assert torch.allclose(posterior.variance(None)[0, 0], torch.tensor([3 / 17, 1, 1, 1, 1]))


def test_the_best_precision_has_the_most_evidence_of_its_neighbours():
    values = torch.tensor([5.0, 2.0, 0.5])
    best = best_precision(1.3, values)

    def evidence(precision):
        return log_evidence(0.0, 1.3, values, 10, precision)

    assert evidence(best) > max(evidence(best * 1.01), evidence(best / 1.01))


@pytest.mark.parametrize("friction", [0.1, 1.0])
def test_hamiltonian_and_langevin_dynamics_stay_in_the_posterior(friction):
    toy = Toy.make()
    # Many chains at once: rows of one parameter, each with its own energy.
    chains = torch.nn.Parameter(torch.zeros(2000, 4))
    optimizer = HamiltonianMonteCarlo([chains], lr=0.05, friction=friction, scale=len(toy.inputs))
    torch.manual_seed(0)
    precision = torch.linalg.inv(toy.covariance)
    for _ in range(400 if friction < 1 else 2000):
        centred = chains.detach() - toy.mean
        chains.grad = centred @ precision / len(toy.inputs)
        optimizer.step()
    assert close(chains.detach().mean(0), toy.mean, 0.1)
    assert close(chains.detach().T.cov(), toy.covariance, 0.12)


def test_a_chain_goes_on_at_the_temperature_it_is_given_not_the_checkpoints():
    chain = torch.zeros(3, requires_grad=True)
    begun, given = (
        HamiltonianMonteCarlo([chain], lr=0.1, friction=0.5, scale=scale, is_noisy=lambda: False)
        for scale in (1.0, 2.0)
    )
    given.load_state_dict(begun.state_dict())
    chain.grad = torch.ones(3)
    given.step()
    assert torch.allclose(chain, torch.full((3,), -0.02))


def test_draws_are_bounded_in_number_and_fall_in_the_noisy_part_of_each_cycle():
    sampler = Sghmc(num_samples=7, cycles=2)
    kept = sampler.kept_steps(100)
    assert len(kept) == 7 and 50 in kept and 100 in kept
    assert all(step % 50 > 25 or step % 50 == 0 for step in kept)
    assert [sampler.schedule(step, 100) for step in (0, 50)] == [1, 1] and sampler.schedule(99, 100) < 0.1


def test_particles_reach_the_posterior():
    toy = Toy.make()
    generator = torch.Generator().manual_seed(0)
    particles = torch.randn(100, 4, generator=generator).requires_grad_()
    precision = torch.linalg.inv(toy.covariance)
    optimizer = torch.optim.Adam([particles], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        energy = (particles.detach() - toy.mean) @ precision
        particles.grad = stein_gradients(particles.detach(), energy)
        optimizer.step()
        schedule.step()
    assert close(particles.detach().mean(0), toy.mean, 0.05)
    assert close(particles.detach().T.cov(), toy.covariance, 0.25)


def test_particles_in_one_place_move_by_their_mean_gradient():
    gradients = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    found = stein_gradients(torch.ones(3, 2), gradients)
    assert torch.allclose(found, gradients.mean(0).expand(3, -1), atol=1e-6)


def test_draws_come_once_each_before_any_comes_again():
    draws = torch.arange(5.0).view(5, 1, 1, 1)
    taken = SampledPosterior(draws).sample(torch.zeros(1, 1, 1), 7, torch.Generator().manual_seed(0)).flatten()
    assert sorted(taken[:5].tolist()) == [0, 1, 2, 3, 4] and len(taken) == 7


@pytest.mark.parametrize(
    "posterior",
    [
        GaussianPosterior.of_scale(torch.full((1, 2, 3), 0.3), torch.randn(2, 1, 2, 3)),
        SampledPosterior(torch.randn(4, 1, 2, 3)),
        laplace_posterior(torch.tensor([3.0]), torch.ones(1, 1, 2, 3) / math.sqrt(6)),
    ],
    ids=["gaussian", "sampled", "directional"],
)
def test_a_stored_posterior_gives_the_same_draws(posterior):
    again = posterior_from(posterior.state_dict(), trained=False)
    mean = torch.randn(1, 2, 3)
    first, second = (of.sample(mean, 3, torch.Generator().manual_seed(5)) for of in (posterior, again))
    assert torch.equal(first, second)


def test_algorithms_and_their_settings_are_named_in_errors():
    assert inference_names() == ["laplace", "map", "sghmc", "svgd", "variational"]
    with pytest.raises(ValueError, match="inference must be one of laplace, map, sghmc, svgd, variational, got 'vi'"):
        inference_from("vi", {})
    with pytest.raises(ValueError, match="inference_kwargs of inference='svgd' must be among num_particles, got k"):
        inference_from("svgd", {"k": 3})
    with pytest.raises(ValueError, match="num_particles must be an integer >= 2, got 1"):
        inference_from("svgd", {"num_particles": 1})


@pytest.mark.slow
def test_the_scale_of_most_evidence_is_found_with_the_posterior():
    """Against a grid of scales, each with its own exact evidence."""
    toy = Toy.make(rows=20, width=4)
    encoder = toy.encoder()
    encoder.free_scale = True
    encoder.posterior = Variational(rank=4).start(encoder)
    fit(toy, encoder, 4000)
    prompt = encoder().detach()
    draws = encoder.samples(5, torch.Generator().manual_seed(0)).detach()
    factor = (encoder.coordinate.square() + encoder.posterior.variance(None)).detach().mean((1, 2)).sqrt()
    grid = torch.logspace(-1, 1, 201)
    exact = [Toy(toy.inputs, toy.outputs, toy.prior.scaled(float(scale)), 1.0).log_evidence for scale in grid]
    best = grid[int(torch.tensor(exact).argmax())].item()
    assert factor.item() == pytest.approx(best, rel=0.1)
    encoder.rescale(factor)
    assert torch.allclose(encoder(), prompt, atol=1e-5)
    assert torch.allclose(encoder.samples(5, torch.Generator().manual_seed(0)), draws, atol=1e-5)
