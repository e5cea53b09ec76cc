"""The semantics recipe: its answers follow from the figures, and it runs from nothing to a report, going on if stopped."""

import importlib
import json
import sys
from pathlib import Path
from zlib import crc32

import pytest
import torch
from conftest import SUPERGLUE_KWARGS, save_base, write_superglue


RECIPE = Path(__file__).parents[1] / "recipes" / "semantics"


@pytest.fixture
def recipe(monkeypatch):
    """A module of the recipe, as a script finds it."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name in ("run", "questions"):
        sys.modules.pop(name, None)


def token(first, last):
    def near(word):
        return [{"id": crc32(word.encode()), "text": f"␣{word}", "score": 0.9}]

    return {"initial_nearest": near(first), "nearest": near(last)}


def adapter(task, tokens, signal=0):
    return {"name": task, "task": task, "tokens": {"virtual_tokens": tokens, "num_signal": signal}}


def group(task="rte", percentile=50.0, height=0.01):
    return {
        "task": task,
        "adapters": ["r0", "r1", "r2"],
        "raw_distances": [[0, 3, 3], [3, 0, 3], [3, 3, 0]],
        "matched_distances": [[0, 1, 2], [1, 0, 3], [2, 3, 0]],
        "equidistance": {"mean_percentile": percentile, "percentile": 50.0, "null_means": [2.0, 4.0]},
        "metric_spread": {"metric": "nll", "mean": 1.5, "std": 0.1},
        "lines": [{"barrier": {"height": height}}],
    }


def transfer(p_value=0.5, share=0.9, rho=0.7):
    found = {
        "share_beating_no_prompt": share,
        "wins": 9,
        "transfers": 10,
        "own_share": 1.0,
        "correlations": {"cosine": {"rho": rho, "p_value": p_value, "interval": [-0.5, 0.5], "smallest_p": 1 / 24}},
    }
    return found | {"metric": "accuracy_by_likelihood", "by_metric": {"accuracy_by_likelihood": found, "nll": found}}


def analysis(**parts):
    return {"adapters": [], "stability": None, "transfer": None} | parts


def test_words_that_stay_are_named_and_held_against_chance(recipe):
    questions = recipe("questions").questions
    stay = [token("entailed", "entailed"), token("the", "the"), token("premise", "yes"), token("not", "premise")]
    prompts = [adapter("rte", stay), adapter("rte", stay[:1] + stay[2:])]
    (found,) = questions(analysis(adapters=prompts))
    assert found["figures"]["kept"] == 3 and found["figures"]["virtual_tokens"] == 7
    # "the" says nothing; "premise" is of the description, "yes" is not.
    assert "rte: entailed." in found["answer"] and "yes (2)" in found["answer"] and "the" not in found["answer"].split("rte:")[1].split(".")[0]  # fmt: skip
    assert "nothing here says" in found["answer"] and found["figures"]["signal_p_value"] == 1
    strong = [adapter("rte", [token("entailed", "entailed")], signal=1)] * 4
    (found,) = questions(analysis(adapters=strong))
    assert found["answer"].startswith("They stay") and "training moved them to words" in found["answer"]
    assert found["figures"]["signal_p_value"] == pytest.approx(0.05**4)


@pytest.mark.parametrize(
    ("percentile", "verdict"),
    [(99.0, "They end further apart"), (1.0, "They end closer together"), (50.0, "They end as far apart as")],
)
def test_runs_are_held_against_random_prompts(recipe, percentile, verdict):
    (found,) = recipe("questions").questions(analysis(stability={"groups": [group(percentile=percentile)]}))
    assert found["answer"].startswith(verdict)
    own = found["figures"]["rte"]
    assert (own["raw_distance"], own["matched_distance"], own["highest_barrier"]) == (3, 2, 0.01)
    assert "In 1 of 1 task all straight lines" in found["answer"]


def moved(within, between):
    """Starts of two tasks with three runs each, and moves of which a part is common to a task and a part to all."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    tasks = ["rte"] * 3 + ["wic"] * 3
    starts = random(2, 4, 32).repeat_interleave(3, dim=0) * 10 + 0.1 * random(6, 4, 32)
    common = within * random(2, 4, 32).repeat_interleave(3, dim=0) + between * random(1, 4, 32)
    return starts, starts + common + 0.1 * random(6, 4, 32), tasks


@pytest.mark.parametrize(
    ("within", "between", "verdict"),
    [
        (0.0, 0.0, "don't agree where to go."),
        (1.0, 0.0, "agree where to go, and tasks differ in it."),
        (0.0, 1.0, "agree where to go, but no more than different tasks do."),
    ],
)
def test_runs_that_move_alike_are_told_from_starts_that_lie_apart(recipe, within, between, verdict):
    questions = recipe("questions")
    moves = questions.moves_of(*moved(within, between))
    assert moves["distance_within"] < 10 < moves["distance_between"]  # whatever training did
    (runs,) = questions.questions(analysis(stability={"groups": [group(height=2.0)]}), moves)
    assert verdict in runs["answer"] and "their descriptions' doing" in runs["answer"]
    assert "In 0 of 1 task" in runs["answer"] and runs["figures"]["moves"] == moves
    starts, prompts, tasks = moved(within, between)
    assert questions.moves_of(starts, prompts, ["rte"] * 6) is None
    assert questions.moves_of(starts[::3], prompts[::3], tasks[::3]) is None


def test_transfer_is_foretold_or_not(recipe):
    questions = recipe("questions").questions
    (found,) = questions(analysis(transfer=transfer()))
    assert found["answer"].startswith("90 % of transfers beat no prompt by accuracy by likelihood, as the 90 %")
    assert "none of 2 correlations has p <= 0.05" in found["answer"] and "p can't go below 0.042" in found["answer"]
    (found,) = questions(analysis(transfer=transfer(p_value=0.04, share=0.2)))
    assert "fewer than the 90 %" in found["answer"] and "2 of 2 correlations" in found["answer"]
    (found,) = questions(analysis(transfer=transfer(rho=None)))
    assert "No correlation" in found["answer"]


def test_no_figures_no_answers(recipe):
    assert recipe("questions").questions(analysis()) == []


def arguments(tmp_path):
    kwargs = {name.split(":")[1]: settings for name, settings in SUPERGLUE_KWARGS.items()}
    return [
        *(
            "--model",
            str(tmp_path / "base"),
            "--data_dir",
            str(tmp_path / "data"),
            "--task_kwargs",
            json.dumps(kwargs),
        ),
        *("--output_dir", str(tmp_path / "out"), "--seeds", "3", "--num_virtual_tokens", "4", "--use_cpu"),
        *("--max_steps", "3", "--max_length", "60", "--num_analysis", "2", "--num_transfer", "8", "--num_draws", "60"),
        *("--save_steps", "1", "--disable_tqdm", "true", "--per_device_train_batch_size", "4"),
    ]


@pytest.mark.slow
def test_the_study_runs_from_nothing_to_a_report_and_goes_on(tmp_path, recipe, monkeypatch, capsys):
    save_base(tmp_path / "base")
    write_superglue(tmp_path / "data")
    run, trained = recipe("run"), []
    train = run.train

    def counting(model, task, prompt, args):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(Path(args.output_dir).name)
        return train(model, task, prompt, args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", counting)
        with pytest.raises(KeyboardInterrupt):
            run.main(arguments(tmp_path))
    assert trained == ["rte-0", "wsc-0", "boolq-0", "wic-0", "rte-1"]
    run.main(arguments(tmp_path))
    out = tmp_path / "out"
    analysis = json.loads((out / "analysis.json").read_text())
    assert len(analysis["adapters"]) == 12 and len(analysis["questions"]) == 3
    assert [group["task"] for group in analysis["stability"]["groups"]] == sorted(SUPERGLUE_KWARGS)
    assert len(analysis["transfer"]["scores"]) == 12 and analysis["transfer"]["correlations"]
    # Losses on two rows, tasks told apart by all eight.
    assert {adapter["faithfulness"]["rows"] for adapter in analysis["adapters"]} == {2}
    assert all(set(layer["counts"].values()) == {8} for layer in analysis["activations"]["layers"])
    steps = analysis["adapters"][0]["geometry"]["layers"][0]["series"]["steps"]
    assert steps == [0, 1, 2, 3]
    printed, report = capsys.readouterr().out, (out / "report.html").read_text()
    for part in analysis["questions"]:
        assert part["question"] in printed and part["answer"] in printed
    assert analysis["questions"][0]["question"] in report and list(out.glob("*.png"))
    assert str(tmp_path) not in (out / "analysis.json").read_text() + report

    # All is done: nothing is trained, analysed or measured again.
    for name in ("train", "analyze"):
        monkeypatch.setattr(run, name, lambda *a, **k: pytest.fail("it was done"))
    again = (out / "transfer_cells.json").read_text()
    run.main(arguments(tmp_path))
    assert json.loads((out / "analysis.json").read_text())["questions"] == analysis["questions"]
    assert (out / "transfer_cells.json").read_text() == again
    with pytest.raises(ValueError, match="max_steps must be 3 like that of the runs in"):
        run.main([*arguments(tmp_path), "--max_steps", "4"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "rtee"], "tasks must be one of"),
        (["--tasks", "rte", "math"], "tasks must be one of .*rte.*, got 'math'"),
        (["--tasks", "rte", "wick"], "got 'wick'. Did you mean 'wic'"),
        (["--seeds", "0"], "seeds must be >= 1, got 0"),
        (["--task_kwargs", '{"cb": {}}'], "task_kwargs must give settings by task, .*, got superglue:cb"),
        (["--sedes", "2"], "'--sedes' is no flag. Did you mean 'seeds'"),
    ],
)
def test_bad_flags_are_named(recipe, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe("run").main([*flags, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert not (tmp_path / "out").exists()
