"""Pushing to a Hub on this machine, by the real client: whole, once, and again after whatever failed."""

import hashlib
import json
import logging
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import addition_rows, make_model, make_tokenizer, save_base
from hub.loopback import TOKEN
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from peft import PeftModel

import priors_peft
from priors_peft import PriorConfig, PriorPeftModel, PriorTrainer, PriorTrainingArguments, get_prior_model
from priors_peft.cli import main
from priors_peft.files import write_json
from priors_peft.hub.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PRIOR_CONFIG, PRIOR_WEIGHTS, read_task
from priors_peft.hub.card import CARD, MARK
from priors_peft.hub.facts import TRAINING
from priors_peft.hub.push import PushError, push_folder


pytestmark = pytest.mark.slow


CORE = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, PRIOR_CONFIG, PRIOR_WEIGHTS, CARD}


def tuned(seed=0, base="user/base", **settings):
    model = make_model()
    model.name_or_path = base
    return get_prior_model(model, PriorConfig(num_virtual_tokens=4, seed=seed, **settings))


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "my adapter"
    tuned().save_pretrained(folder)
    return folder


def make_trainer(folder, **settings):
    tokenizer = make_tokenizer()
    model = tuned()
    defaults = {"max_steps": 4, "use_cpu": True, "disable_tqdm": True, "save_steps": 2, "report_to": "none"}
    args = PriorTrainingArguments(str(folder), **defaults | settings)
    rows = addition_rows(12)
    return PriorTrainer(model, args, rows, rows[:4], processing_class=tokenizer)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def ids():
    return torch.tensor([[3, 4, 5]])


def test_all_that_belongs_to_an_adapter_goes_in_one_commit_and_nothing_else(adapter, hub):
    for name in ("analysis.json", "evaluation.json", "task.json"):
        write_json(adapter / name, {})
    shared = ["snapshots.safetensors", "tokens.png", "report.html"]
    for name in (
        *shared,
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "tokenizer.json",
        ".env",
        "notes",
    ):
        (adapter / name).write_bytes(b"x")
    (adapter / "runs").mkdir()
    (adapter / "runs" / "events.out.tfevents.1.alices-laptop").write_bytes(b"x")
    done, new = push_folder(adapter, "user/adapter")
    assert new and len(hub.commits("user/adapter")) == 1 and done.oid == hub.repos["user/adapter"].at("main").oid
    assert set(hub.files("user/adapter")) == CORE | {*shared, "analysis.json", "evaluation.json", "task.json"}
    for name, content in hub.files("user/adapter").items():
        assert content == (adapter / name).read_bytes(), name
    assert '"user/adapter"' in (adapter / CARD).read_text()


def test_a_push_without_changes_is_no_commit_and_one_with_sends_only_them(adapter, hub, capsys):
    command = ["push", str(adapter), "user/adapter"]
    assert main(command) == 0 and "pushed" in capsys.readouterr().out
    uploads = hub.counted("PUT")
    assert main(command) == 0
    assert "nothing has changed" in capsys.readouterr().out
    assert len(hub.commits("user/adapter")) == 1 and hub.counted("PUT") == uploads == 2
    with open(adapter / CARD, "a") as file:
        file.write("A note.\n")
    assert main(command) == 0
    assert len(hub.commits("user/adapter")) == 2 and hub.counted("PUT") == uploads
    assert hub.files("user/adapter")[CARD].decode().endswith(f"{MARK}\nA note.\n")


@pytest.mark.parametrize("there", ["mine\n", None])
def test_what_its_author_wrote_on_the_hub_is_taken_over(there, adapter, hub):
    push_folder(adapter, "user/adapter")
    files = hub.repos["user/adapter"].at("main").files
    text = files[CARD] + b"mine\n" if there else b"---\nlicense: mit\n---\nmine\n"
    hub.commit("user/adapter", "main", "on the web", files | {CARD: text})
    push_folder(adapter, "user/adapter")
    assert (adapter / CARD).read_text().partition(MARK)[2].strip() == "mine"
    assert hub.files("user/adapter")[CARD] == (adapter / CARD).read_bytes()
    tuned(seed=3).push_to_hub("user/adapter")
    assert hub.files("user/adapter")[CARD].decode().partition(MARK)[2].strip() == "mine"


def test_a_model_pushes_itself(hub):
    model = tuned()
    model.push_to_hub("user/adapter", private=True, license="mit", commit_message="all of it")
    assert set(hub.files("user/adapter")) == CORE and hub.commits("user/adapter") == ["all of it"]
    assert ModelCard(hub.files("user/adapter")[CARD].decode()).data.license == "mit"
    again = PriorPeftModel.from_pretrained(make_model(), "user/adapter")
    assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
    hub.fail("/commit/", 500)
    with pytest.raises(PushError, match="the Hub answered 500.* call push_to_hub again"):
        tuned(seed=1).push_to_hub("user/adapter")


FAULTS = {
    "not logged in": ("repos/create", 401, "hf auth login"),
    "read-only token": ("repos/create", 403, "write access"),
    "no such repository": ("preupload", 404, "no such repository or revision"),
    "conflict": ("/commit/", 409, "at the same time"),
    "too large": ("/commit/", 413, "too large"),
    "too large an object": ("PUT", 413, "too large"),
    "too many requests": ("/commit/", 429, "wait 7 seconds"),
    "too many requests for long": ("preupload", 429, "wait 7 seconds"),
    "broken": ("/commit/", 500, "the Hub answered 500"),
    "broken for long": ("objects/batch", 500, "the Hub answered 500"),
    "gateway": ("validate-yaml", 502, "the Hub answered 502"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_is_said_and_the_command_it_gives_finishes_the_push(fault, adapter, hub, capsys):
    pattern, status, said = FAULTS[fault]
    hub.fail(pattern, status, **({"Retry_After": "7"} if status == 429 else {}))
    before = hashes(adapter)
    with pytest.raises(PushError, match=said) as error:
        push_folder(adapter, "user/adapter", private=True, revision="v 1", license="mit", model_name='my "own"')
    after = hashes(adapter)
    assert {name: after[name] for name in before if name != CARD} == {n: h for n, h in before.items() if n != CARD}
    assert f"{status}" in str(error.value) and "The folder is whole" in str(error.value)
    hub.faults.clear()
    command = shlex.split(str(error.value).partition("to try again: ")[2])
    assert command[:7] == ["priors-peft", "push", str(adapter), "user/adapter", "--private", "--revision", "v 1"]
    assert main(command[1:]) == 0
    card = ModelCard(hub.files("user/adapter", "v 1")[CARD].decode())
    assert card.data.license == "mit" and '# my "own"' in card.text
    assert set(hub.files("user/adapter", "v 1")) == CORE and len(hub.commits("user/adapter", "v 1")) == 1
    assert hub.repos["user/adapter"].private


@pytest.mark.parametrize("pattern", ["PUT", "/commit/", "preupload", "repos/create"])
def test_a_connection_that_is_cut_loses_nothing(pattern, adapter, hub):
    before = hashes(adapter)
    hub.cut(pattern, after=40)
    with pytest.raises(PushError, match="the connection to the Hub was cut"):
        push_folder(adapter, "user/adapter")
    assert hashes(adapter).keys() == before.keys()
    assert "user/adapter" not in hub.repos or hub.commits("user/adapter") == []
    hub.faults.clear()
    assert push_folder(adapter, "user/adapter")[1]
    assert hub.files("user/adapter")[PRIOR_WEIGHTS] == (adapter / PRIOR_WEIGHTS).read_bytes()


def test_after_a_cut_only_what_is_missing_is_sent_again(adapter, hub):
    object_id = hashlib.sha256((adapter / PRIOR_WEIGHTS).read_bytes()).hexdigest()
    hub.cut(f"PUT .*{object_id}", after=100)
    with pytest.raises(PushError):
        push_folder(adapter, "user/adapter")
    other = hashlib.sha256((adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    assert other in hub.objects and object_id not in hub.objects
    hub.faults.clear()
    hub.requests.clear()
    push_folder(adapter, "user/adapter")
    assert hub.counted("PUT") == hub.counted(f"PUT .*{object_id}") == 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(adapter, hub):
    hub.lose("/commit/")
    with pytest.raises(PushError, match="the connection to the Hub was cut"):
        push_folder(adapter, "user/adapter")
    assert len(hub.commits("user/adapter")) == 1
    hub.faults.clear()
    assert not push_folder(adapter, "user/adapter")[1]
    assert len(hub.commits("user/adapter")) == 1


def test_short_outages_are_waited_out_by_the_client(adapter, hub):
    hub.fail("preupload", 429, times=2, Retry_After="3")
    hub.fail("objects/batch", 500, times=2)
    hub.cut("PUT", after=10, times=1)
    assert push_folder(adapter, "user/adapter")[1]


def test_a_hub_out_of_reach_is_said(adapter, hub, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert main(["push", str(adapter), "user/adapter"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"can't be reached at http://127.0.0.1:{port}" in line and "to try again: priors-peft push" in line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push_folder(adapter, "user/adapter")


def test_the_base_models_licence_is_the_cards_unless_its_author_names_one(adapter, hub):
    front = "---\nlicense: other\nlicense_name: some-1\nlicense_link: LICENSE\n---\n"
    hub.create("user/base", private=True)
    hub.commit("user/base", "main", "base", {CARD: front.encode()})
    push_folder(adapter, "user/adapter")
    data = ModelCard(hub.files("user/adapter")[CARD].decode()).data
    assert (data.license, data["license_name"], data.get("license_link")) == ("other", "some-1", None)
    assert not push_folder(adapter, "user/adapter")[1]
    push_folder(adapter, "user/adapter", license="mit")
    data = ModelCard(hub.files("user/adapter")[CARD].decode()).data
    assert data.license == "mit"
    tuned(base="user/none").push_to_hub("user/other")
    assert ModelCard(hub.files("user/other")[CARD].decode()).data.license is None


def test_a_card_the_hub_refuses_stops_the_push_before_anything_is_sent(adapter, hub):
    with pytest.raises(PushError, match='"license" must be a lower-case name'):
        push_folder(adapter, "user/adapter", license="All Mine")
    assert hub.counted("PUT") == 0 and hub.commits("user/adapter") == []


def test_a_dry_run_lists_what_would_go_and_touches_nothing(adapter, hub, capsys):
    before = hashes(adapter)
    assert main(["push", str(adapter), "user/adapter", "--dry_run"]) == 0
    listed = dict(re.findall(r"^ +([\d,]+)  (\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert hashes(adapter) == before and hub.requests == []
    push_folder(adapter, "user/adapter")
    sizes = {name: f"{len(content):,}" for name, content in hub.files("user/adapter").items()}
    assert {name: size for size, name in listed.items()} == sizes
    assert main(["push", str(adapter), "user/adapter/main", "--dry_run"]) == 1
    assert "'user/adapter/main'" in capsys.readouterr().err


def test_private_is_never_public(adapter, hub):
    hub.create("user/public")
    with pytest.raises(PushError, match="private must be left out .* user/public is public"):
        push_folder(adapter, "user/public", private=True)
    assert hub.commits("user/public") == []
    push_folder(adapter, "user/secret", private=True)
    push_folder(adapter, "user/secret")
    assert hub.repos["user/secret"].private


def test_a_revision_is_a_branch_of_its_own(adapter, hub):
    push_folder(adapter, "user/adapter")
    with open(adapter / CARD, "a") as file:
        file.write("second\n")
    push_folder(adapter, "user/adapter", revision="v2")
    assert not push_folder(adapter, "user/adapter", revision="v2")[1]
    assert b"second" in hub.files("user/adapter", "v2")[CARD]
    assert b"second" not in hub.files("user/adapter", "main")[CARD]


def test_a_damaged_adapter_is_not_pushed(adapter, hub, capsys):
    (adapter / ADAPTER_WEIGHTS).write_bytes((adapter / ADAPTER_WEIGHTS).read_bytes()[:-1])
    assert main(["push", str(adapter), "user/adapter"]) == 1
    assert f"{ADAPTER_WEIGHTS} is damaged" in capsys.readouterr().err
    (adapter / ADAPTER_WEIGHTS).unlink()
    assert main(["push", str(adapter), "user/adapter", "--dry_run"]) == 1
    assert f"must have {ADAPTER_WEIGHTS}" in capsys.readouterr().err
    assert hub.requests == []


def test_folders_and_tokens_of_this_machine_stay_here(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    place = tmp_path / "alice" / "base"
    make_model().save_pretrained(place)
    folder = tmp_path / "adapter"
    model = tuned(base=str(place))
    model.save_pretrained(folder)
    write_json(folder / "analysis.json", {"base_model": str(place), "note": "hf_AbCdEfGhIjKlMnOp"})
    before = (folder / ADAPTER_CONFIG).read_bytes()
    push_folder(folder, "user/adapter")
    for name, content in hub.files("user/adapter").items():
        assert b"alice" not in content and b"hf_Ab" not in content and TOKEN.encode() not in content, name
    assert (folder / ADAPTER_CONFIG).read_bytes() == before  # here it is still found
    again = PriorPeftModel.from_pretrained(make_model(), "user/adapter")
    assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
    assert not push_folder(folder, "user/adapter")[1]


# Loading what was pushed


def test_what_is_pushed_loads_by_its_id_and_offline_afterwards(tmp_path, hub, monkeypatch):
    first, second = tuned(seed=1), tuned(seed=2, tuning="deep")
    second.save_pretrained(tmp_path / "second")
    first.save_pretrained(tmp_path / "first")
    push_folder(tmp_path / "second", "user/adapter", private=True)
    push_folder(tmp_path / "first", "user/adapter", revision="v1")

    def load(**where):
        return PriorPeftModel.from_pretrained(make_model(), "user/adapter", **where)

    for _ in range(2):
        for revision, model in (("v1", first), ("main", second)):
            again = load(revision=revision)
            assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    trainable = load(is_trainable=True)
    assert trainable.prompt_encoder["default"].coordinate.requires_grad
    with pytest.raises(FileNotFoundError, match="user/other"):
        PriorPeftModel.from_pretrained(make_model(), "user/other")


def test_a_stock_adapter_that_was_downloaded_whole_loads_offline(adapter, hub, monkeypatch):
    hub.create("user/stock", private=True)
    files = {name: (adapter / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    hub.commit("user/stock", "main", "stock", files | {f"inner/{name}": of for name, of in files.items()})
    hub.create("user/ours")
    hub.commit("user/ours", "main", "ours", {path.name: path.read_bytes() for path in adapter.iterdir()})
    monkeypatch.delenv("HF_TOKEN")
    huggingface_hub.snapshot_download("user/stock", token=TOKEN)  # what `hf download` does
    for name in files:
        hf_hub_download("user/ours", name)  # what stock PEFT does
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    expected = tuned().eval()(input_ids=ids()).logits
    for where in ({}, {"subfolder": "inner"}):
        model = PriorPeftModel.from_pretrained(make_model(), "user/stock", **where)
        assert torch.allclose(model(input_ids=ids()).logits, expected, atol=1e-6)
    assert read_task("user/stock") is None
    with pytest.raises(FileNotFoundError, match=f"can't be reached for {PRIOR_CONFIG}"):
        PriorPeftModel.from_pretrained(make_model(), "user/ours")


def test_a_token_that_is_passed_opens_what_is_private(adapter, tmp_path, hub, monkeypatch):
    push_folder(adapter, "user/adapter", private=True, revision="v1")
    hub.create("user/base", private=True)
    base = Path(save_base(tmp_path / "base"))
    hub.commit("user/base", "main", "base", {path.name: path.read_bytes() for path in base.iterdir()})
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="user/adapter"):
        PriorPeftModel.from_pretrained(make_model(), "user/adapter", revision="v1")
    assert PriorPeftModel.from_pretrained(make_model(), "user/adapter", revision="v1", token=TOKEN)
    generator = priors_peft.pipeline("text-generation", "user/adapter", revision="v1", token=TOKEN)
    assert generator.model.base_model.name_or_path == "user/base" and generator("3 plus", max_new_tokens=2)


def test_several_prompts_are_pushed_together_and_loaded_by_subfolder(tmp_path, hub):
    model = tuned(seed=1)
    model.add_adapter("other", PriorConfig(num_virtual_tokens=3, seed=2))
    model.save_pretrained(tmp_path / "both")
    push_folder(tmp_path / "both", "user/both")
    own = {f"other/{name}" for name in CORE - {CARD}}
    assert set(hub.files("user/both")) == CORE | own
    again = PriorPeftModel.from_pretrained(make_model(), "user/both", subfolder="other")
    model.set_adapter("other")
    assert torch.equal(again(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits)


def test_an_empirical_prior_is_fitted_on_prompts_on_the_hub(tmp_path, hub):
    for seed in range(3):
        tuned(seed=seed, inference="map").save_pretrained(tmp_path / f"{seed}")
        push_folder(tmp_path / f"{seed}", f"user/p{seed}")
    names = [f"user/p{seed}" for seed in range(3)]
    config = PriorConfig(
        num_virtual_tokens=4, prior="empirical", reference="adapters", reference_kwargs={"adapters": names}
    )
    model = get_prior_model(make_model(), config)
    prompts = torch.stack([tuned(seed=seed, inference="map").prompt_encoder["default"]()[0] for seed in range(3)])
    assert torch.allclose(model.prompt_encoder["default"].priors[0].loc, prompts.mean(0), atol=1e-5)


STOCK = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("user/base", attn_implementation="eager")
model = PeftModel.from_pretrained(base, "user/adapter", revision="v1")
auto = AutoPeftModelForCausalLM.from_pretrained("user/adapter", revision="v1", attn_implementation="eager")
ids = torch.tensor([[3, 4, 5]])
assert torch.equal(model(input_ids=ids).logits, auto(input_ids=ids).logits)
print(model(input_ids=ids).logits[0, -1, :4].tolist())
assert not any(name.startswith("priors_peft") for name in sys.modules)
"""


@pytest.mark.slow
def test_stock_peft_loads_it_from_the_hub_where_this_package_is_not_imported(adapter, tmp_path, hub):
    make_model().save_pretrained(tmp_path / "base")
    hub.create("user/base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.commit("user/base", "main", "base", files)
    hub.commit("user/base", "v1", "base", files)
    push_folder(adapter, "user/adapter", revision="v1")
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | hub.environment(HF_HOME=str(tmp_path / "home"))
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", STOCK],
            capture_output=True,
            text=True,
            env=environment | {"HF_HUB_OFFLINE": offline},
        )
        assert done.returncode == 0, done.stderr
        ours = tuned().eval()(input_ids=ids()).logits[0, -1, :4]
        assert torch.allclose(torch.tensor(json.loads(done.stdout)), ours, atol=1e-5)


# The trainer


def test_the_trainer_pushes_its_adapter_with_its_own_card_once(tmp_path, hub):
    trainer = make_trainer(tmp_path / "sums", save_strategy="no")
    trainer.train()
    trainer.evaluate()
    done = trainer.push_to_hub(license="mit", private=True)
    assert done.oid == hub.repos["user/sums"].at("main").oid and hub.repos["user/sums"].private
    files = hub.files("user/sums")
    assert set(files) == CORE | {TRAINING, "snapshots.safetensors", "reliability.png"}
    card = ModelCard(files[CARD].decode())
    assert card.data.license == "mit" and card.data.base_model == "user/base" and card.data.eval_results
    assert '"user/sums"' in card.text and "More Information" not in card.text
    trainer.push_to_hub()
    assert hub.commits("user/sums") == ["End of training"]
    assert PriorPeftModel.from_pretrained(make_model(), "user/sums").active_peft_config.num_virtual_tokens == 4


def test_a_push_in_the_background_gives_a_future(tmp_path, hub):
    trainer = make_trainer(tmp_path / "sums", save_strategy="no", hub_model_id="user/named", hub_revision="dev")
    trainer.train()
    assert trainer.push_to_hub(blocking=False, commit_message="now").result().oid
    assert hub.commits("user/named", "dev") == ["now"]


@pytest.mark.parametrize(
    "strategy, folders",
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_every_strategy_pushes_whole_adapters_and_no_pickled_arguments(strategy, folders, tmp_path, hub):
    trainer = make_trainer(
        tmp_path / "sums", push_to_hub=True, hub_strategy=strategy, save_total_limit=1, hub_always_push=True
    )
    trainer.train()
    progress = ["Training in progress, step 2", "Training in progress, step 4"]
    assert hub.commits("user/sums") == ([] if strategy == "end" else progress)
    trainer.push_to_hub()
    assert hub.commits("user/sums")[-1] == "End of training"
    files = hub.files("user/sums")
    assert {path for path in files if "/" not in path} == CORE | {TRAINING, "snapshots.safetensors"}
    assert {path.split("/")[0] for path in files if "/" in path} == folders
    for folder in folders:
        assert {f"{folder}/{name}" for name in (*CORE - {CARD}, "trainer_state.json", "optimizer.pt")} <= set(files)
    assert not any(path.endswith("training_args.bin") or "tokenizer" in path for path in files)
    assert str(tmp_path).encode() not in b"".join(files.values())
    assert not list((tmp_path / "sums").glob(".push-*"))
    if strategy == "every_save":
        step_2 = hub.repos["user/sums"].branches["main"][1]
        assert json.loads(step_2.files[TRAINING])["steps"] == 2
        assert hashlib.sha256(step_2.files[PRIOR_WEIGHTS]).hexdigest() in step_2.files[PRIOR_CONFIG].decode()


def test_training_goes_on_from_a_checkpoint_on_the_hub(tmp_path, hub):
    settings = {"hub_model_id": "user/sums", "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    first = make_trainer(tmp_path / "a", push_to_hub=True, hub_strategy="checkpoint", **settings)
    first.train()
    folder = Path(huggingface_hub.snapshot_download("user/sums", local_dir=tmp_path / "fetched"))
    state = json.loads((folder / "last-checkpoint" / "trainer_state.json").read_text())
    assert re.fullmatch(r"checkpoint-\d", state["best_model_checkpoint"])
    second = make_trainer(tmp_path / "b", max_steps=6)
    second.train(resume_from_checkpoint=str(folder / "last-checkpoint"))
    assert second.state.global_step == 6


def test_a_first_push_that_is_refused_leaves_the_prompt_and_a_command_that_pushes_it(tmp_path, hub):
    trainer = make_trainer(tmp_path / "sums", save_strategy="no", max_steps=1)
    trainer.train()
    hub.fail("repos/create", 401)
    with pytest.raises(PushError, match="hf auth login") as error:
        trainer.push_to_hub(private=True, license="mit")
    hub.faults.clear()
    assert main(shlex.split(str(error.value).partition("to try again: ")[2])[1:]) == 0
    assert hub.repos["user/sums"].private and b"license: mit" in hub.files("user/sums")[CARD]


def test_a_hub_that_refuses_is_found_out_before_anything_is_trained(tmp_path, hub):
    hub.fail("repos/create", 401)
    with pytest.raises(PushError, match="hf auth login"):
        make_trainer(tmp_path / "sums", push_to_hub=True)


def test_a_failed_push_in_training_is_a_warning_and_training_goes_on(tmp_path, hub, caplog):
    trainer = make_trainer(tmp_path / "sums", push_to_hub=True, hub_strategy="every_save", hub_always_push=True)
    hub.fail("/commit/", 500)
    with caplog.at_level(logging.WARNING, "priors_peft"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "Training goes on: " in caplog.text and "to try again: priors-peft push" in caplog.text
    with pytest.raises(PushError, match="the Hub answered 500") as error:
        trainer.push_to_hub()
    assert not list((tmp_path / "sums").glob(".push-*"))
    hub.faults.clear()
    assert main(shlex.split(str(error.value).partition("to try again: ")[2])[1:]) == 0
    pushed = PriorPeftModel.from_pretrained(make_model(), "user/sums").prompt_encoder["default"].coordinate
    assert torch.equal(pushed, trainer.model.prompt_encoder["default"].coordinate)


def test_the_train_command_pushes_once_with_its_results(tmp_path, hub):
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    rows.write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    flags = [
        "--model",
        str(base),
        "--train_file",
        str(rows),
        "--num_eval",
        "8",
        "--output_dir",
        str(tmp_path / "sums"),
    ]
    flags += ["--max_steps", "2", "--use_cpu", "--num_virtual_tokens", "4", "--disable_tqdm", "true"]
    assert main(["train", *flags, "--push_to_hub", "--hub_strategy", "end"]) == 0
    assert len(hub.commits("user/sums")) == 1
    files = hub.files("user/sums")
    assert "task.json" in files and ModelCard(files[CARD].decode()).data.eval_results
    assert str(tmp_path).encode() not in b"".join(files.values())


# What the documentation says

DOCS = "".join((Path(__file__).parents[2] / name).read_text(encoding="utf-8") for name in ("README.md", "docs/hub.md"))


@pytest.mark.parametrize("line", re.findall(r"^priors-peft (?:push|card) .*$", DOCS, re.MULTILINE))
def test_commands_in_the_documentation_are_the_commands(line, tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned().save_pretrained("outputs/mine")
    assert main(shlex.split(line, comments=True)[1:]) == 0


def test_python_in_the_documentation_runs(adapter, tmp_path, hub):
    push_folder(adapter, "user/mine", revision="v2")
    push_folder(adapter, "user/mine")
    for name, seed in (("a", 1), ("b", 2)):
        tuned(seed=seed).push_to_hub(f"user/{name}")
    names = {"trainer": make_trainer(tmp_path / "mine"), "base": make_model(), "PriorConfig": PriorConfig}
    names |= {"PeftModel": PeftModel, "PriorPeftModel": PriorPeftModel}
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/hub.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and type(names["model"]) is not PriorPeftModel
    assert len(get_prior_model(make_model(), names["config"]).prompt_encoder) == 1


# The Hub itself


def test_the_loopback_hub_is_a_hub_to_the_client(hub, tmp_path):
    api = HfApi()
    repo = api.create_repo("thing", private=True)
    assert repo.repo_id == "user/thing" and api.repo_info("user/thing").private
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="409"):
        api.create_repo("user/thing")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.safetensors").write_bytes(b"weights")
    (tmp_path / "a" / "y.txt").write_text("text")
    api.upload_folder(repo_id="user/thing", folder_path=tmp_path / "a")
    assert sorted(api.list_repo_files("user/thing")) == [".gitattributes", "x.safetensors", "y.txt"]
    sizes = {entry.path: entry.size for entry in api.list_repo_tree("user/thing")}
    assert sizes["x.safetensors"] == 7
    api.upload_file(path_or_fileobj=b"z", path_in_repo="inner/z.txt", repo_id="user/thing")
    assert [entry.path for entry in api.list_repo_tree("user/thing", "inner")] == ["inner/z.txt"]
    assert {entry.path for entry in api.list_repo_tree("user/thing")} >= {"inner", "y.txt"}
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        list(api.list_repo_tree("user/thing", "none"))
    assert Path(hf_hub_download("user/thing", "x.safetensors")).read_bytes() == b"weights"
    api.delete_file("y.txt", "user/thing")
    assert not api.file_exists("user/thing", "y.txt") and api.file_exists("user/thing", "x.safetensors")
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        api.repo_info("user/thing", revision="none")
    for token in ("hf_wrong", False):
        with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
            HfApi(token=token).repo_info("user/thing")
