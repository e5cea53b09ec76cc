"""What `compare` says of runs follows from their numbers: planted runs give the figures that were planted."""

import math

import pytest
import torch

from priors_peft.analysis.compare import (
    Run,
    between_and_within,
    clusters,
    distance,
    mean_and_error,
    name_runs,
    over_seeds,
    place,
    regions,
    table,
)
from priors_peft.priors import GaussianPrior


WIDTH, COUNT = 16, 8


def prior_at(loc: float, scale: float = 1.0) -> GaussianPrior:
    return GaussianPrior(torch.full((WIDTH,), loc), torch.full((WIDTH,), scale))


def run(task="math", prior="gaussian", seed=0, nll=1.0, loc=0.0, moved=0.0, scale=1.0, **settings) -> Run:
    """A run that starts at a draw around `loc` and is moved along all coordinates."""
    fitted = prior_at(loc, scale)
    start = fitted.sample(COUNT, torch.Generator().manual_seed(seed))[None]
    return Run(
        name=f"{task}-{prior}-{seed}-{settings}",
        data={"task": task, "num_eval": 8},
        seed=seed,
        settings={"tuning": "soft", "prior": prior} | settings,
        results={"nll": nll},
        initial_results={"nll": nll + 1},
        curve=[(1, nll)],
        prompt=start + moved,
        start=start,
        priors=[fitted],
    )


def named(*runs: Run) -> list[Run]:
    name_runs(runs)
    return list(runs)


# Names.


def test_names_say_what_differs_and_no_more():
    runs = named(
        run(),
        run(prior="structured"),
        run(prior_kwargs={"scale": 0.02}),
        run(prior="structured", tuning="deep", layers="all"),
        run(prior="structured", tuning="deep", layers=[0, -1]),
        run("squad", max_steps=7),
    )
    assert [(one.tuning, one.prior) for one in runs] == [
        ("soft", "gaussian"),
        ("soft", "structured"),
        ("soft", "gaussian scale=0.02"),
        ("deep", "structured"),
        ("deep 0,-1", "structured"),
        ("soft", "gaussian"),
    ]
    assert [one.task for one in runs] == ["math"] * 5 + ["squad"]


def test_a_setting_of_several_lines_is_a_name():
    first, _ = named(run(prior_kwargs={"text": "a\nb"}), run(prior_kwargs={"text": "c"}))
    assert (first.tuning, first.prior) == ("soft", "gaussian text=a\nb")


def test_other_rows_of_one_task_are_another_task():
    other = run(seed=1)
    other.data = {"task": "math", "num_eval": 9}
    assert [one.task for one in named(run(), other)] == ["math num_eval=8", "math num_eval=9"]


def test_one_run_or_one_twice_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        name_runs([run()])
    with pytest.raises(ValueError, match="must differ in task, settings or seed"):
        name_runs([run(), run(nll=2)])


# The table.


def test_the_table_has_means_over_seeds_and_differences_of_pairs():
    base = [run(seed=seed, nll=nll) for seed, nll in enumerate((1.0, 2.0, 4.0))]
    other = [run(prior="structured", seed=seed, nll=nll) for seed, nll in enumerate((0.5, 1.0, 3.9))]
    alone = run(prior="structured", seed=7, nll=0.6)  # without a partner: in the mean, in no pair
    first, second = table(named(*base, *other, alone), "gaussian")
    assert first["results"]["nll"]["mean"] == pytest.approx(7 / 3)
    assert first["results"]["nll"]["std"] == pytest.approx(math.sqrt(7 / 3))
    assert first["initial_results"]["nll"]["mean"] == pytest.approx(10 / 3)
    assert first["difference"] is None
    assert second["results"]["nll"]["mean"] == pytest.approx(1.5) and second["seeds"] == [0, 1, 2, 7]
    found = second["difference"]
    differences = torch.tensor([-0.5, -1.0, -0.1], dtype=torch.float64)
    assert (found["n"], found["mean"]) == (3, pytest.approx(differences.mean().item()))
    assert found["se"] == pytest.approx(differences.std().item() / math.sqrt(3))


def test_tasks_and_tunings_are_grouped_and_not_averaged():
    runs = [run("math", nll=1.0), run("squad", nll=3.0), run("math", nll=5.0, tuning="deep")]
    runs += [run("squad", prior="structured", nll=2.5), run("math", "structured", nll=7.0, tuning="deep")]
    rows = {(row["task"], row["tuning"], row["prior"]): row for row in table(named(*runs), "gaussian")}
    assert len(rows) == 5
    assert rows["squad", "soft", "structured"]["difference"] == {"mean": -0.5, "se": None, "n": 1}
    assert rows["math", "deep", "structured"]["difference"]["mean"] == 2.0
    assert rows["math", "soft", "gaussian"]["results"]["nll"] == {"mean": 1.0, "std": None}


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="baseline must be one of gaussian, structured, got 'gausian'"):
        table(named(run(), run(prior="structured")), "gausian")


# Where prompts end up.


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


def test_a_seed_that_lacks_a_task_counts_on_the_others():
    lacking = {("math", 0): 1.0, ("math", 1): 7.0, ("math", 2): 4.0, ("squad", 0): 20.0, ("squad", 1): 22.0}
    # Three seeds on math, two on squad: variances of means 9/3 and 2/2, and a covariance by the seeds that have both.
    shares = [(-3 / math.sqrt(6) - 1 / math.sqrt(2)) / 2, (3 / math.sqrt(6) + 1 / math.sqrt(2)) / 2, 0.0]
    error = math.hypot(*shares)
    assert over_seeds(lacking) == {"mean": pytest.approx((4 + 21) / 2), "se": pytest.approx(error), "n": 3}
    apart = {("math", 0): 1.0, ("math", 1): 7.0, ("squad", 2): 3.0, ("squad", 3): 5.0}
    assert over_seeds(apart) == {"mean": 4.0, "se": pytest.approx(math.sqrt(18 / 2 + 2 / 2) / 2), "n": 4}
    whole = {("math", 0): 1.0, ("math", 1): 7.0, ("squad", 0): 3.0, ("squad", 1): 4.0}
    assert over_seeds(whole) == pytest.approx(mean_and_error([2.0, 5.5]))
    # Of one seed alone nobody knows how far another would be off.
    assert over_seeds({("math", 0): 1.0, ("squad", 1): 3.0, ("math", 1): 7.0}) == {"mean": 3.5, "se": None, "n": 2}


def test_regions_without_both_kinds_have_no_difference():
    runs = named(run(), run(prior="structured"))
    found = regions(runs, lambda points: points.norm(dim=-1), 1e9, {"math": 2.0})
    assert found["tunings"]["soft"]["difference"] is None


# Tasks among activations.


def test_clusters_are_measured_for_every_pair_of_tasks():
    generator = torch.Generator().manual_seed(0)
    points = {name: torch.randn(20, 6, generator=generator) for name in ("a", "b", "c")}
    points["c"] += 8
    found = {tuple(one["tasks"]): one for one in clusters({"no prompt": {3: points}})}
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found["a", "c"]["probe_accuracy"] == 1.0 and found["a", "c"]["silhouette"] > 0.5
    assert found["a", "b"]["probe_accuracy"] < 0.8 and abs(found["a", "b"]["silhouette"]) < 0.1
    assert found["a", "b"]["layer"] == 3 and found["a", "b"]["condition"] == "no prompt"
