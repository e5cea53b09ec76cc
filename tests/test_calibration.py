"""What is said of how sure a prompt is does not hang on how its rows come."""

import pytest
import torch
from conftest import addition_rows, make_tokenizer
from test_trainer import make_trainer

from priors_peft.calibration import calibration, calibration_of, row_bins
from priors_peft.inference.posterior import GaussianPosterior
from priors_peft.inference.predictive import predict


def test_calibration_errs_by_the_gap_between_confidence_and_accuracy():
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 1.0, 0.0])
    right = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    found = calibration(confidence, right)
    # Of 5 in the highest interval 4 are right at a mean confidence of 0.96; 2 at 0.55 are half right; 1 at 0 is wrong.
    assert found.counts == [1, 0, 0, 0, 0, 2, 0, 0, 0, 5]
    assert found.error == pytest.approx((5 * (0.96 - 0.8) + 2 * 0.05) / 8)


def test_chance_is_the_mean_error_of_what_is_right_as_often_as_it_is_sure():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.cat([torch.rand(90, generator=generator), torch.full((7,), 0.999), torch.tensor([0.0, 1.0])])
    drawn = [calibration(confidence, torch.rand(99, generator=generator) < confidence) for _ in range(2000)]
    mean = sum(one.error for one in drawn) / len(drawn)
    assert 1 <= drawn[0].chance / mean < 1.02
    many = calibration(confidence.repeat(100), confidence.repeat(100) > 0.5)
    assert many.chance == pytest.approx(drawn[0].chance / 10, rel=0.05)
    assert calibration(torch.ones(3), torch.ones(3)).chance == 0


def test_rows_add_up_to_the_calibration_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    confidence, rows = torch.rand(500, generator=generator), torch.randint(7, (500,), generator=generator)
    right = torch.rand(500, generator=generator) < confidence**2
    whole, parts = calibration(confidence, right), row_bins(rows, 7, confidence, right)
    assert calibration_of(parts.sum(0)).error == pytest.approx(whole.error, rel=1e-5)
    assert calibration_of(parts.sum(0)).counts == whole.counts
    assert parts[:, 0].sum(1).tolist() == torch.bincount(rows, minlength=7).tolist()


@pytest.mark.parametrize("draws", [1, 3])
def test_evaluation_gives_the_calibration_of_what_is_predicted(tmp_path, draws):
    trainer = make_trainer(tmp_path, config={"inference": "map"}, posterior_draws=draws)
    rows, encoder = addition_rows(9, start=300), trainer.model.prompt_encoder["default"]
    if draws > 1:
        encoder.posterior = GaussianPosterior.of_scale(torch.full(encoder.coordinate.shape, 0.5))
    figures = trainer.evaluate(rows)
    alone = predict(trainer.model, make_tokenizer(), rows, draws)
    assert figures["eval_ece"] == pytest.approx(alone.calibration.error, rel=1e-4)
    assert figures["eval_loss"] == pytest.approx(alone.nll, rel=1e-4)
    assert trainer.calibrations["default"].counts == alone.calibration.counts
    assert sum(alone.calibration.counts) == alone.num_tokens
