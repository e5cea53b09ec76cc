"""Cards say what is known and nothing else, are what the Hub takes, and give nothing of their author away."""

import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import addition_rows, make_model, make_tokenizer
from datasets import Dataset
from huggingface_hub import ModelCard

from priors_peft import PriorConfig, PriorTrainer, PriorTrainingArguments, get_prior_model
from priors_peft.analysis.collect import analyze
from priors_peft.cli import main
from priors_peft.commands.arguments import ModelArguments, PromptArguments, TaskArguments, parse
from priors_peft.commands.train import TrainingArguments
from priors_peft.files import write_json
from priors_peft.hub.adapter import TASK_FILE
from priors_peft.hub.base_model import BUNDLED, BUNDLED_ORIGIN
from priors_peft.hub.card import ANALYSIS, CARD, MARK, adapters_in, card_text, write_card
from priors_peft.hub.facts import TRAINING, TrainingFacts, collect_facts, read_facts
from priors_peft.priors import prior_class, prior_names
from priors_peft.tasks import load_task


SHORT = ["--max_steps", "4", "--use_cpu", "--num_virtual_tokens", "4", "--disable_tqdm", "true", "--seed", "3"]
HOSTILE = "x\n---\n# Owned\n```\n<script>alert(1)</script> | `a` [b](http://c) {{ 7*7 }} <!-- --> \u202e\ud83d"


PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def make_base(folder, name="base"):
    make_model().save_pretrained(folder / name)
    make_tokenizer().save_pretrained(folder / name)
    return str(folder / name)


def train(base, folder, *flags):
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    given = ["--model", base, "--train_file", str(rows), "--num_eval", "8", "--output_dir", str(folder)]
    assert main(["train", *given, *SHORT, *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A prompt as `priors-peft train` leaves it; tests that change it take a copy."""
    place = tmp_path_factory.mktemp("trained")
    settings = ["--inference", "map", "--eval_on_start", "true", "--save_steps", "2"]
    return train(make_base(place), place / "out", *settings)


@pytest.fixture
def adapter(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "adapter")
    return tmp_path / "adapter"


def saved(folder, **settings):
    base = make_model()
    base.name_or_path = settings.pop("base", "user/base")
    get_prior_model(base, PriorConfig(num_virtual_tokens=4, **settings)).save_pretrained(folder)
    return folder


def adapter_base(folder):
    """A folder with a base model of its own that an adapter names."""
    base = folder.parent / "its base"
    base.mkdir()
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {"base_model_name_or_path": str(base)})
    return base


def measured(logged):
    return {name: logged[f"eval_{name}"] for name in ("loss", "ece")}


def figures(card):
    return {result.metric_type: result.metric_value for result in card.data.eval_results}


def body(folder):
    return (folder / CARD).read_text(encoding="utf-8")


def test_a_trained_prompts_card_is_valid_and_carries_its_real_results(adapter, hub):
    card = ModelCard.load(adapter / CARD)
    card.validate()
    assert hub.counted("validate-yaml") == 1
    measured = json.loads((adapter / "eval_results.json").read_text())
    assert figures(card)["nll"] == pytest.approx(measured["eval_loss"], abs=1e-5)
    assert figures(card)["exact_match"] == measured["eval_exact_match"]
    # Of a share of none or all the formula gives 0, which would say that it is certain.
    assert ("standard error" in card.text) == (0 < measured["eval_exact_match"] < 1)
    assert {"priors-peft", "prompt-tuning", "soft-prompt", "prior:structured"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    for said in (
        "4 of 8 rows",
        "On 8 evaluation rows",
        "this prompt, before training",
        "It is one run",
    ):
        assert said in card.text
    assert f"{read_facts(adapter).num_supervised_tokens:,}" in card.text


def test_the_initial_prompts_results_are_those_before_training(tmp_path):
    tokenizer = make_tokenizer()
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=tokenizer)
    args = PriorTrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, save_strategy="no")
    rows = addition_rows(12)
    trainer = PriorTrainer(model, args, rows, rows[:4], processing_class=tokenizer)
    before = measured(trainer.evaluate())
    trainer.train()
    assert collect_facts(trainer).results == {}  # not evaluated since
    trainer.save_model()
    after = measured(trainer.evaluate())
    facts = read_facts(tmp_path)
    assert facts.initial_results == {"default": before} and facts.results == {"default": after}
    trainer.evaluate(rows[4:])  # other rows' figures are not the prompt's on its own
    assert read_facts(tmp_path).results == {"default": after}
    assert figures(ModelCard.load(tmp_path / CARD))["nll"] == pytest.approx(after["loss"], abs=1e-5)
    trainer.train()
    trainer.save_model()
    facts = read_facts(tmp_path)  # what came of the first training is where the second began
    assert facts.initial_results == {"default": after} and facts.results == {}
    trainer.train()  # nothing was measured since
    trainer.save_model()
    assert read_facts(tmp_path).initial_results == {}


def test_of_the_best_model_the_best_steps_results_are_told(tmp_path):
    tokenizer = make_tokenizer()
    config = PriorConfig(num_virtual_tokens=4, inference="map")
    model = get_prior_model(make_model(), config, tokenizer=tokenizer)
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 8}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 5.0}
    args = PriorTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **steps, **best)
    trainer = PriorTrainer(model, args, addition_rows(16), addition_rows(6, start=400), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    logged = {entry["step"]: measured(entry) for entry in trainer.state.log_history if "eval_loss" in entry}
    best_step = min(logged, key=lambda step: logged[step]["loss"])
    facts = read_facts(tmp_path)
    assert best_step < 8 and facts.steps == best_step
    assert facts.results == {"default": logged[best_step]}
    checkpoint = read_facts(tmp_path / "checkpoint-8")
    assert checkpoint.steps == 8 and checkpoint.results == {"default": logged[8]}


def test_a_saved_prompt_gets_a_card_without_what_is_unknown(tmp_path, hub):
    card = ModelCard.load(saved(tmp_path / "a", inference="map") / CARD)
    card.validate()
    assert card.data.base_model == "user/base" and card.data.base_model_relation == "adapter"
    assert card.data.to_dict().keys().isdisjoint({"model-index", "datasets", "license", "language"})
    text = str(card)
    for unsaid in ("None", "null", "nan", "More Information", "Results", "looks like", "priors-peft train"):
        assert unsaid not in text
    assert "No evaluation of it is known" in text


def test_save_pretrained_leaves_a_card_that_is_there(tmp_path):
    folder = saved(tmp_path)
    (folder / CARD).write_text("mine")
    saved(folder)
    assert body(folder) == "mine"


def test_the_bundled_model_is_named_by_what_it_was_made_from(tmp_path, hub):
    card = ModelCard.load(saved(tmp_path, base=BUNDLED) / CARD)
    card.validate()
    assert card.data.base_model == BUNDLED_ORIGIN and card.data.license == "apache-2.0"
    assert "4-bit copy" in card.text and f'from_pretrained("{BUNDLED_ORIGIN}")' in card.text


def test_the_licence_is_the_base_models_where_its_card_is_here(adapter, caplog):
    base = adapter_base(adapter)
    assert ModelCard(card_text(adapter)).data.license is None and not caplog.records
    for text, licence in (("license: apache-2.0", "apache-2.0"), ("license: [", None), ("a: 1", None), (None, None)):
        (base / CARD).write_text("# Base\n" if text is None else f"---\n{text}\n---\n")
        assert ModelCard(card_text(adapter)).data.license == licence
    (base / CARD).write_text("---\nlicense: other\nlicense_name: some-1\nlicense_link: https://x.org/1\n---\n")
    data = ModelCard(card_text(adapter)).data
    assert (data.license, data["license_name"], data["license_link"]) == ("other", "some-1", "https://x.org/1")
    assert "license_name" not in ModelCard(card_text(adapter, license="mit")).data.to_dict()
    write_card(adapter)
    data = ModelCard(card_text(adapter, license="mit")).data.to_dict()
    assert data["license"] == "mit" and data.keys().isdisjoint({"license_name", "license_link"})


def test_a_folder_is_no_base_model_for_others(adapter):
    card = ModelCard.load(adapter / CARD)
    assert card.data.base_model is None and "a folder of its author's" in card.text
    assert card.data.license is None and "base_model=" not in card.text
    assert 'base_model="path/to/the/base/model"' in card_text(adapter, repo_id="user/adapter")
    assert "--model BASE_MODEL" in card.text and "--train_file ROWS.jsonl" in card.text


@pytest.mark.parametrize("name", prior_names())
def test_every_family_is_told_in_words_and_symbols(name, tmp_path):
    folder = saved(tmp_path)
    described = json.loads((folder / "prior_config.json").read_text())
    described["config"]["prior"] = name
    write_json(folder / "prior_config.json", described)
    text = card_text(folder)
    assert f"prior:{name}" in text and re.search(r"For each virtual token: <code>p\(θ", text)
    module = sys.modules[prior_class(name).__module__]
    assert module.__doc__.splitlines()[0].split(":")[0] in text


def test_settings_of_the_prior_are_told(tmp_path):
    text = body(saved(tmp_path, tuning="deep", layers=[0, -1], prior_weight=0.3, coordinates="plain", seed=5))
    for said in ("deep prompt of 4", "0, -1 of 3", "| Weight | 0.3 |", "| Coordinates | plain |", "moved θ itself"):
        assert said in text
    assert "2 such references" in text and re.search(r"the model's own vocabulary \(9\d rows\)", text)


def test_an_authors_own_prior_is_told_as_such(tmp_path):
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(32), 0.1), 1)
    assert "its author's own" in body(saved(tmp_path, prior=normal))


def test_command_and_configuration_are_what_the_command_takes(adapter):
    text = body(adapter)
    command = shlex.split(re.search(r"```bash\n(.*?)\n```", text, re.DOTALL).group(1))
    dataclasses = (ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
    model, task, prompt, args = parse(dataclasses, command[2:] + ["--use_cpu"], "priors-peft train")
    assert (args.max_steps, args.seed, prompt.num_virtual_tokens, task.num_eval) == (4, 3, 4, 8)
    config = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL).group(1)
    values = yaml.safe_load(config)
    assert (values["max_steps"], values["prior"], values["learning_rate"]) == (4, "structured", 0.3)
    recipe = adapter.parent / "recipe.yaml"
    recipe.write_text(config)
    assert parse(dataclasses, [str(recipe), "--use_cpu"], "priors-peft train")[3].max_steps == 4


def test_nothing_of_the_author_is_given_away(tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    token = "hf_AbCdEfGhIjKlMnOpQrSt"
    place = home / "secret-project" / f"data-{token}"
    place.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("socket.gethostname", lambda: "alices-laptop")
    flags = ["--hub_token", token, "--run_name", "alices-laptop", "--save_steps", "2"]
    flags += ["--prior", "text", "--prior_kwargs", json.dumps({"text": f"what is {token} plus {home}/x"})]
    folder = train(make_base(place), place / "out", *flags)
    texts = [folder / name for name in (CARD, TRAINING)]
    texts += [folder / "checkpoint-2" / name for name in (CARD, TRAINING)]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for secret in (token, "alice", "secret-project", str(tmp_path)):
            assert secret not in text, (path, secret)
    for path in ("/data/rows", "~/rows", str(tmp_path)):
        write_json(folder / TASK_FILE, {"task": "squad", "task_kwargs": {"dataset": path}, "dataset": None})
        assert path not in card_text(folder)


def test_text_from_data_is_shown_and_not_obeyed(adapter, hub):
    task = {"task": HOSTILE, "task_kwargs": {HOSTILE: HOSTILE}, "description": HOSTILE, "template": HOSTILE}
    (adapter / TASK_FILE).write_text(json.dumps(task))
    facts = read_facts(adapter)
    facts.results = {"default": {HOSTILE: 0.5, "loss": 1.0}}
    (adapter / TRAINING).write_text(json.dumps({"format_version": 1} | vars(facts)))
    described = json.loads((adapter / "prior_config.json").read_text())
    described["config"]["prior_kwargs"] = {"text": HOSTILE}
    (adapter / "prior_config.json").write_text(json.dumps(described))
    headings = re.findall(r"^#.*$", body(adapter), re.MULTILINE)
    write_card(adapter, model_name=HOSTILE, tags=[HOSTILE], repo_id="user/adapter")
    text = body(adapter)
    card = ModelCard(text)
    card.validate()
    assert figures(card)["nll"] == 1.0
    for markup in ("<script", "\u202e", "\ud83d"):
        assert markup not in text, markup
    prose = re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    for markup in ("[b]", "http://c", "`a`", "# Owned", "| `"):
        assert markup not in prose, markup
    assert len(re.findall(r"^#.*$", card.text, re.MULTILINE)) == len(headings)
    assert re.findall(r"^```\w*$", card.text, re.MULTILINE) == ["```python", "```", "```bash", "```", "```yaml", "```"]
    assert re.findall(r"^---.*$", text, re.MULTILINE) == ["---", "---"]
    assert text.count("<!--") == 2 and text.endswith(f"{MARK}\n")
    compile(re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1), "snippet", "exec")
    tables = re.findall(r"(?:^\|.*\n)+", card.text, re.MULTILINE)
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables) and len(tables) == 3


def test_what_stands_below_the_line_outlives_every_regeneration(adapter, trained):
    own = f"## Notes\n\n---\nkept: [x](y) <b>as it is</b>\n{MARK}\nthis too\n"
    (adapter / CARD).write_text(body(adapter) + own, encoding="utf-8")
    assert main(["card", str(adapter), "--license", "mit", "--language", "en"]) == 0
    assert body(adapter).endswith(f"\n{MARK}\n{own}")
    data = ModelCard.load(adapter / CARD).data
    assert (data.license, data.language) == ("mit", "en")
    changed = (
        body(adapter).replace("license: mit", "license: mit\nco2: 1").replace("- priors-peft", "- mine\n- priors-peft")
    )
    (adapter / CARD).write_text(changed, encoding="utf-8")
    assert main(["card", str(adapter)]) == 0
    data = ModelCard.load(adapter / CARD).data
    assert (data.license, data["co2"]) == ("mit", 1) and "mine" in data.tags
    assert body(adapter).endswith(f"\n{MARK}\n{own}")
    before = (adapter / CARD).stat().st_mtime_ns
    assert main(["card", str(adapter)]) == 0
    assert (adapter / CARD).stat().st_mtime_ns == before


@pytest.mark.parametrize("front", ["", "---\nlicense: mit\n---\n", "---\n: [\n---\n"])
def test_a_card_that_somebody_wrote_moves_below_the_line(adapter, front):
    (adapter / CARD).write_text(f"{front}# My prompt\n\nIs good.\n")
    write_card(adapter)
    assert body(adapter).partition(MARK)[2].endswith("# My prompt\n\nIs good.\n")
    assert (ModelCard.load(adapter / CARD).data.license == "mit") == ("mit" in front)
    (adapter / CARD).write_text("# m\n\n[More Information Needed]\n")
    write_card(adapter)
    assert body(adapter).endswith(f"{MARK}\n")


def test_evaluation_beside_no_prompt_and_the_start_goes_onto_the_card(adapter, capsys):
    rows = adapter.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    assert main(["evaluate", str(adapter), "--train_file", str(rows), "--num_eval", "8", "--initial"]) == 0
    told = json.loads((adapter / "evaluation.json").read_text())
    assert set(told["figures"]) == {"no prompt", "before training", "this prompt"} and told["num_rows"] == 8
    trained = read_facts(adapter)
    assert told["figures"]["this prompt"]["nll"] == pytest.approx(trained.results["default"]["loss"], rel=1e-4)
    assert told["figures"]["before training"]["nll"] == pytest.approx(
        trained.initial_results["default"]["loss"], rel=1e-4
    )
    names = ["no prompt", "before training", "this prompt"]
    assert re.findall(rf"^\| ({'|'.join(names)}) \|", body(adapter), re.MULTILINE) == names
    # Where only training's own log knows the start, it is told if the rows were the same.
    for nll, said in ((told["figures"]["this prompt"]["nll"], names), (9.0, ["no prompt", "this prompt"])):
        later = {"no prompt": {"nll": 5.0}, "this prompt": {"nll": nll}}
        write_json(adapter / "evaluation.json", told | {"figures": later})
        shown = re.findall(rf"^\| ({'|'.join(names)}) \|", card_text(adapter), re.MULTILINE)
        assert shown == said
    write_json(adapter / TASK_FILE, {"task": "math"})
    write_json(adapter / "evaluation.json", {})
    assert main(["evaluate", str(adapter), "--train_file", str(rows), "--num_eval", "8"]) == 0
    assert json.loads((adapter / "evaluation.json").read_text()) == {}  # of another task than its own


def test_the_analysis_that_lies_there_is_told(adapter):
    base, tokenizer = make_model(), make_tokenizer()
    analysis = analyze(
        [str(adapter)], base, tokenizer, {"completions": addition_rows(6)}, num_draws=19, progress=False
    )
    write_json(adapter / ANALYSIS, analysis)
    (adapter / "tokens.png").write_bytes(b"png")
    write_card(adapter)
    text = body(adapter)
    told = analysis["adapters"][0]
    assert (
        "19 random prompts" in text
        and re.search(r"!\[The nearest token .*\]\(tokens.png\)", text)
        and "geometry.png" not in text
    )
    for token in told["tokens"]["virtual_tokens"]:
        assert f"| {token['index']} | <code>" in text and f"| {token['p_value']:.3f} |" in text
    assert "ollapsed: effective rank" in text or "Narrowed: effective rank" in text
    assert "On 6 rows of the analysis" in text and "| no prompt |" in text


@pytest.mark.slow
def test_what_was_measured_of_another_prompt_in_the_folder_is_not_told(adapter):
    rows = adapter.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    base, tokenizer = make_model(), make_tokenizer()
    write_json(adapter / ANALYSIS, analyze([str(adapter)], base, tokenizer, num_draws=19, progress=False))
    assert main(["evaluate", str(adapter), "--train_file", str(rows), "--num_eval", "8"]) == 0
    assert "| no prompt |" in body(adapter) and "19 random prompts" in body(adapter)
    train(make_base(adapter.parent), adapter, "--prior", "gaussian")
    assert "| no prompt |" not in body(adapter) and "19 random prompts" not in body(adapter)
    loss = read_facts(adapter).results["default"]["loss"]
    assert figures(ModelCard.load(adapter / CARD))["nll"] == pytest.approx(loss, abs=1e-5)


def test_runs_trained_together_are_told_with_their_spread(tmp_path, hub):
    tokenizer = make_tokenizer()
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=tokenizer, adapter_name="s0")
    model.add_adapter("s1", PriorConfig(num_virtual_tokens=4, seed=1))
    args = PriorTrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, save_strategy="no")
    rows = addition_rows(12)
    trainer = PriorTrainer(model, args, rows, rows[:4], processing_class=tokenizer, adapter_names=["s0", "s1"])
    trainer.train()
    trainer.save_model()
    measured = trainer.evaluate()
    card = ModelCard.load(tmp_path / CARD)
    card.validate()
    losses = [measured["eval_loss/s0"], measured["eval_loss/s1"]]
    assert f"mean ± standard deviation | {statistics.mean(losses):.4g} ± {statistics.stdev(losses):.2g} |" in card.text
    assert "2 soft prompts" in card.text and 'subfolder="s0"' in card.text
    assert "It is one run" not in card.text


def test_runs_below_a_folder_are_adapters_of_their_own(adapter, tmp_path, capsys):
    runs = tmp_path / "runs"
    for run in ("a", "b"):
        shutil.copytree(adapter, runs / run)
    assert main(["card", str(runs)]) == 1
    assert f"must hold an adapter, got {str(runs)!r} without adapter_config.json" in (said := capsys.readouterr().err)
    assert "it holds the runs a, b, each an adapter of its own" in said and not (runs / CARD).exists()
    shutil.copytree(runs / "b", runs / "a" / "b")
    assert list(adapters_in(runs / "a")) == ["default"]


def test_data_sets_that_rows_were_loaded_from_are_named(tmp_path):
    tokenizer = make_tokenizer()
    rows = Dataset.from_list(addition_rows(8))
    rows.info.download_checksums = {"hf://datasets/user/sums@0123abc/train.parquet": {}, "/home/a/b.csv": {}}
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=tokenizer)
    args = PriorTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True)
    trainer = PriorTrainer(model, args, rows, processing_class=tokenizer)
    trainer.save_model()
    assert ModelCard.load(tmp_path / CARD).data.datasets == ["user/sums"]


def test_a_task_on_the_hub_is_named_by_its_data_set_and_template(adapter, hub, tmp_path):
    facts = {"task": "superglue:rte", "dataset": "aps/super_glue", "template": "{premise}\nAnswer:", "num_train": 2490}
    write_json(adapter / TASK_FILE, facts | {"description": "Decide.", "task_kwargs": {"subtask": "rte"}})
    write_card(adapter)
    card = ModelCard.load(adapter / CARD)
    card.validate()
    (result,) = {(each.dataset_type, each.dataset_name, each.dataset_config) for each in card.data.eval_results}
    assert result == ("aps/super_glue", "superglue:rte", "rte") and card.data.datasets == ["aps/super_glue"]
    assert "{premise}⏎Answer:" in card.text and "2,490 training rows" in card.text and "Decide." in card.text
    assert 'prompt = "{premise}\\nAnswer:".format(premise="…")' in card.text
    for template, prompt in (("{", '"{"'), ("{0}", '"{0}"'), ("{class}", '"{class}"'), ("a", '"a"')):
        write_json(adapter / TASK_FILE, facts | {"template": template})
        assert f"prompt = {prompt}\n" in card_text(adapter)
    (tmp_path / "prompts.csv").write_text("act,prompt\n" + "".join(f"role {n},do {n}\n" for n in range(20)))
    task = load_task("prompts", data_dir=str(tmp_path))
    assert task.template == "Act: {act}\nPrompt:" and task.dataset is None


def test_a_checkpoint_is_a_whole_adapter_with_its_card(trained):
    checkpoint = trained / "checkpoint-2"
    assert ModelCard.load(checkpoint / CARD).data.library_name == "peft"
    assert read_facts(checkpoint).steps == 2 and "own prompts and completions" in body(checkpoint)


def test_what_is_damaged_is_refused_by_name(adapter, capsys):
    (adapter / TRAINING).write_text("{")
    assert main(["card", str(adapter)]) == 1
    assert f"{TRAINING} must be JSON" in capsys.readouterr().err
    write_json(adapter / TRAINING, {"format_version": 9})
    assert main(["card", str(adapter)]) == 1
    assert "format_version must be 1" in capsys.readouterr().err
    wrong = [(TRAINING, {"results": {"default": 3}}), (TRAINING, {"steps": "x"}), (TRAINING, {"settings": [1]})]
    wrong += [(TASK_FILE, {"task_kwargs": 3}), (ANALYSIS, {"adapters": [{}]}), ("evaluation.json", {"figures": [1]})]
    for name, value in wrong:
        write_json(adapter / name, {"format_version": 1} | value)
        assert main(["card", str(adapter)]) == 1, value
        assert "must be as priors_peft writes them" in capsys.readouterr().err, value
        (adapter / name).unlink()
    assert main(["card", str(adapter / "checkpoint-2" / "none")]) == 1
    assert "must hold an adapter" in capsys.readouterr().err


def test_facts_round_trip(tmp_path):
    facts = TrainingFacts(base_model="user/base", steps=3, results={"default": {"loss": 1.5}}, recipe={"a": [1]})
    facts.save(tmp_path)
    assert read_facts(tmp_path) == facts


@pytest.mark.slow
def test_the_snippets_run_as_printed(tmp_path, hub):
    base = tmp_path / "base"
    make_base(tmp_path)
    hub.create("user/base")
    hub.commit("user/base", "main", "base", {path.name: path.read_bytes() for path in base.iterdir()})
    folder, local = saved(tmp_path / "adapter"), saved(tmp_path / "local", base=str(base))
    names = {"user/adapter": folder, "user/local": local, "user/bundled": saved(tmp_path / "bundled", base=BUNDLED)}
    assert all(main(["push", str(path), name]) == 0 for name, path in names.items())
    hub.create(BUNDLED_ORIGIN)
    hub.commit(BUNDLED_ORIGIN, "main", "base", hub.files("user/base"))
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= hub.environment(HF_HOME=str(tmp_path / "home"))
    pushed = {name: PYTHON.findall(hub.files(name)[CARD].decode()) for name in names}
    assert [len(codes) for codes in pushed.values()] == [2, 1, 2]
    assert all(f'"{name}"' in code for name, codes in pushed.items() for code in codes)
    write_card(folder)  # here it has no name
    write_card(local)
    (there,) = PYTHON.findall(body(local))
    here = [*PYTHON.findall(body(folder)), there.replace('"."', repr(str(local)))]
    codes = [*pushed["user/adapter"], pushed["user/local"][0].replace("path/to/the/base/model", str(base))]
    codes += [pushed["user/bundled"][1], *here]  # its first loads the bundled model, as tests/test_readme.py does
    run = "import sys\nfor code in sys.argv[1:]:\n    exec(code, {'__name__': '__main__'})\n    print('ran')"
    done = subprocess.run(
        [sys.executable, "-c", run, *codes], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0 and done.stdout.count("ran\n") == len(codes) == 7, done.stderr
