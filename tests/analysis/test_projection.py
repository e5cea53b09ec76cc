"""Projections: exact to the seed, the same in any order, clusters kept apart."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from priors_peft.analysis.projection import pca, tsne, umap


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters() -> dict[str, torch.Tensor]:
    return {"prompts": rows(3, 10, 20) + 20, "vocabulary": rows(60, 20, seed=1), "trajectory": rows(2, 4, 5, 20) - 20}


def separation(points: dict[str, torch.Tensor]) -> float:
    """Smallest distance between the groups' means in units of the largest spread within one."""
    flat = [group.reshape(-1, 2) for group in points.values()]
    means = torch.stack([group.mean(0) for group in flat])
    return float(torch.pdist(means).min() / max(group.std(0).norm() for group in flat))


@pytest.fixture(params=[pca, tsne, pytest.param(umap, marks=pytest.mark.slow)])
def project(request):
    if request.param is umap and importlib.util.find_spec("umap") is None:
        pytest.skip("install umap-learn to test UMAP")
    return request.param


def test_groups_keep_their_shapes_and_stay_apart(project):
    groups = clusters()
    found = project(groups)
    assert {name: tuple(points.shape) for name, points in found.points.items()} == {
        name: (*group.shape[:-1], 2) for name, group in groups.items()
    }
    assert separation(found.points) > 2
    assert found.to_dict()["method"] == project.__name__


def test_the_same_seed_gives_the_same_picture_whatever_the_order(project):
    groups = clusters()
    shuffled = dict(reversed(groups.items()))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    shuffled["vocabulary"] = groups["vocabulary"][order]
    one, other = project(groups).points, project(shuffled).points
    assert torch.equal(one["vocabulary"][order], other["vocabulary"])
    assert torch.equal(one["prompts"], other["prompts"])
    assert torch.equal(one["trajectory"], other["trajectory"])


def test_other_seeds_give_other_pictures():
    groups = {"points": rows(40, 8)}
    pictures = [tsne(groups, perplexity=5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(pictures[0].points["points"], pictures[1].points["points"])
    assert pictures[0].settings == {"perplexity": 5.0, "seed": 0, "pca_dims": 8}


@pytest.mark.slow
def test_the_number_of_threads_changes_no_picture():
    program = """
import torch
from priors_peft.analysis.projection import tsne
points = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
print(tsne({"points": points}).points["points"].double().sum(0).tolist())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("shape", [(200, 12), (8, 12)])
def test_pca_explains_the_variance_it_projects(shape):
    points = rows(*shape) * torch.linspace(3, 0.1, 12)
    found = pca({"points": points}, dims=5)
    projected = found.points["points"]
    variances = projected.var(0, correction=0) / points.double().var(0, correction=0).sum()
    torch.testing.assert_close(torch.tensor(found.explained_variance).double(), variances)
    assert found.explained_variance == sorted(found.explained_variance, reverse=True)
    covariance = projected.mT @ projected
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), atol=1e-8, rtol=0)


def test_points_in_a_plane_are_explained_by_two_components():
    found = pca({"plane": rows(50, 2) @ rows(2, 30, seed=1)}, dims=3)
    assert sum(found.explained_variance[:2]) == pytest.approx(1)
    torch.testing.assert_close(
        torch.pdist(found.points["plane"]), torch.pdist((rows(50, 2) @ rows(2, 30, seed=1)).double())
    )


def test_components_have_the_sign_of_their_largest_loading():
    points = rows(50, 6) * torch.linspace(1, 3, 6)
    one, other = pca({"points": points}), pca({"points": points - 100})
    torch.testing.assert_close(one.points["points"], other.points["points"], rtol=1e-3, atol=1e-3)
    direction = torch.linalg.lstsq(points.double() - points.double().mean(0), one.points["points"]).solution
    assert (direction.gather(0, direction.abs().argmax(0, keepdim=True)) > 0).all()


def test_groups_that_are_not_fitted_on_change_no_component():
    groups = {"fitted": rows(50, 6), "other": 100 + rows(30, 6, seed=1)}
    one, other = pca(groups, fit_on=["fitted"]), pca({"fitted": groups["fitted"]})
    assert torch.equal(one.points["fitted"], other.points["fitted"])
    assert one.explained_variance == other.explained_variance
    assert one.settings["fit_on"] == ["fitted"]


def test_the_perplexity_is_clipped_to_what_the_points_allow():
    assert tsne({"points": rows(10, 6)}, perplexity=30).settings["perplexity"] == 3
    assert tsne({"points": rows(4, 6)}, perplexity=30).settings["perplexity"] == 1


def test_umap_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="UMAP needs umap, which is not installed.*pip install umap-learn"):
        umap(clusters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pca({}), "groups must not be empty"),
        (lambda: pca({"a": rows(5, 3), "b": rows(5, 4)}), r"groups\['b'\] must be as wide as groups\['a'\]"),
        (lambda: pca({"a": rows(0, 3)}), r"groups\['a'\] must be .* not empty"),
        (lambda: pca({"a": rows(5, 3)}, fit_on=["c"]), r"fit_on must name groups \(a\), got \['c'\]"),
        (lambda: pca({"a": rows(5, 3)}, dims=4), "dims must be at most 3 for 5 points of width 3, got 4"),
        (lambda: pca({"a": rows(5, 3)}, dims=0), "dims must be an integer >= 1, got 0"),
        (lambda: tsne({"a": rows(3, 3)}), "the number of points must be an integer >= 4, got 3: add"),
        (lambda: tsne({"a": rows(9, 3)}, perplexity=0.5), "perplexity must be >= 1, got 0.5"),
        (lambda: umap({"a": rows(9, 3)}, neighbors=1), "neighbors must be an integer >= 2, got 1"),
        (lambda: umap({"a": rows(9, 3)}, min_dist=-1), "min_dist must be >= 0, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
