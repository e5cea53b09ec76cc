"""Choices by likelihood equal sums over one unpadded sequence each, for base models, stock PEFT and ours."""

import json

import pytest
import torch
from conftest import CONFIGS, make_model, make_tokenizer
from peft import PromptTuningConfig, get_peft_model

from priors_peft import PriorConfig, PriorTrainer, PriorTrainingArguments, get_prior_model
from priors_peft.choices import metrics_by_likelihood, score_choices
from priors_peft.cli import main
from priors_peft.evaluation import answer, answer_metrics
from priors_peft.tasks.metrics import exact_match, squad_exact_match


# Prompts of several lengths; choices of one token and of more, in one row of different lengths.
ROWS = [
    {"prompt": "Question: what is 1 ? Answer:", "choices": [" 5", " 6", " 7 8"], "completion": " 6"},
    {"prompt": "what is 1 plus 2 plus 3 ?", "choices": [" 5 6 7", " 8"], "completion": " 8"},
    {"prompt": "what is 4 ?", "choices": [" 5", " 6"], "completion": " 5"},
    {"prompt": "what is 9 ?", "choices": [" 5", " 6"], "completion": " 6"},
    {"prompt": "", "choices": [" 5", " 6"], "completion": " 5"},
]


def directly(model, tokenizer, row, choice, end=False):
    """log p(choice | prompt) from one sequence alone."""
    prompt = tokenizer(row["prompt"])["input_ids"] or [tokenizer.bos_token_id]
    tokens = tokenizer(choice, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0]
    log_probs = logits[-len(tokens) - 1 : -1].float().log_softmax(-1)
    return sum(log_probs[index, token].item() for index, token in enumerate(tokens))


def with_prompt(kind, architecture="llama"):
    base = make_model(architecture)
    if kind == "stock":
        torch.manual_seed(0)
        return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    if kind == "base":
        return base
    settings = {"prior": "gaussian", "num_virtual_tokens": 4, "tuning": kind}
    return get_prior_model(base, PriorConfig(**settings), tokenizer=make_tokenizer()).eval()


@pytest.mark.parametrize("kind", ["base", "stock", "soft", "deep"])
def test_scores_are_those_of_each_sequence_alone(kind, tokenizer):
    model = with_prompt(kind)
    scores = score_choices(model, tokenizer, ROWS, batch_size=3)
    expected = [[directly(model, tokenizer, row, choice) for choice in row["choices"]] for row in ROWS]
    assert [len(row) for row in scores] == [3, 2, 2, 2, 2]
    for row, wanted in zip(scores, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("kind", ["base", "soft"])
def test_scores_on_every_architecture(architecture, kind, tokenizer):
    model = with_prompt(kind, architecture)
    for row, found in zip(ROWS[:2], score_choices(model, tokenizer, ROWS[:2]), strict=True):
        assert found == pytest.approx([directly(model, tokenizer, row, choice) for choice in row["choices"]], abs=1e-4)


def test_one_choice_that_begins_another_is_scored_with_its_end(tokenizer):
    model, row = make_model(), {"prompt": "what is 1 ?", "choices": [" 5", " 5 6"]}
    (found,) = score_choices(model, tokenizer, [row])
    # Without the end token the first could never lose.
    assert found == pytest.approx([directly(model, tokenizer, row, choice, end=True) for choice in row["choices"]], abs=1e-4)  # fmt: skip


def test_probabilities_of_all_tokens_sum_to_one(tokenizer):
    words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
    rows = [{"prompt": "what is 1 ?", "choices": [f" {word}" for word in words]}]
    model = make_model()
    others = model(input_ids=torch.tensor([tokenizer("what is 1 ?")["input_ids"]])).logits[0, -1].softmax(-1)
    rest = 1 - sum(others[tokenizer.convert_tokens_to_ids(word)].item() for word in words)
    (scores,) = score_choices(model, tokenizer, rows)
    assert torch.tensor(scores).exp().sum().item() + rest == pytest.approx(1, abs=1e-5)


def test_scores_are_the_loss_of_training_less_its_end_token(tokenizer):
    model = with_prompt("soft")
    row = {"prompt": "what is 1 ?", "choices": [" 5 6", " 7"]}
    nll = answer(model, tokenizer, [{"prompt": row["prompt"], "completion": " 5 6"}], 2).nll * 3
    ended = directly(model, tokenizer, row, " 5 6", end=True)
    assert nll == pytest.approx(-ended, abs=1e-4)
    (found,) = score_choices(model, tokenizer, [row])
    end = ended - directly(model, tokenizer, row, " 5 6")
    assert found[0] == pytest.approx(-nll - end, abs=1e-4)


def test_all_choices_lose_the_same_start_of_a_long_prompt(tokenizer):
    model = make_model()
    prompt = " ".join(["1"] + ["what"] * 125)
    (found,) = score_choices(model, tokenizer, [{"prompt": prompt, "choices": [" 5 6 7 8", " 9"]}])
    kept = {"prompt": " ".join(["what"] * 123)}  # 128 positions, four tokens and the end of the longest choice
    assert found == pytest.approx(
        [directly(model, tokenizer, kept, choice) for choice in (" 5 6 7 8", " 9")], abs=1e-3
    )


def test_rows_must_have_choices(tokenizer):
    with pytest.raises(ValueError, match="choices must name at least one completion a row, got none in row 2"):
        score_choices(make_model(), tokenizer, [ROWS[0], {"prompt": "1", "choices": []}])


def test_metrics_are_of_the_likeliest_choice(tokenizer):
    model = make_model()
    scores = score_choices(model, tokenizer, ROWS)
    best = [row["choices"][row_scores.index(max(row_scores))] for row, row_scores in zip(ROWS, scores, strict=True)]
    share = sum(choice == row["completion"] for choice, row in zip(best, ROWS, strict=True)) / len(ROWS)
    metrics = lambda predictions, references: {"accuracy": exact_match(predictions, references)}  # noqa: E731
    assert metrics_by_likelihood(metrics, model, tokenizer, ROWS) == {"accuracy_by_likelihood": share}
    certain = [row | {"completion": choice} for row, choice in zip(ROWS, best, strict=True)]
    assert metrics_by_likelihood(metrics, model, tokenizer, certain) == {"accuracy_by_likelihood": 1.0}
    assert metrics_by_likelihood(metrics, model, tokenizer, [{"prompt": "1", "completion": " 2"}]) == {}


def test_training_evaluation_knows_all_answers_and_scores_choices(tmp_path, tokenizer):
    model = with_prompt("soft")
    seen = []

    def metrics(predictions, references):
        seen.append((predictions, references))
        return {"match": squad_exact_match(predictions, references)}

    rows = [row | {"answers": ["one", str(number)]} for number, row in enumerate(ROWS)]
    trainer = PriorTrainer(
        model=model,
        args=PriorTrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=2, max_new_tokens=2, use_cpu=True
        ),
        train_dataset=[{"prompt": "1", "completion": " 2"}],
        eval_dataset=[{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS],
        processing_class=tokenizer,
        compute_metrics=answer_metrics(tokenizer, metrics, rows, model),
    )
    figures = trainer.evaluate()
    assert {"eval_match", "eval_match_by_likelihood"} <= set(figures)
    predictions, references = seen[0]
    assert references == [["one", str(number)] for number in range(5)]
    with pytest.raises(ValueError, match="dataset must be what is evaluated, got 5 rows and 1 answers"):
        trainer.evaluate([{"prompt": "1", "completion": " 2"}])
    # In the data set's order, whatever the order they are evaluated in: a prediction meets its own row's answers.
    alone = answer(model, tokenizer, rows, 2)
    assert alone.references == references and alone.predictions == predictions and len(set(predictions)) > 1


@pytest.mark.slow
def test_the_commands_report_both_for_superglue(tmp_path, capsys, caplog):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"premise": f"what is {n}", "hypothesis": "is", "label": n % 2} for n in range(12)]
    (tmp_path / "RTE").mkdir()
    for name in ("train", "val"):
        (tmp_path / "RTE" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kwargs = {"subtask": "rte", "verbalizer": {"entailment": "5", "not_entailment": "6"}}
    flags = ["--task", "superglue", "--task_kwargs", json.dumps(kwargs), "--data_dir", str(tmp_path)]
    out = str(tmp_path / "out")
    short = ["--max_steps", "1", "--use_cpu", "--num_virtual_tokens", "4", "--disable_tqdm", "true"]
    short += ["--max_length", "8"]
    assert main(["train", "--model", str(tmp_path / "base"), "--output_dir", out, *short, *flags]) == 0
    trained = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert main(["evaluate", out, *flags, "--output_file", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    for name in ("accuracy", "accuracy_by_likelihood"):
        assert found[out][name] == pytest.approx(trained[f"eval_{name}"]) and name in found["no prompt"]
    assert "accuracy by likelihood" in capsys.readouterr().out
    # Rows are cut alike for the loss, for the choices, and by `evaluate` afterwards.
    cut = [record.args for record in caplog.records if "rows are longer than max_length" in record.msg]
    assert {max_length for *_, max_length in cut} == {8}
    assert {(lost, rows) for lost, rows, _ in cut} == {(12, 12), (24, 24)}
