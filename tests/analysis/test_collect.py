"""The analysis of adapters: planted structure is named, and nothing hangs on order, batch size or chance."""

import copy
import json
import shutil

import pytest
import torch
from conftest import LAYERS, addition_rows, make_model, make_tokenizer
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_trainer import make_trainer

from priors_peft import PriorConfig, get_prior_model
from priors_peft.analysis import analyze, read_sources
from priors_peft.analysis.collect import FORMAT_VERSION
from priors_peft.analysis.members import draw
from priors_peft.analysis.sources import unique_names
from priors_peft.files import write_json
from priors_peft.priors.reference import text_states
from priors_peft.snapshots import SNAPSHOTS


P = 4
PLANTED = [10, 25, 77, 40]
QUICK = {"progress": False, "num_draws": 40, "k": 5}


def save(folder, prompt=None, base="org/base", seed=0, **settings):
    """An adapter in a folder, its prompt drawn from the prior or given."""
    model = make_model()
    model.name_or_path = base
    config = PriorConfig(**{"num_virtual_tokens": P, "prior": "gaussian", "seed": seed} | settings)
    tuned = get_prior_model(model, config, tokenizer=make_tokenizer())
    if prompt is not None:
        tuned.prompt_encoder["default"].set_prompt(prompt(model) if callable(prompt) else prompt)
    tuned.save_pretrained(folder)
    return str(folder)


def planted(model):
    return model.get_input_embeddings().weight[PLANTED].detach()[None]


def run(adapters, tasks=None, **settings):
    return analyze(adapters, make_model(), make_tokenizer(), tasks, **QUICK | settings)


def without_date(analysis):
    return json.dumps(analysis | {"created": None}, sort_keys=True)


def words(rows):
    return [{"prompt": f"what {row['prompt']} is", "completion": " plus"} for row in rows]


TASKS = {"sums": addition_rows(8), "words": words(addition_rows(8, start=100))}


def test_a_prompt_made_of_vocabulary_rows_is_named_as_signal(tmp_path):
    (adapter,) = run([save(tmp_path / "planted", planted)])["adapters"]
    found = adapter["tokens"]["virtual_tokens"]
    assert [token["nearest"][0]["id"] for token in found] == PLANTED
    names = make_tokenizer().convert_ids_to_tokens(PLANTED)
    assert [token["nearest"][0]["text"] for token in found] == names
    assert all(token["signal"] and token["score"] == pytest.approx(1) for token in found)
    assert all(token["p_value"] == pytest.approx(1 / 41) for token in found)
    assert adapter["tokens"]["num_signal"] == P
    # Special tokens are not words.
    assert not {near["id"] for token in found for near in token["nearest"]} & {0, 1, 2, 3}


def test_words_that_a_text_prior_names_are_inherited_even_where_training_pulled_nearer_to_them(tmp_path):
    text = {"prior": "text", "prior_kwargs": {"text": "1 plus 2 .", "spread": 1.0}}

    tuned = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=P, **text), tokenizer=make_tokenizer())
    mode = tuned.prompt_encoder["default"].priors[0].loc[None].clone()
    mode[0, 3] = make_model().get_input_embeddings().weight[77].detach()
    (adapter,) = run([save(tmp_path / "mode", mode, **text)])["adapters"]
    found = adapter["tokens"]["virtual_tokens"]
    assert all(token["p_value"] <= 0.05 for token in found)
    assert all(token["score"] > token["initial_nearest"][0]["score"] for token in found)
    assert [token["inherited"] for token in found] == [True, True, True, False]
    assert [token["signal"] for token in found] == [False, False, False, True]
    assert adapter["tokens"]["num_signal"] == 1


def test_an_untrained_prompt_shows_no_signal_and_its_start_is_not_among_the_draws(tmp_path):
    path = save(tmp_path / "start")
    (adapter,) = run([path])["adapters"]
    assert adapter["tokens"]["num_signal"] == 0
    assert all(token["inherited"] and not token["moved"] for token in adapter["tokens"]["virtual_tokens"])
    assert adapter["geometry"]["layers"][0]["token"]["drift"] == pytest.approx([0] * P, abs=1e-6)
    (source,) = read_sources([path])
    for seed in range(3):
        draws = draw(source.saved.priors[0], 5, P, "null", 0, seed)
        assert (draws - source.prompt[0]).abs().flatten(1).amax(1).min() > 0.01


@pytest.mark.slow
def test_nothing_hangs_on_the_order_of_adapters_and_a_seed_gives_one_result(tmp_path):
    adapters = [save(tmp_path / name, seed=seed) for seed, name in enumerate("bca")]
    adapters.append(save(tmp_path / "deep", tuning="deep", layers=[0, 1]))
    first = run(adapters, TASKS)
    again = run([adapters[index] for index in (3, 1, 0, 2)], TASKS)
    assert without_date(first) == without_date(again)
    assert [adapter["name"] for adapter in first["adapters"]] == ["a", "b", "c", "deep"]
    other = run(adapters, TASKS, seed=1)
    assert without_date(first) != without_date(other)


@pytest.mark.slow
def test_the_batch_size_changes_no_figure(tmp_path):
    adapters = [save(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    one, many = (run(adapters, TASKS, batch_size=size) for size in (1, 16))
    for first, second in zip(one["adapters"], many["adapters"], strict=True):
        for key in ("prompt_nll", "hardened_nll", "no_prompt_nll", "initial_nll"):
            assert first["faithfulness"][key] == pytest.approx(second["faithfulness"][key], rel=1e-5)
        assert first["tokens"] == second["tokens"] and first["geometry"] == second["geometry"]
    lines = [result["stability"]["groups"][0]["lines"][0]["nll"] for result in (one, many)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


def test_one_adapter_has_tokens_geometry_and_projections_and_says_what_is_left_out(tmp_path):
    found = run([save(tmp_path / "one", inference="map")])
    assert found["format_version"] == FORMAT_VERSION and found["base_model"] == "org/base"
    adapter = found["adapters"][0]
    assert (adapter["tuning"], adapter["prior"], adapter["num_virtual_tokens"]) == ("soft", "gaussian", P)
    assert adapter["source"] == "one" and str(tmp_path) not in json.dumps(found)
    for plane in ("pca", "tsne"):
        groups = found["projection"][plane]["groups"]
        assert {group["kind"] for group in groups} == {"vocabulary", "draws", "initial", "prompt"}
        for group in groups:
            assert len(group["points"]) == len(group["labels"])
    assert {name for name, value in found.items() if value is None} == {
        "command",
        "activations",
        "stability",
        "transfer",
        "words",
        "questions",
    }
    assert set(found["left_out"]) == {"faithfulness", "activations", "stability", "transfer", "words"}
    scripts = [token["script"] for token in adapter["tokens"]["virtual_tokens"]]
    assert adapter["tokens"]["scripts"] == {name: scripts.count(name) / P for name in scripts}
    json.dumps(found, allow_nan=False)


def test_deep_prompts_have_tokens_at_the_embedding_layer_and_geometry_at_each(tmp_path):
    def deep(model):
        states = text_states(model, list(range(LAYERS)), torch.tensor(PLANTED))
        return torch.stack(states)

    path = save(tmp_path / "deep", deep, tuning="deep", prior="structured")
    (adapter,) = run([path])["adapters"]
    assert adapter["layers"] == [layer["layer"] for layer in adapter["geometry"]["layers"]] == [0, 1, 2]
    assert [token["nearest"][0]["id"] for token in adapter["tokens"]["virtual_tokens"]] == PLANTED
    assert "layers 1, 2 have no vocabulary" in adapter["parts"]
    radii = [layer["token"]["radius"] for layer in adapter["geometry"]["layers"]]
    assert all(len(radius) == P and min(radius) > 0 for radius in radii) and radii[0] != radii[1]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_a_prompt_that_is_its_tokens_loses_nothing_by_being_read_as_them(tmp_path, tuning):
    def text(model):
        return torch.stack(text_states(model, [0] if tuning == "soft" else [0, 1, 2], torch.tensor(PLANTED)))

    wayward = save(tmp_path / "wayward", tuning=tuning)
    plain, other = run([save(tmp_path / "text", text, tuning=tuning), wayward], {"sums": TASKS["sums"]})["adapters"]
    found = plain["faithfulness"]
    assert found["rows"] == 8 and found["task"] == "sums"
    assert found["hardened_nll"] == pytest.approx(found["prompt_nll"], rel=1e-5)
    assert found["waywardness"]["lost"] == pytest.approx(0, abs=1e-4)
    assert abs(other["faithfulness"]["waywardness"]["lost"]) > 1e-3
    assert found["initial_nll"] != found["prompt_nll"] != found["no_prompt_nll"]
    increases = [token["increase"] for token in found["ablations"]]
    assert sorted(increases, reverse=True) == increases and {t["index"] for t in found["ablations"]} == set(range(P))


def test_the_course_of_training_ends_at_the_prompt(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=5)
    trainer.train()
    trainer.save_model()
    found = run([tmp_path / "run"])
    (adapter,) = found["adapters"]
    layer = adapter["geometry"]["layers"][0]
    assert layer["series"]["steps"] == list(range(6)) and adapter["steps"] == 5
    drift = layer["series"]["measures"]["drift"]["values"]
    assert drift[0] == pytest.approx(0, abs=1e-6)
    assert drift[-1] == pytest.approx(torch.tensor(layer["token"]["drift"]).square().mean().sqrt().item(), rel=1e-6)
    (course,) = (group for group in found["projection"]["pca"]["groups"] if group["kind"] == "trajectory")
    (end,) = (group for group in found["projection"]["pca"]["groups"] if group["kind"] == "prompt")
    assert course["points"][-4:] == end["points"] and course["steps"] == [step for step in range(6) for _ in range(4)]


def test_snapshots_of_another_prompt_are_left_out_and_damaged_ones_refused(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "run", max_steps=2)
    trainer.train()
    other = save(tmp_path / "other")
    shutil.copy(tmp_path / "run" / SNAPSHOTS, other)
    (adapter,) = run([other])["adapters"]
    assert "is of another prompt" in caplog.text
    assert adapter["steps"] is None and adapter["geometry"]["layers"][0]["series"]["steps"] == [None]
    (tmp_path / "other" / SNAPSHOTS).write_bytes(b"cut")
    with pytest.raises(ValueError, match="must be a whole safetensors file.*Delete it"):
        run([other])


def test_permuted_copies_are_matched_at_distance_zero_and_a_line_between_copies_is_flat(tmp_path):
    def permuted(model):
        return planted(model)[:, [2, 0, 3, 1]]

    adapters = [save(tmp_path / "a", planted), save(tmp_path / "b", permuted), save(tmp_path / "c", planted)]
    found = run(adapters, {"sums": TASKS["sums"]})
    (group,) = found["stability"]["groups"]
    assert group["adapters"] == ["a", "b", "c"] and group["task"] is None
    assert group["matched_distances"][0][1] == pytest.approx(0, abs=1e-5)
    assert group["raw_distances"][0][1] > 1 and group["raw_distances"][0][2] == 0
    assert len(group["lines"]) == 3 and group["equidistance"]["matched"] is True
    flat = next(line for line in group["lines"] if line["pair"] == ["a", "c"])
    assert flat["nll"] == pytest.approx([flat["nll"][0]] * 11, rel=1e-6)
    assert flat["barrier"]["height"] == pytest.approx(0, abs=1e-6)
    assert group["metric_spread"]["count"] == 3


@pytest.mark.slow
def test_runs_are_of_one_task_and_of_one_shape(tmp_path):
    names = {"a": "sums", "b": "sums", "c": "words", "d": "words"}
    adapters = [save(tmp_path / name, seed=seed) for seed, name in enumerate(names)]
    for name, task in names.items():
        write_json(tmp_path / name / "task.json", {"task": task, "task_kwargs": {}})
    adapters.append(save(tmp_path / "longer", num_virtual_tokens=7))
    groups = run(adapters)["stability"]["groups"]
    assert [(group["task"], group["adapters"]) for group in groups] == [("sums", ["a", "b"]), ("words", ["c", "d"])]
    assert all(group["lines"] == [] and group["metric_spread"] is None for group in groups)
    each = run(adapters[1:3], TASKS)["adapters"]
    assert [adapter["faithfulness"]["task"] for adapter in each] == ["sums", "words"]
    two = run([adapters[0], adapters[4]])
    assert two["stability"] is None and "number of virtual tokens" in two["left_out"]["stability"]


def test_a_word_near_every_prompt_is_over_represented(tmp_path):
    def with_token(model, token=50):
        prompt = torch.randn(1, P, 32, generator=torch.Generator().manual_seed(3))
        prompt[0, 1] = model.get_input_embeddings().weight[token].detach()
        return prompt

    adapters = [save(tmp_path / str(seed), with_token, seed=seed) for seed in range(6)]
    found = run(adapters, k=1)["words"]
    assert make_tokenizer().convert_ids_to_tokens(50) in found["words"][:P]
    assert found["num_prompts"] == 6 and found["counts"][0] == 6 and found["num_draws"] == 20


def test_tasks_are_told_apart_by_their_activations(tmp_path):
    adapters = [save(tmp_path / "a"), save(tmp_path / "b", seed=1)]
    whole = run(adapters, TASKS, activation_layers=[1, -1], loss_rows=3)
    assert [adapter["faithfulness"]["rows"] for adapter in whole["adapters"]] == [3, 3]
    found = whole["activations"]
    assert [(one["layer"], one["with_prompt"], one["adapter"]) for one in found["layers"]] == [
        (1, False, None),
        (1, True, "a"),
        (LAYERS, False, None),
        (LAYERS, True, "a"),
    ]
    for one in found["layers"]:
        assert one["chance"] == 0.5 and one["counts"] == {"sums": 8, "words": 8}
        assert one["probe_accuracy"] > 0.9
        assert [group["name"] for group in one["groups"]] == ["sums", "words"]
        assert all(len(group["points"]) == len(group["labels"]) == 8 for group in one["groups"])


def test_descriptions_come_with_one_of_a_random_prompt(tmp_path):
    (adapter,) = run([save(tmp_path / "a", planted)], describe=True)["adapters"]
    assert isinstance(adapter["description"], str) and isinstance(adapter["description_of_draw"], str)
    assert adapter["faithfulness"] is None


def test_a_stock_prompt_is_held_against_a_prior_fitted_for_it_and_has_no_start(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    model = get_peft_model(make_model(), config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(planted(make_model())[0])
    model.save_pretrained(tmp_path / "stock")
    (adapter,) = run([tmp_path / "stock"], {"sums": TASKS["sums"]})["adapters"]
    assert adapter["prior_source"] == "fitted for the analysis" and adapter["prior"] == "structured"
    assert adapter["tokens"]["num_signal"] == P
    assert adapter["tokens"]["virtual_tokens"][0]["initial_nearest"] is None
    assert adapter["geometry"]["layers"][0]["token"]["drift"] is None
    assert adapter["faithfulness"]["initial_nll"] is None


def test_a_point_prior_and_a_single_virtual_token_can_be_analysed(tmp_path):
    text = {"prior": "text", "prior_kwargs": {"text": "what is 3 plus", "spread": 0.0}, "prior_weight": 0.0}
    adapters = [save(tmp_path / "point", **text), save(tmp_path / "single", num_virtual_tokens=1)]
    point, single = run(adapters)["adapters"]
    assert point["tokens"]["num_signal"] == 0 and point["geometry"]["layers"][0]["token"]["radius"] == [0] * P
    assert "squared_mmd" not in single["geometry"]["layers"][0]["series"]["measures"]


def test_adapters_of_two_base_models_are_refused_by_name(tmp_path):
    one, two = save(tmp_path / "one"), save(tmp_path / "two", base="org/other")
    with pytest.raises(ValueError, match="one base model, got org/base of 'one' and org/other of 'two'"):
        run([one, two])


def test_names_tell_adapters_apart_without_the_folders_of_the_machine(tmp_path):
    paths = [tmp_path / name for name in ("x/seed0", "y/seed0", "y/seed1")]
    for path in paths:
        path.mkdir(parents=True)
    names = unique_names([*map(str, paths), "user/adapter"])
    assert names == ["x/seed0", "y/seed0", "seed1", "user/adapter"]
    with pytest.raises(ValueError, match="adapters must be different, got .*seed1' twice"):
        unique_names([str(paths[2])] * 2)


def test_bad_input_is_refused(tmp_path):
    good = save(tmp_path / "good")
    with pytest.raises(ValueError, match="metric must be one of cosine, l2, dot, got 'manhattan'"):
        run([good], metric="manhattan")
    with pytest.raises(ValueError, match="num_draws must be an integer >= 19, got 5"):
        run([good], num_draws=5)
    with pytest.raises(ValueError, match="evaluation rows of task 'sums' must be an integer >= 1, got 0"):
        run([good], {"sums": []})
    with pytest.raises(ValueError, match="adapters must be a list of at least one"):
        run([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must be an adapter, got .*empty', which has no adapter_config.json"):
        run([tmp_path / "empty"])
    prefix = get_peft_model(make_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    prefix.save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="'prefix' must hold vectors.*neither tokens nor geometry apply"):
        run([tmp_path / "prefix"])
    weights = tmp_path / "good" / "prior.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="prior.safetensors is damaged"):
        run([good])
    wide = copy.deepcopy(make_model().config)
    wide.hidden_size = 16
    with pytest.raises(ValueError, match="must fit the base model"):
        analyze([save(tmp_path / "fits")], type(make_model())(wide), make_tokenizer(), **QUICK)
