"""Activations: padding and length tell nothing apart, and separability is what was planted."""

import pytest
import torch

from priors_peft.analysis.activations import match_lengths, pool, separability


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_pool_to_what_they_pool_to_alone(how, side):
    lengths, hidden = [3, 7, 1], rows(3, 7, 4)
    padded, mask = torch.full((3, 12, 4), torch.nan), torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(12 - length, 12)
        padded[row, place], mask[row, place] = hidden[row, :length], 1
    found = pool(padded, mask, how)
    for row, length in enumerate(lengths):
        alone = pool(hidden[row : row + 1, :length], torch.ones(1, length), how)[0]
        assert torch.equal(found[row], alone)
        states = hidden[row, :length]
        torch.testing.assert_close(alone, states.mean(0) if how == "mean" else states[-1])


def test_matched_tasks_have_the_same_lengths_equally_often():
    lengths = {"a": [5, 9, 2, 7], "b": [3, 3, 8], "c": [30, 20, 10, 40, 50]}
    tasks = {name: [list(range(length)) for length in all_] for name, all_ in lengths.items()}
    found = match_lengths(tasks)
    assert [sorted(map(len, each)) for each in found.values()] == [[2, 3, 8]] * 3
    assert [len(row) for row in found["a"]] == [3, 8, 2]
    assert found["a"][1] == list(range(1, 9))
    assert match_lengths(tasks, keep="start")["a"][1] == list(range(8))
    assert [sorted(map(len, each)) for each in match_lengths(tasks, minimum=3).values()] == [[3, 8]] * 3


def test_length_alone_separates_tasks_before_matching_and_not_after():
    """Tasks of one random text that differ in length only, seen through their last position."""
    generator = torch.Generator().manual_seed(0)

    def task(low: int, high: int) -> list[list[int]]:
        return [[0] * int(torch.randint(low, high, (), generator=generator)) for _ in range(40)]

    tasks = {"short": task(3, 20), "long": task(18, 40)}

    def accuracy(each: dict[str, list[list[int]]]) -> float:
        points = torch.tensor([[float(len(row)), 1.0] for found in each.values() for row in found])
        return separability(points, [name for name, found in each.items() for _ in found]).probe_accuracy

    assert accuracy(tasks) > 0.85
    assert accuracy(match_lengths(tasks)) < 0.65


def test_planted_classes_are_separable_and_random_labels_are_at_chance():
    points, labels = rows(120, 16), ["a", "b", "c"] * 40
    planted = points.clone()
    planted[:, 0] += torch.tensor([0.0, 8, 16]).repeat(40)
    found, random = separability(planted, labels), separability(points, labels)
    assert found.probe_accuracy > 0.95 and found.silhouette > 0.3
    assert abs(random.probe_accuracy - random.chance) < 0.12 and abs(random.silhouette) < 0.05
    assert found.chance == pytest.approx(1 / 3) and found.counts == {"a": 40, "b": 40, "c": 40}


def test_classes_of_different_sizes_leave_chance_where_it_is():
    found = separability(rows(110, 4), ["a"] * 100 + ["b"] * 10)
    assert found.chance == 0.5 and found.probe_accuracy < 0.65


def test_a_group_is_never_on_both_sides():
    """Points of a document resemble each other: a probe that has seen the document knows its label."""
    documents = torch.arange(20).repeat_interleave(10)
    labels = [["a", "b"][document % 2] for document in documents.tolist()]
    points = 5 * rows(20, 40)[documents] + 0.1 * rows(200, 40, seed=1)
    assert separability(points, labels).probe_accuracy == 1
    grouped = separability(points, labels, groups=[str(document) for document in documents.tolist()])
    assert grouped.probe_accuracy < 0.75


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_the_points_changes_nothing_and_the_seed_makes_it_exact(grouped):
    points, labels = rows(60, 5), ["a", "b", "c"] * 20
    points[3] = points[0]  # equal points too
    groups = [str(index % 30) for index in range(60)]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    one = separability(points, labels, groups=groups if grouped else None)
    turned = [groups[index] for index in order] if grouped else None
    other = separability(points[order], [labels[index] for index in order], groups=turned)
    assert one.to_dict() == other.to_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool(rows(2, 3, 4), torch.ones(2, 3), "max"), "how must be one of mean, last, got 'max'"),
        (lambda: pool(rows(2, 3), torch.ones(2, 3)), r"hidden must be .* shape \[B, L, d\]"),
        (lambda: pool(rows(2, 3, 4), torch.ones(2, 4)), r"mask must have shape \[2, 3\] like hidden, got \[2, 4\]"),
        (
            lambda: pool(rows(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]])),
            r"mask must leave a token in each row, got none in rows \[1\]",
        ),
        (lambda: pool(rows(2, 3, 4) / 0, torch.ones(2, 3)), "hidden where mask is 1 must be finite"),
        (lambda: match_lengths({"a": [[1]]}), "the number of tasks must be an integer >= 2, got 1"),
        (lambda: match_lengths({"a": [[1]], "b": []}), "tasks must have rows each, got none for b"),
        (lambda: match_lengths({"a": [[1]], "b": [[1]]}, keep="middle"), "keep must be one of start, end"),
        (lambda: match_lengths({"a": [[1]], "b": [[1]]}, minimum=2), "minimum must be at most the 1 tokens"),
        (lambda: separability(rows(9, 2), ["a"] * 9), "labels must name at least 2 classes, got a"),
        (lambda: separability(rows(9, 2), ["a"] * 8), "labels must have one entry for each of the 9 points, got 8"),
        (lambda: separability(rows(9, 2), ["a"] * 6 + ["b"] * 3), "folds must be at most the 3 points of class 'b'"),
        (
            lambda: separability(rows(20, 2), ["a", "b"] * 10, groups=["x", "y"] * 10),
            "folds must be at most the 1 groups of class 'a', got 5: add groups",
        ),
        (lambda: separability(rows(9, 2), ["a", "b", "a"] * 3, folds=1), "folds must be an integer >= 2, got 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
