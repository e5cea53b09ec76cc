"""The law of tasks that are known by posteriors: a normal-normal model with a known answer."""

import pytest
import torch
from conftest import make_model

from priors_peft import PriorConfig, get_prior_model
from priors_peft.hub.adapter import read_adapter
from priors_peft.inference.posterior import GaussianPosterior, SampledPosterior
from priors_peft.priors import EmpiricalPrior, GaussianPrior, StructuredPrior, TaskPosteriors


DIM, TOKENS = 6, 3


def training_prior(scale=1.0, place=0.0):
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(DIM, DIM, generator=generator).tril(-1) * 0.3 + torch.diag(torch.linspace(0.5, 2, DIM))
    return StructuredPrior(torch.linspace(-1, 1, DIM) + place, root * scale)


def tasks(count, spread, noise, seed=0, prior=None):
    """Posteriors under a training prior of tasks z_k ~ N(µ, spread²), each seen once with noise; and the truth.

    In whitened coordinates of `training_prior()`, where the tasks, their mean and noise are.
    """
    base, prior = training_prior(), prior or training_prior()
    generator = torch.Generator().manual_seed(seed)
    centre = 0.5 * torch.randn(TOKENS, DIM, generator=generator)
    seen = centre + (spread**2 + noise**2) ** 0.5 * torch.randn(count, TOKENS, DIM, generator=generator)
    # The training prior in those coordinates: the same root, but for its scale.
    width = (prior.scale_tril[0, 0] / base.scale_tril[0, 0]).square()
    place = base.to_whitened(prior.loc.expand(TOKENS, DIM))
    variance = 1 / (1 / noise**2 + 1 / width)
    mean = variance * (seen / noise**2 + place / width)
    own = torch.full_like(mean, (variance / width).item())  # in the training prior's own coordinates
    return TaskPosteriors([prior] * count, base.to_prompt(mean), own), centre


def law(prior):
    """Mean and mean variance of a fitted prior in the coordinates of `training_prior()`."""
    base = training_prior()
    inverse = torch.linalg.inv(base.scale_tril)
    covariance = inverse @ prior.scale_tril @ prior.scale_tril.mT @ inverse.mT
    return base.to_whitened(prior.loc), covariance.diagonal().mean().item()


@pytest.mark.parametrize(("spread", "noise"), [(1.0, 1.0), (0.5, 0.3), (0.5, 1.0)])
def test_mean_and_spread_of_the_tasks_are_found_where_points_and_the_mixture_miss_them(spread, noise):
    posteriors, centre = tasks(400, spread, noise)
    mean, variance = law(EmpiricalPrior.fit(posteriors))
    point_mean, point_variance = law(EmpiricalPrior.fit(posteriors.prompts))
    mixture = point_variance + posteriors.variance.mean().item()
    assert variance == pytest.approx(spread**2, rel=0.2)
    assert abs(variance - spread**2) < abs(point_variance - spread**2)
    assert mixture > spread**2 * 1.15 or spread == 1  # the mixture is right where the training prior is the law
    assert (mean - centre).square().mean() < 0.5 * (point_mean - centre).square().mean()


def test_more_data_a_task_or_more_tasks_come_nearer_to_the_truth():
    errors = [abs(law(EmpiricalPrior.fit(tasks(*case)[0]))[1] - 0.25) for case in ((20, 0.5, 2.0), (400, 0.5, 0.5))]
    assert errors[1] < 0.02 < errors[0]


def test_certain_posteriors_are_points():
    posteriors, _ = tasks(8, 0.3, 1e-3)
    fitted, points = (EmpiricalPrior.fit(reference, rank=2) for reference in (posteriors, posteriors.prompts))
    torch.testing.assert_close(fitted.loc, points.loc, atol=0.05, rtol=0)
    assert law(fitted)[1] == pytest.approx(law(points)[1], rel=0.1)


def test_where_no_data_speak_the_training_prior_comes_back():
    prior = training_prior()
    posteriors = TaskPosteriors([prior] * 4, prior.loc.expand(4, TOKENS, DIM), torch.ones(4, TOKENS, DIM))
    fitted = EmpiricalPrior.fit(posteriors, rank=DIM)
    torch.testing.assert_close(fitted.loc, prior.loc.expand(TOKENS, DIM))
    covariances = [one.scale_tril @ one.scale_tril.mT for one in (fitted, prior)]
    torch.testing.assert_close(covariances[0].diagonal(), covariances[1].diagonal(), atol=1e-4, rtol=1e-3)
    assert (
        law(EmpiricalPrior.fit(posteriors.prompts + 1e-3 * torch.randn(4, TOKENS, DIM)))[1] < 0.01
    )  # points are not wide


def test_posteriors_under_other_training_priors_tell_of_the_same_law():
    here, there = training_prior(), training_prior(scale=1.5, place=3.0)
    found = [tasks(400, 0.5, 0.7, prior=prior)[0] for prior in (here, there)]
    laws = [law(EmpiricalPrior.fit(posteriors)) for posteriors in found]
    torch.testing.assert_close(laws[0][0], laws[1][0], atol=0.1, rtol=0)
    assert laws[0][1] == pytest.approx(laws[1][1], rel=0.1)
    # Half of the tasks had one and half the other, in the form of another family: its root is turned, and each virtual
    # token has a location.
    values, directions = torch.linalg.eigh(there.scale_tril @ there.scale_tril.mT)
    scale = 0.9 * values.min().sqrt()
    turned = EmpiricalPrior(there.loc.expand(TOKENS, DIM), scale.expand(DIM), directions, values.sqrt() / scale)
    mixed = TaskPosteriors(
        [here] * 200 + [turned] * 200,
        torch.cat([found[0].prompts[:200], found[1].prompts[200:]]),
        torch.cat([found[0].variance[:200], found[1].variance[200:]]),
    )
    mean, variance = law(EmpiricalPrior.fit(mixed))
    torch.testing.assert_close(mean, laws[0][0], atol=0.1, rtol=0)
    assert variance == pytest.approx(laws[0][1], rel=0.1)


def test_a_posterior_that_has_not_converged_does_not_blow_the_prior_up():
    # As wide as the prior, but about its start: divided by the prior it would be a task very far away.
    generator = torch.Generator().manual_seed(0)
    prior = GaussianPrior(torch.zeros(50), torch.ones(50))
    starts = torch.randn(6, TOKENS, 50, generator=generator)
    fitted = EmpiricalPrior.fit(TaskPosteriors([prior] * 6, starts, torch.full_like(starts, 0.995)))
    assert 1 < (fitted.scale_tril @ fitted.scale_tril.mT).diagonal().mean() < 3


def test_adapters_with_posteriors_are_taken_as_such_and_points_as_before(tmp_path):
    for number in range(3):
        model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, seed=number, inference="variational"))
        encoder = model.prompt_encoder["default"]
        for name, posterior in {
            "point": None,
            "known": GaussianPosterior.of_scale(torch.full(encoder.coordinate.shape, 0.9), trained=True),
            "drawn": SampledPosterior(encoder.coordinate + torch.randn(8, *encoder.coordinate.shape)),
        }.items():
            encoder.posterior = posterior
            model.active_peft_config.inference = "map" if posterior is None else "variational"
            model.save_pretrained(tmp_path / f"{name}{number}")

    def fitted(*names):
        settings = {
            "reference": "adapters",
            "reference_kwargs": {"adapters": [str(tmp_path / name) for name in names]},
        }
        config = PriorConfig(num_virtual_tokens=4, prior="empirical", prior_kwargs={"rank": 2}, **settings)
        return get_prior_model(make_model(), config).prompt_encoder["default"].priors[0]

    points = fitted("point0", "point1", "point2")
    prompts = [read_adapter(tmp_path / f"point{number}").prompt[0] for number in range(3)]
    expected = EmpiricalPrior.fit(torch.stack(prompts), rank=2)
    torch.testing.assert_close(points.loc, expected.loc)
    torch.testing.assert_close(points.scale, expected.scale)
    for names in (("known0", "known1", "known2"), ("drawn0", "drawn1", "drawn2"), ("point0", "known1", "drawn2")):
        assert not torch.allclose(fitted(*names).loc, points.loc, atol=1e-3)
