"""Where prompts end up follows from where they were planted."""

import math

import pytest
import torch
from test_compare import COUNT, WIDTH, named, run

from priors_peft.analysis.compare import Run
from priors_peft.analysis.places import between_and_within, distance, place, regions


def grid(moved: float, apart: float, seeds: int = 4, scale: float = 1.0) -> list[Run]:
    """Two tasks, two priors `apart`, every run moved from its start by `moved`."""
    return named(
        *(
            run(task, prior, seed, loc=loc, moved=moved, scale=scale)
            for task in ("math", "squad")
            for prior, loc in (("gaussian", 0.0), ("structured", apart))
            for seed in range(seeds)
        )
    )


def test_prompts_that_stay_by_distant_starts_tell_their_prior():
    runs = grid(moved=0.5, apart=10.0)
    found = place(runs, num_permutations=199)
    assert found["moved"] == pytest.approx(0.5, rel=1e-4)
    # Seeds share their noise, so that a start of the other prior is 10 away, and 0.5 more or less.
    assert found["to_other_starts"] == pytest.approx(10, rel=1e-4)
    assert (found["nearest_start"], found["likeliest"], found["likeliest_at_start"]) == (1.0, 1.0, 1.0)
    assert found["distances"]["prior"] == pytest.approx(10, rel=1e-4)
    assert found["distances"]["task"] == pytest.approx(0, abs=1e-6)
    assert found["distances"]["seed"] == pytest.approx(math.sqrt(2), rel=0.1)
    # One shuffling in 64 gives the same groups.
    assert found["mmd"]["between"] > found["mmd"]["within"] + 0.1 and found["mmd"]["p_value"] < 0.05
    assert found["chance"] == 0.5


def test_prompts_that_left_their_starts_for_the_other_prior_do_not():
    runs = grid(moved=0.0, apart=10.0)
    for one in runs:
        one.prompt = one.start + (10.0 if one.prior == "gaussian" else 0.0)
    found = place(runs, num_permutations=199)
    assert (found["nearest_start"], found["likeliest"], found["likeliest_at_start"]) == (0.5, 0.5, 1.0)
    assert found["distances"]["prior"] == pytest.approx(0, abs=1e-5)


def test_the_permutation_test_keeps_its_level_where_priors_are_one():
    values = []
    for repeat in range(40):
        runs = [run("math", prior, 10 * repeat + seed) for seed in range(4) for prior in ("gaussian", "structured")]
        for index, one in enumerate(runs):  # no shared draw
            one.prompt = torch.randn(1, COUNT, WIDTH, generator=torch.Generator().manual_seed(1000 * repeat + index))
        values.append(between_and_within(named(*runs), 99, seed=repeat)["p_value"])
    assert 0.3 < sum(values) / len(values) < 0.7
    assert sum(value <= 0.05 for value in values) <= 6


def test_spread_alone_tells_priors_apart_too():
    runs = [
        run("math", prior, seed, scale=scale)
        for prior, scale in (("gaussian", 1.0), ("structured", 0.1))
        for seed in range(5)
    ]
    found = between_and_within(named(*runs), 199, 0)
    assert found["between"] > found["within"] + 0.05 and found["p_value"] < 0.1


def test_one_seed_has_no_spread_within_a_prior():
    assert place(grid(moved=0.1, apart=1.0, seeds=1), 9)["mmd"] is None
    with pytest.raises(ValueError, match="at least 2 priors"):
        place(named(run(), run(seed=1)), 9)
    with pytest.raises(ValueError, match="with one task and seed, got gaussian, structured"):
        place(named(run("math"), run("squad", "structured")), 9)


def test_distance_is_the_root_mean_square():
    assert distance(torch.zeros(2, 3), torch.full((2, 3), 2.0)) == 2.0


# Far from the vocabulary.


def test_regions_count_runs_beyond_the_edge_and_what_they_gain():
    runs = named(
        run(nll=1.0, loc=0.0, scale=0.01),
        run(prior="exclusion", nll=1.2, loc=10.0, scale=0.01),
        run(seed=1, nll=1.5, loc=0.0, scale=0.01, moved=9.0),
        run(prior="exclusion", seed=1, nll=2.5, loc=10.0, scale=0.01),
    )
    found = regions(runs, lambda points: points.norm(dim=-1) / 4, edge=5.0, no_prompt={"math": 2.0})
    soft = found["tunings"]["soft"]
    assert soft["far_started"] == {"runs": 2, "better_than_none": 1}
    assert soft["far_ended"] == {"runs": 3, "better_than_none": 2}
    near, far = found["arms"]
    assert (near["outside_at_start"], near["outside"], far["outside"]) == (0.0, 0.5, 1.0)
    assert near["gain"]["mean"] == pytest.approx(0.75) and far["gain"]["mean"] == pytest.approx(0.15)
    assert soft["difference"]["mean"] == pytest.approx((0.2 + 1.0) / 2) and soft["difference"]["n"] == 2


def test_that_tasks_differ_is_no_error_of_what_seeds_say():
    # On one task prompts gain much, on the other little, with one spread over seeds.
    runs = [
        run(task, prior, seed, nll=nll + (0.25 if prior == "exclusion" else 0.0), loc=10.0 * (prior == "exclusion"))
        for prior in ("gaussian", "exclusion")
        for task, nlls in (("math", (1.0, 1.5)), ("squad", (-4.0, -3.5)))
        for seed, nll in enumerate(nlls)
    ]
    found = regions(named(*runs), lambda points: points.norm(dim=-1) / 4, 5.0, {"math": 2.0, "squad": 2.0})
    gain = found["arms"][0]["gain"]
    assert gain == {"mean": pytest.approx((0.75 + 5.75) / 2), "se": pytest.approx(0.25), "n": 2}
    assert found["tunings"]["soft"]["difference"] == {"mean": pytest.approx(0.25), "se": pytest.approx(0), "n": 2}


def test_regions_without_both_kinds_have_no_difference():
    runs = named(run(), run(prior="structured"))
    found = regions(runs, lambda points: points.norm(dim=-1), 1e9, {"math": 2.0})
    assert found["tunings"]["soft"]["difference"] is None
