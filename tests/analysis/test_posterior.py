"""What an analysis says of a posterior beside its prior: closed forms, and points that stay as they were."""

import copy

import matplotlib
import pytest
import torch
from conftest import make_model, make_tokenizer
from planted_analysis import planted

from priors_peft import PriorConfig, PriorPeftModel, get_prior_model
from priors_peft.analysis import analyze, claims
from priors_peft.analysis.pictures import posterior as picture
from priors_peft.analysis.pictures.style import STYLE
from priors_peft.analysis.posterior import (
    DRAWS,
    kl_divergence,
    nearest_agreement,
    posterior_draws,
    posterior_spread,
)
from priors_peft.analysis.report import save_report
from priors_peft.inference.laplace import laplace_posterior
from priors_peft.inference.posterior import GaussianPosterior, MixturePosterior, SampledPosterior


P = 4


def tuned(posterior=None, **settings):
    """A model with a prompt whose posterior is made of its coordinate's shape."""
    config = PriorConfig(**{"num_virtual_tokens": P, "prior": "gaussian"} | settings)
    model = get_prior_model(make_model(), config, tokenizer=make_tokenizer())
    encoder = model.prompt_encoder["default"]
    if posterior is not None:
        encoder.posterior = posterior(encoder.coordinate)
    return model


def gaussian(scale):
    return lambda coordinate: GaussianPosterior.of_scale(torch.full(coordinate.shape, scale), trained=True)


def saved(folder, posterior=None, **settings):
    tuned(posterior, **settings).save_pretrained(folder)
    return str(folder)


def run(*adapters):
    return analyze(adapters, make_model(), make_tokenizer(), progress=False, num_draws=40, k=3)


def test_determined_directions_are_those_that_mackay_counts():
    curvature = torch.tensor([9.0, 1.0, 0.25])
    encoder = tuned().prompt_encoder["default"]
    shape = encoder.coordinate.shape
    directions = torch.linalg.qr(torch.randn(encoder.coordinate.numel(), 3)).Q.mT.reshape(3, *shape)
    encoder.posterior = laplace_posterior(curvature, directions)
    spread = posterior_spread(encoder.variance()[0])
    expected = (curvature / (curvature + 1)).sum() / encoder.coordinate.numel()
    assert spread.determined.mean().item() == pytest.approx(expected.item(), rel=1e-4)


def test_width_is_in_prior_standard_deviations_and_draws_count_as_a_sample():
    encoder = tuned(gaussian(0.3)).prompt_encoder["default"]
    assert posterior_spread(encoder.variance()[0]).deviation.tolist() == pytest.approx([0.3] * P, rel=1e-4)
    draws = encoder.coordinate.detach() + 0.3 * torch.randn(400, *encoder.coordinate.shape)
    encoder.posterior = SampledPosterior(draws)
    with torch.no_grad():
        encoder.coordinate.copy_(draws.mean(0))
    assert posterior_spread(encoder.variance()[0]).deviation.tolist() == pytest.approx([0.3] * P, rel=0.05)
    assert torch.allclose(encoder.variance(), draws.var(0), rtol=1e-4)


def test_divergence_is_that_of_the_two_gaussians():
    encoder = tuned(gaussian(0.5)).prompt_encoder["default"]
    q = torch.distributions.Normal(encoder.coordinate.detach(), 0.5)
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum().item()
    assert kl_divergence(encoder) == pytest.approx(expected, rel=1e-5)
    encoder.posterior = SampledPosterior(encoder.coordinate.detach()[None])
    assert kl_divergence(encoder) is None


def test_agreement_is_the_share_of_draws_with_the_means_token():
    vocabulary = torch.eye(6)
    draws = vocabulary[torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])]
    assert nearest_agreement(torch.tensor([0, 1]), draws, vocabulary).tolist() == [0.75, 0.75]


def test_all_draws_that_were_kept_are_looked_at_each_once():
    encoder = tuned(lambda z: SampledPosterior(z.detach() + torch.randn(5, *z.shape))).prompt_encoder["default"]
    assert len(posterior_draws(encoder).unique(dim=0)) == 5
    encoder.posterior = gaussian(0.1)(encoder.coordinate)
    assert len(posterior_draws(encoder)) == DRAWS
    assert torch.equal(posterior_draws(encoder, 3), posterior_draws(encoder, 3))
    encoder.posterior = None
    assert posterior_draws(encoder) is None


def test_an_analysis_holds_the_posterior_beside_its_prior(tmp_path):
    settings = {"inference": "variational", "inference_kwargs": {"initial_scale": 0.05}}
    adapters = [
        saved(tmp_path / "narrow", gaussian(1e-4), **settings),
        saved(tmp_path / "point", inference="map"),
        saved(tmp_path / "wide", gaussian(1.0), **settings),
    ]
    found = run(*adapters)
    narrow, point, wide = (adapter["posterior"] for adapter in found["adapters"])
    assert point is None and claims.posterior(found["adapters"][1]) is None
    assert narrow["agreement"] == [1.0] * P and sum(wide["agreement"]) < 0.5 * P
    assert narrow["deviation"] == pytest.approx(1e-4, rel=1e-3) and wide["determined"] == pytest.approx(0, abs=1e-4)
    assert (narrow["initial_deviation"], narrow["num_draws"]) == (0.05, DRAWS)
    for adapter, kinds in zip(found["adapters"], (True, False, True), strict=True):
        for measure in adapter["geometry"]["layers"][0]["series"]["measures"].values():
            assert (measure["posterior"] is not None) == kinds
        groups = [group for group in found["projection"]["pca"]["groups"] if group["name"] == adapter["name"]]
        assert any(group["kind"] == "posterior" for group in groups) == kinds
    norm = found["adapters"][0]["geometry"]["layers"][0]["series"]["measures"]["norm"]
    assert norm["posterior"] == pytest.approx([norm["values"][-1]] * 2, rel=1e-3)
    # The means are alike, and so is what is said of them.
    assert found["adapters"][0]["tokens"] == found["adapters"][1]["tokens"]


def test_of_a_mixture_it_is_told_how_wide_its_gaussians_are(tmp_path):
    def mixture(coordinate):
        far = torch.stack([coordinate.detach() + 5, coordinate.detach() - 5])
        return MixturePosterior([gaussian(0.2)(coordinate) for _ in range(3)], far, trained=True)

    path = saved(tmp_path / "mixture", mixture, inference="variational")
    adapter = run(path)["adapters"][0]
    found = adapter["posterior"]
    assert found["components"] == 3 and found["deviation"] == pytest.approx(0.2)
    assert found["determined"] == pytest.approx(0.96)
    assert claims.posterior(adapter).startswith("each of the posterior's 3 Gaussians 0.2 times as wide as the prior")
    encoder = PriorPeftModel.from_pretrained(make_model(), str(path)).prompt_encoder["default"]
    parts = encoder.posterior.parts(encoder.coordinate)
    one = [torch.distributions.Normal(mean, 0.2) for mean, _ in parts]
    alone = [torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum().detach() for q in one]
    assert found["kl"] == pytest.approx(torch.stack(alone).mean().item(), rel=1e-4)


def test_layers_of_deep_posteriors_have_a_width_each(tmp_path):
    def widening(z):
        return GaussianPosterior.of_scale(
            torch.tensor([0.2, 0.4])[:, None, None].expand(z.shape).clone(), trained=True
        )

    path = saved(tmp_path / "deep", widening, tuning="deep", layers=[0, 1], inference="variational")
    found = run(path)["adapters"][0]["posterior"]
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert [sum(layer["deviation"]) / P for layer in found["layers"]] == pytest.approx([0.2, 0.4], rel=1e-3)
    assert found["deviation"] == pytest.approx(0.3, rel=1e-3)


def with_posteriors(measured, **parts):
    analysis = copy.deepcopy(planted(**parts))
    for index, adapter in enumerate(analysis["adapters"][:measured]):
        tokens = adapter["num_virtual_tokens"]
        spread = {"layer": 0, "deviation": [0.2 + 0.1 * index] * tokens, "determined": [0.9] * tokens}
        adapter["posterior"] = {
            "inference": "variational", "prior_weight": 0.1, "num_draws": 32, "deviation": 0.2 + 0.1 * index,
            "determined": 0.9, "kl": 123.4 if index else None, "initial_deviation": 0.1 if index else None,
            "agreement": [0.5] * tokens, "layers": [spread] * len(adapter["layers"]),
        }  # fmt: skip
        for measure in adapter["geometry"]["layers"][0]["series"]["measures"].values():
            measure["posterior"] = measure["band"]
    return analysis


@pytest.mark.parametrize(
    ("count", "parts"),
    [(1, {"count": 1}), (2, {}), (9, {"count": 9}), (1, {"count": 1, "virtual_tokens": 60, "snapshots": 2})],
)
def test_pictures_say_how_wide_posteriors_are(count, parts):
    analysis = with_posteriors(count, **parts)
    with matplotlib.rc_context(STYLE):
        figure = picture.draw(analysis)
        figure.draw_without_rendering()
    title = figure._suptitle.get_text().replace("\n", " ")
    if count == 1:
        assert (
            "posterior 0.2 times as wide as the prior, 10 % of its variance; draws keep the prompt's nearest tokens 50 %"
            in title
        )
    else:
        assert f"Posteriors of {count} prompts are 0.2 to {'0.3' if count == 2 else '1'} times as wide" in title
    assert picture.draw(planted(**parts)) is None


def test_the_report_tells_of_posteriors(tmp_path):
    page = save_report(with_posteriors(2), tmp_path / "report.html").read_text()
    assert (
        "posterior 0.3 times as wide as the prior (0.1 when training began)" in page and "KL(q ‖ p) 123 nats" in page
    )
