"""What `compare` says of runs follows from their numbers: planted runs give the figures that were planted."""

import math

import pytest
import torch

from priors_peft.analysis.compare import (
    Run,
    baseline_of,
    clusters,
    mean_and_error,
    name_runs,
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
    with pytest.raises(ValueError, match=r"--baseline\) must be one of gaussian, structured, got 'gausian'"):
        table(named(run(), run(prior="structured")), "gausian")


def test_the_baseline_is_gaussian_where_there_is_one_and_else_the_first_runs_prior():
    assert baseline_of(named(run(prior="structured"), run())) == "gaussian"
    assert baseline_of(named(run(prior="text"), run(prior="structured"))) == "text"


def test_a_seed_that_lacks_a_task_counts_on_the_others():
    lacking = {("math", 0): 1.0, ("math", 1): 7.0, ("math", 2): 4.0, ("squad", 0): 20.0, ("squad", 1): 22.0}
    # Three seeds on math, two on squad: variances of means 9/3 and 2/2, and a covariance by the seeds that have both.
    shares = [(-3 / math.sqrt(6) - 1 / math.sqrt(2)) / 2, (3 / math.sqrt(6) + 1 / math.sqrt(2)) / 2, 0.0]
    error = math.hypot(*shares)
    assert mean_and_error(lacking) == {"mean": pytest.approx((4 + 21) / 2), "se": pytest.approx(error), "n": 3}
    apart = {("math", 0): 1.0, ("math", 1): 7.0, ("squad", 2): 3.0, ("squad", 3): 5.0}
    assert mean_and_error(apart) == {"mean": 4.0, "se": pytest.approx(math.sqrt(18 / 2 + 2 / 2) / 2), "n": 4}
    whole = {("math", 0): 1.0, ("math", 1): 7.0, ("squad", 0): 3.0, ("squad", 1): 4.0}
    assert mean_and_error(whole) == pytest.approx({"mean": 3.75, "se": 1.75, "n": 2})
    # Of one seed alone nobody knows how far another would be off.
    assert mean_and_error({("math", 0): 1.0, ("squad", 1): 3.0, ("math", 1): 7.0}) == {"mean": 3.5, "se": None, "n": 2}


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
