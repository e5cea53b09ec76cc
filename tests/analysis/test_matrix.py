"""What is planted in a transfer matrix is found, and what can't be said is not."""

import math

import pytest
import torch
from conftest import make_model, make_tokenizer

from priors_peft import PriorConfig, get_prior_model
from priors_peft.analysis.matrix import NO_PROMPT, KeptFigures, model_similarities, task_figures, transfer_part
from priors_peft.analysis.stability import prompt_distances
from priors_peft.tasks import Task


TASKS = ["a", "b", "c", "d"]


def planted(noise=0.0, seeds=2):
    """Prompts whose gain on another task falls with how far apart two tasks lie on a line."""
    place = torch.tensor([0.0, 1.0, 4.0, 9.0])
    own = [task for task in range(4) for _ in range(seeds)]
    distance = (place[own][:, None] - place).abs()
    gains = 5 - distance + noise * torch.randn(distance.shape, generator=torch.Generator().manual_seed(0))
    none = torch.tensor([0.5, 10.0, 3.0, -2.0])
    scores = none + gains
    rows = {f"p{index}": [{"f1": score} for score in row] for index, row in enumerate(scores.tolist())}
    figures = {NO_PROMPT: [{"f1": score} for score in none.tolist()]} | rows
    similarity = -(place[own][:, None] - place[own]).abs()
    return figures, [TASKS[task] for task in own], {"planted": similarity.double()}


def test_a_planted_similarity_foretells_transfer():
    figures, own, similarities = planted()
    part = transfer_part(figures, TASKS, own, similarities, num_permutations=2000)
    (found,) = part["correlations"].values()
    assert found["rho"] == pytest.approx(1) and found["smallest_p"] == pytest.approx(1 / 24)
    assert found["p_value"] == pytest.approx(1 / 24, abs=0.02)
    # |place| differences of other tasks below 5: 0-1, 0-4, 1-4 both ways, 2 prompts each.
    assert (part["wins"], part["transfers"]) == (12, 24) and part["own_share"] == 1
    assert part["own"] == [0, 0, 1, 1, 2, 2, 3, 3] and part["metric"] == "f1" and part["notes"] == []


def test_losses_are_better_when_lower():
    figures, own, similarities = planted()
    losses = {name: [{"nll": -cell["f1"]} for cell in row] for name, row in figures.items()}
    one, other = (transfer_part(values, TASKS, own, similarities, num_permutations=20) for values in (figures, losses))
    assert not other["higher_is_better"]
    for key in ("share_beating_no_prompt", "wins", "correlations", "gain_over_none"):
        assert one[key] == other[key]


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ([*"aabbccd", None], "Which task p7 was trained on is not known"),
        (["a", "a", *"bbccdx"], "own must name a task of transfer for every prompt, got None for 1"),
        ([*"aaabccdd"], "own must name each task as often"),
        ([*"aaaabbbb"], "the number of tasks with prompts must be an integer >= 3"),
    ],
)
def test_what_can_t_be_said_is_noted(own, reason):
    figures, _, similarities = planted()
    part = transfer_part(figures, TASKS, own, similarities, num_permutations=20)
    assert part["correlations"] is None and any(reason in note for note in part["notes"])
    assert (part["share_beating_no_prompt"] is None) == (None in own)
    assert len(part["scores"]) == 8


def test_metrics_are_those_that_all_tasks_have():
    figures, own, similarities = planted()
    for row in figures.values():
        row[0] = row[0] | {"accuracy": 1.0}
        row[1:] = [cell | {"nll": 2.0} for cell in row[1:]]
        row[0]["nll"] = 1.0
    part = transfer_part(figures, TASKS, own, similarities, num_permutations=20)
    assert list(part["by_metric"]) == ["f1", "nll"] and part["metric"] == "f1"
    assert transfer_part(figures, TASKS, own, {}, metric="nll")["scores"][0] == [1, 2, 2, 2]
    with pytest.raises(ValueError, match="metric must be one of f1, nll, got 'accuracy'"):
        transfer_part(figures, TASKS, own, {}, metric="accuracy")


def tuned(**settings):
    settings = {"num_virtual_tokens": 3, "prior": "gaussian"} | settings
    model = get_prior_model(make_model(), PriorConfig(**settings), make_tokenizer(), "p0")
    for index in (1, 2):
        model.add_adapter(f"p{index}", PriorConfig(**settings | {"seed": index}))
    return model


@pytest.mark.parametrize("settings", [{}, {"tuning": "deep"}])
def test_similarities_add_up_over_layers(settings):
    model = tuned(**settings)
    found, notes = model_similarities(model)
    assert set(found) == {"frobenius", "cosine", "matched", "neurons"} and not notes
    prompts = torch.stack([model.prompt(f"p{index}").theta for index in range(3)]).detach()
    whole = prompts.flatten(1, 2).double()
    assert torch.allclose(-found["frobenius"], torch.cdist(whole.flatten(1), whole.flatten(1)), atol=1e-5)
    assert torch.allclose(found["cosine"], found["cosine"].T) and bool((found["matched"] >= found["frobenius"]).all())
    if not settings:
        assert torch.allclose(-found["matched"], prompt_distances(prompts[:, 0]).matched)


def test_prompts_of_different_shapes_have_no_similarity():
    model = tuned()
    model.add_adapter("longer", PriorConfig(num_virtual_tokens=5, prior="gaussian"))
    found, notes = model_similarities(model)
    assert not found and "different numbers of virtual tokens" in notes[0]


def test_choice_nll_of_a_model_that_knows_nothing_is_a_coin(tokenizer):
    from datasets import Dataset

    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [{"prompt": "what is 1 ?", "completion": " 5", "choices": [" 5", " 6"]}] * 3
    task = Task("coin", Dataset.from_list(rows), Dataset.from_list(rows), lambda p, r: {"accuracy": 1.0}, 4)
    figures = task_figures(model, tokenizer, task)
    assert figures["choice_nll"] == pytest.approx(math.log(2)) and figures["nll"] == pytest.approx(math.log(96))
    assert list(figures) == ["accuracy_by_likelihood", "nll", "choice_nll"]
    task.eval = None
    with pytest.raises(ValueError, match="task must have evaluation rows, got 'coin' without any"):
        task_figures(model, tokenizer, task)


def test_kept_figures_are_found_by_what_they_are_of(tmp_path):
    path = tmp_path / "cells.json"
    kept = KeptFigures(path)
    assert kept.get({"prompt": None}) is None and not path.exists()
    kept.put({"prompt": None, "task": 1}, {"nll": 0.1 + 0.2})
    again = KeptFigures(path)
    assert again.get({"task": 1, "prompt": None}) == {"nll": 0.1 + 0.2}
    assert again.get({"task": 2, "prompt": None}) is None
    for text in ("{", "[]", '{"format_version": 2, "cells": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="delete it to measure again"):
            KeptFigures(path)
