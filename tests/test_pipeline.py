"""A pipeline from an adapter's name: the base model is found from it, and what is missing is said plainly."""

import json
import os
import shutil
import time

import pytest
import torch
from conftest import make_model, make_tokenizer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, TextGenerationPipeline

import priors_peft
from priors_peft import PriorConfig, get_prior_model
from priors_peft.hub.reading import is_local


TEXT = "Question: what is 3 plus 4 ? Answer:"


@pytest.fixture
def case(tmp_path):
    """`base` and an `adapter` that names it."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_prior_model(base, PriorConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "adapter")
    return tmp_path


def rename_base(case, name, revision=None):
    for file in ("adapter_config.json", "prior_config.json"):
        path = case / "adapter" / file
        described = json.loads(path.read_text())
        (described.get("config") or described).update(base_model_name_or_path=name, revision=revision)
        path.write_text(json.dumps(described))


def cached(cache, name, folder, revision="main"):
    """Put a folder into a Hub cache as a download would have."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text("a" * 40)


@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_the_base_model_is_found_from_the_adapter(case, tuning):
    base = AutoModelForCausalLM.from_pretrained(case / "base")
    model = get_prior_model(base, PriorConfig(num_virtual_tokens=4, tuning=tuning, seed=3)).eval()
    model.save_pretrained(case / "adapter")
    generator = priors_peft.pipeline("text-generation", str(case / "adapter"))
    assert isinstance(generator, TextGenerationPipeline)
    ids = torch.tensor([make_tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        text = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = make_tokenizer().decode(text[0, ids.shape[1] :], skip_special_tokens=True)
    said = generator(TEXT, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert said.split() == expected.split() and expected
    batch = generator([TEXT, "3 plus"], max_new_tokens=6, do_sample=False, batch_size=2, return_full_text=False)
    assert batch[0][0]["generated_text"] == said


def test_what_is_asked_of_the_pipeline_reaches_it(case):
    generator = priors_peft.pipeline(
        "text-generation", case / "adapter", dtype="bfloat16", device="cpu", max_new_tokens=2, batch_size=3
    )
    assert generator.model.base_model.dtype == torch.bfloat16 and generator._batch_size == 3
    assert len(generator.tokenizer(generator(TEXT)[0]["generated_text"])["input_ids"]) <= 10


def test_another_base_model_can_be_passed(case):
    rename_base(case, None)
    with pytest.raises(ValueError, match="base_model must be given .* names no base_model_name_or_path"):
        priors_peft.pipeline("text-generation", case / "adapter")
    assert priors_peft.pipeline("text-generation", case / "adapter", base_model=str(case / "base"))


def test_a_missing_base_model_is_named_with_the_adapter_that_names_it(case):
    rename_base(case, "user/none")
    with pytest.raises(
        OSError, match="(?s)'user/none' can't be loaded.*hf download user/none.* names this base model"
    ):
        priors_peft.pipeline("text-generation", case / "adapter")
    rename_base(case, "/nowhere/base")
    with pytest.raises(FileNotFoundError, match="got '/nowhere/base', which is neither. .* names this base model"):
        priors_peft.pipeline("text-generation", case / "adapter")


def test_only_text_generation(case):
    with pytest.raises(ValueError, match="task must be \"text-generation\".* got 'summarization'"):
        priors_peft.pipeline("summarization", case / "adapter")


def test_everything_comes_from_the_cache_when_offline(case, monkeypatch):
    cached(case / "cache", "user/base", case / "base", "v1")
    rename_base(case, "user/base", "v1")
    shutil.copytree(case / "adapter", case / "repository" / "seed0")
    cached(case / "cache", "user/adapter", case / "repository")
    monkeypatch.chdir(case)
    generator = priors_peft.pipeline(
        "text-generation", "user/adapter", subfolder="seed0", cache_dir=str(case / "cache"), max_new_tokens=2
    )
    assert generator.model.base_model.name_or_path == "user/base"
    assert generator(TEXT)[0]["generated_text"].startswith(TEXT)
    with pytest.raises(FileNotFoundError, match="neither here nor in the cache"):
        priors_peft.pipeline("text-generation", "user/other", cache_dir=str(case / "cache"))


@pytest.mark.parametrize(
    "name", ["/nowhere/adapter", "./adaptr", "../adaptr", "~/none/adaptr", "a/b/c", "runs/adaptr", "x"]
)
def test_a_mistyped_folder_fails_at_once(name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # With a network that does not answer, the client would retry for half a minute.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="there is no such folder") as error:
        priors_peft.pipeline("text-generation", name)
    assert time.perf_counter() - start < 15
    if name == "runs/adaptr":
        assert f"did you mean {os.path.join('runs', 'adapter')!r}?" in str(error.value)


def test_hub_ids_are_not_taken_for_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local("user/adapter") and is_local(tmp_path / "adapter")
