"""What a `PriorConfig` decides where its user does not."""

import pytest
import torch
from conftest import make_model
from peft import get_peft_model

from priors_peft import PriorConfig


@pytest.mark.parametrize(
    ("given", "inference", "prior_weight"),
    [
        ({}, "variational", 0.01),
        ({"prior": "gaussian"}, "variational", 0.01),
        ({"inference": "variational"}, "variational", 0.01),
        ({"inference": "sghmc"}, "sghmc", 0.1),
        ({"inference": "laplace"}, "laplace", 1.0),
        ({"inference": "variational", "prior_weight": 0.2}, "variational", 0.2),
        # A weight alone is MAP's, 0 and "auto" among them.
        ({"prior_weight": 1.0}, "map", 1.0),
        ({"prior_weight": 0}, "map", 0),
        ({"prior_weight": "auto"}, "map", "auto"),
        # Where nothing else was measured, or can be.
        ({"inference": "map"}, "map", 1.0),
        ({"coordinates": "plain"}, "map", 1.0),
        ({"tuning": "deep"}, "map", 1.0),
        ({"prior": "text"}, "map", 1.0),
        ({"prior": "exclusion"}, "map", 1.0),
        ({"prior": torch.distributions.Normal(torch.zeros(4), 1.0)}, "map", 1.0),
    ],
)
def test_what_is_left_open_is_decided_by_what_is_given(given, inference, prior_weight):
    config = PriorConfig(num_virtual_tokens=4, **given)
    assert (config.inference, config.prior_weight) == (inference, prior_weight)
    again = PriorConfig(
        num_virtual_tokens=4, **{name: config.to_dict()[name] for name in ("inference", "prior_weight")}
    )
    assert (again.inference, again.prior_weight) == (inference, prior_weight)


@pytest.mark.parametrize(
    ("given", "start"),
    [({}, "states"), ({"prior": "text"}, "draws"), ({"deep_init": "draws"}, "draws"), ({"tuning": "soft"}, None)],
)
def test_a_deep_prompt_of_a_gaussian_starts_with_states_unless_told_otherwise(given, start):
    assert PriorConfig(**{"num_virtual_tokens": 4, "tuning": "deep"} | given).deep_init == start


def test_an_unknown_start_is_refused_by_name():
    with pytest.raises(ValueError, match="deep_init must be .*'state'"):
        PriorConfig(num_virtual_tokens=4, tuning="deep", deep_init="state")


@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_pefts_own_function_says_which_builds_a_prompt_with_a_prior(tuning):
    config = PriorConfig(num_virtual_tokens=4, tuning=tuning)
    with pytest.raises(AttributeError, match="Use priors_peft.get_prior_model"):
        get_peft_model(make_model(), config)
    assert getattr(config, "prompt_tuning_init", None) is None
    with pytest.raises(AttributeError, match="'PriorConfig' object has no attribute 'no_such_field'"):
        config.no_such_field  # noqa: B018
