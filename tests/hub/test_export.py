"""Every export gives the tuned model in the tool that it is for, in a process that knows nothing of priors_peft."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, addition_rows, make_model, make_tokenizer
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from priors_peft import PriorConfig, PriorPeftModel, get_prior_model
from priors_peft.cli import main
from priors_peft.hub.export import FORMATS, export_adapter


pytestmark = pytest.mark.slow


COUNT = 4
TEXT = "Question: what is 3 plus 4 ? Answer:"
CHAT = [{"role": "user", "content": "what is 5 plus 6"}]
TEMPLATE = "{{ bos_token }} {% for message in messages %}{{ message['content'] }} {% endfor %}Answer:"

# As if some packages were not installed.
BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
for name in {blocked!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + " can be imported")
"""
RUN_CHECKPOINTS = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from safetensors.torch import save_file
text, chat, *cases = sys.argv[1:]
for case in cases:
    tokenizer = AutoTokenizer.from_pretrained(case)
    model = AutoModelForCausalLM.from_pretrained(case, attn_implementation="eager")
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    sampled = model.generate(
        **inputs, max_new_tokens=100, do_sample=True, temperature=50.0, top_k=0, eos_token_id=None, pad_token_id=0
    )
    generator = pipeline("text-generation", model=case)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    said = generator(text, **options)[0]["generated_text"]
    answered = generator(json.loads(chat), **options)[0]["generated_text"]
    start = inputs["input_ids"].shape[1]
    save_file(
        {"logits": logits, "generated": generated[:, start:].contiguous(), "sampled": sampled[:, start:].contiguous()},
        case + "/outputs.safetensors",
    )
    with open(case + "/outputs.json", "w") as file:
        json.dump({"text": said, "chat": answered}, file)
assert not {"peft", "priors_peft"} & set(sys.modules)
"""
RUN_ADAPTERS = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
from safetensors.torch import load_file, save_file
inputs = load_file(sys.argv[1])
for case in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(case + "/base", attn_implementation="eager")
    for name in ("peft", "prefix"):
        model = PeftModel.from_pretrained(base, case + "/" + name)
        with torch.no_grad():
            logits = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        save_file({"logits": logits.contiguous(), "text": text.contiguous()}, case + "/" + name + ".safetensors")
"""


def run(code: str, *arguments: str, blocked: tuple[str, ...]) -> None:
    """Run code in a process of its own in which some packages can't be imported."""
    code = BLOCK.format(blocked=blocked) + code
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def save_base(folder: Path, architecture: str = "llama", tied: bool | None = None, template: bool = True, **saving):
    """A tiny base model in a folder; its embeddings have padding rows past the tokenizer's 90 entries."""
    model = make_model(architecture)
    if tied is not None and tied != model.config.tie_word_embeddings:
        config = model.config.__class__.from_dict(model.config.to_dict() | {"tie_word_embeddings": tied})
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder, **saving)
    tokenizer = make_tokenizer()
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return model


def save_adapter(folder: Path, base: Path, count: int = COUNT, **settings) -> PriorPeftModel:
    """A prompt as training could have left it, beside its model in memory."""
    base_model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_prior_model(base_model, PriorConfig(num_virtual_tokens=count, **settings))
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.coordinate.add_(torch.randn(encoder.coordinate.shape, generator=torch.Generator().manual_seed(5)))
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def answer(model: PriorPeftModel, tokenizer, ids: list[int], new_tokens: int = 8) -> list[int]:
    """Greedy tokens after `ids` by the model that was trained; none of its rows that are no token's."""
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    unused = list(range(len(tokenizer), model.config.vocab_size)) or None
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": unused}
    text = model.generate(**inputs, max_new_tokens=new_tokens, **options)
    return text[0, len(ids) :].tolist()


# Stock adapters


@pytest.mark.slow
def test_peft_and_prefix_give_the_same_model_in_stock_peft(tmp_path):
    generator = torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(3, 90, (2, 7), generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    save_file(inputs, tmp_path / "inputs.safetensors")
    models = {}
    shapes = {"soft": {}, "deep": {"tuning": "deep"}}
    for architecture, shape in itertools.product(CONFIGS, shapes):
        case = tmp_path / f"{architecture}_{shape}"
        save_base(case / "base", architecture)
        models[case] = save_adapter(case / "adapter", case / "base", **shapes[shape])
        for to in ("peft", "prefix"):
            export_adapter(case / "adapter", to, case / to)
            assert sorted(os.listdir(case / to)) == ["adapter_config.json", "adapter_model.safetensors"]
        assert json.loads((case / "prefix" / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    run(RUN_ADAPTERS, str(tmp_path / "inputs.safetensors"), *map(str, models), blocked=("priors_peft",))
    for case, model in models.items():
        with torch.no_grad():
            logits = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        for to in ("peft", "prefix"):
            theirs = load_file(case / f"{to}.safetensors")
            scale = logits.abs().max()
            assert (theirs["logits"][:, -7:] - logits).abs().max() < 1e-5 * scale, (case.name, to)
            assert torch.equal(theirs["text"], text), (case.name, to)


# Plain checkpoints


@pytest.mark.slow
def test_checkpoints_give_the_tuned_text_where_peft_cannot_be_imported(tmp_path):
    cases = {}
    for architecture, tied in itertools.product(CONFIGS, (True, False)):
        case = tmp_path / f"{architecture}_{'tied' if tied else 'untied'}"
        save_base(case / "base", architecture, tied)
        cases[case] = save_adapter(case / "adapter", case / "base")
        export_adapter(case / "adapter", "checkpoint", case / "out")
    outs = [str(case / "out") for case in cases]
    run(RUN_CHECKPOINTS, TEXT, json.dumps(CHAT), *outs, blocked=("peft", "priors_peft"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer(TEXT)["input_ids"]
    chat_ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    moved = 0
    for case, model in cases.items():
        theirs = load_file(case / "out" / "outputs.safetensors")
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits
        entries = len(tokenizer)
        ours, their_logits = logits[..., :entries], theirs["logits"][:, COUNT:, :entries]
        assert (their_logits - ours).abs().max() < 1e-5 * ours.abs().max(), case.name
        greedy = answer(model, tokenizer, ids)
        assert theirs["generated"][0].tolist() == greedy, case.name
        with model.disable_adapter():
            moved += greedy != answer(model, tokenizer, ids)
        # At a temperature at which all tokens are about as likely, 100 of them hold no virtual one.
        assert not set(range(entries, entries + COUNT)) & set(theirs["sampled"][0].tolist()), case.name
        said = json.loads((case / "out" / "outputs.json").read_text())
        stop = greedy.index(2) if 2 in greedy else None
        assert said["text"].split() == tokenizer.decode(greedy[:stop], skip_special_tokens=True).split(), case.name
        chat_greedy = answer(model, tokenizer, chat_ids)
        stop = chat_greedy.index(2) if 2 in chat_greedy else None
        expected = tokenizer.decode(chat_greedy[:stop], skip_special_tokens=True)
        assert said["chat"].split() == expected.split(), case.name
    assert moved > len(cases) / 2  # where the prompt changes nothing, nothing is shown


@pytest.fixture
def case(tmp_path) -> Path:
    """A base model and an adapter for it."""
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    return tmp_path


def test_virtual_tokens_come_first_and_are_hidden_in_decoded_text(case):
    export_adapter(case / "adapter", "checkpoint", case / "out")
    old, new = (AutoTokenizer.from_pretrained(case / name) for name in ("base", "out"))
    ids = list(range(len(old), len(old) + COUNT))
    for text in ("", TEXT, " 3  4"):
        assert new(text)["input_ids"] == ids + old(text)["input_ids"]
        assert new(text, add_special_tokens=False)["input_ids"] == old(text, add_special_tokens=False)["input_ids"]
        assert new.decode(new(text)["input_ids"], skip_special_tokens=True) == old.decode(old(text)["input_ids"])
    batch = new([TEXT, "3"], padding=True, padding_side="left")["input_ids"]
    assert batch[1] == [0] * (len(batch[0]) - COUNT - 1) + ids + old("3")["input_ids"]
    first = new.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert first == ids + old.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]


def with_processor(processor):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def processors():
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    bos = TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    return {
        "byte level": ByteLevel(trim_offsets=False),
        "template": bos,
        "both": Sequence([ByteLevel(trim_offsets=False), bos]),
        "sequence": Sequence([ByteLevel(trim_offsets=False)]),
    }


@pytest.mark.parametrize("kind", processors())
def test_the_prompt_comes_before_what_the_tokenizer_adds_itself(kind, case):
    tokenizer = with_processor(processors()[kind])
    tokenizer.save_pretrained(case / "base")
    bos = [1] if kind in ("template", "both") else []
    base = AutoTokenizer.from_pretrained(case / "base")
    assert base("3 4")["input_ids"] == bos + base("3 4", add_special_tokens=False)["input_ids"]
    export_adapter(case / "adapter", "checkpoint", case / "out")
    new = AutoTokenizer.from_pretrained(case / "out")
    ids = list(range(len(base), len(base) + COUNT))
    assert new("3 4")["input_ids"] == ids + base("3 4")["input_ids"]
    assert new("3", "4")["input_ids"] == ids + base("3", "4")["input_ids"]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_prompt_and_ordinary_rows_stay(tied, tmp_path):
    base = save_base(tmp_path / "base", tied=tied)
    model = save_adapter(tmp_path / "adapter", tmp_path / "base", count=10)
    export_adapter(tmp_path / "adapter", "checkpoint", tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # 90 entries, 96 rows: six of the ten virtual tokens take rows that no token had.
    assert out.config.vocab_size == 100 and out.generation_config.suppress_tokens == list(range(90, 100))
    rows, head = out.get_input_embeddings().weight, out.get_output_embeddings().weight
    assert torch.equal(rows[90:], model.prompt("default").theta[0])
    assert torch.equal(rows[:90], base.get_input_embeddings().weight[:90])
    assert torch.equal(head[:90], base.get_output_embeddings().weight[:90])
    # So that the logit of a virtual token is the mean of the others', which is never the largest.
    assert torch.allclose(head[90:], head[:90].mean(0).expand(10, -1))
    assert not out.config.tie_word_embeddings and base.config.tie_word_embeddings == tied


@pytest.mark.parametrize("tied", [True, False])
def test_no_tool_chooses_a_virtual_token_or_gives_it_a_likelihood(tied, architecture, tmp_path):
    save_base(tmp_path / "base", architecture, tied)
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    export_adapter(tmp_path / "adapter", "checkpoint", tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 90, (4, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = out(torch.cat([torch.arange(90, 94).expand(4, -1), ids], dim=1)).logits
    assert logits[..., :90].max(-1).values.gt(logits[..., 90:94].max(-1).values).all()
    assert logits[..., :94].softmax(-1)[..., 90:].max() < 1 / 90


def test_scaled_embeddings_are_divided_by_their_scale(tmp_path):
    save_base(tmp_path / "base", "gemma2")
    model = save_adapter(tmp_path / "adapter", tmp_path / "base")
    export_adapter(tmp_path / "adapter", "checkpoint", tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theta = model.prompt("default").theta[0]
    assert torch.allclose(out.get_input_embeddings()(torch.arange(90, 94)), theta, rtol=1e-6)
    assert torch.allclose(out.get_input_embeddings().weight[90:94] * out.config.hidden_size**0.5, theta, rtol=1e-6)


def test_a_heads_bias_makes_virtual_tokens_impossible(tmp_path):
    from transformers import PhiConfig

    config = PhiConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=90, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = save_adapter(tmp_path / "adapter", tmp_path / "base")
    export_adapter(tmp_path / "adapter", "checkpoint", tmp_path / "out")
    out, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = out(torch.cat([torch.arange(90, 94)[None], ids], dim=1)).logits[:, 4:]
        assert torch.allclose(logits[..., :90], model(ids).logits, atol=1e-5)
    assert logits.softmax(-1)[..., 90:].max() == 0


def test_shards_without_embeddings_are_copied_and_the_index_kept(tmp_path):
    save_base(tmp_path / "base", tied=False, max_shard_size="20KB")
    save_adapter(tmp_path / "adapter", tmp_path / "base", count=9)
    export_adapter(tmp_path / "adapter", "checkpoint", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    same = [s for s in shards if (tmp_path / "out" / s).read_bytes() == (tmp_path / "base" / s).read_bytes()]
    assert len(shards) > 3 and len(shards) - 2 <= len(same) < len(shards)
    sizes = 0
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, framework="pt") as file:
            sizes += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == sizes
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 99


def test_the_base_model_is_not_built(case, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    export_adapter(case / "adapter", "checkpoint", case / "out")


def test_a_base_model_without_safetensors_is_converted(case):
    weights = load_file(case / "base" / "model.safetensors")
    torch.save(weights, case / "base" / "pytorch_model.bin")
    (case / "base" / "model.safetensors").unlink()
    export_adapter(case / "adapter", "checkpoint", case / "out")
    again = load_file(case / "out" / "model.safetensors")
    assert torch.equal(again["model.norm.weight"], weights["model.norm.weight"])
    assert not [path for path in (case / "out").iterdir() if path.is_dir()]


def test_without_transformers_private_names_tensors_are_found_by_the_models_own(tmp_path, monkeypatch):
    monkeypatch.delattr("transformers.core_model_loading.revert_weight_conversion")
    for architecture, tied in (("llama", True), ("gpt2", False), ("neox", False)):
        case = tmp_path / architecture
        save_base(case / "base", architecture, tied)
        save_adapter(case / "adapter", case / "base")
        if architecture == "neox":  # its files call the head embed_out
            with pytest.raises(ValueError, match="must keep lm_head.weight in its safetensors"):
                export_adapter(case / "adapter", "checkpoint", case / "out")
        else:
            export_adapter(case / "adapter", "checkpoint", case / "out")
            assert AutoModelForCausalLM.from_pretrained(case / "out").generation_config.suppress_tokens


def test_what_the_base_suppresses_stays_suppressed(case):
    path = case / "base" / "generation_config.json"
    # A temperature without sampling: published files have it, and today's GenerationConfig would not save it.
    path.write_text(json.dumps({"suppress_tokens": [7], "temperature": 0.6, "do_sample": False, "eos_token_id": 2}))
    export_adapter(case / "adapter", "checkpoint", case / "out")
    written = json.loads((case / "out" / "generation_config.json").read_text())
    assert written == {
        "suppress_tokens": [7, *range(90, 94)], "temperature": 0.6, "do_sample": False, "eos_token_id": 2
    }  # fmt: skip


def test_a_checkpoint_names_no_path_of_this_machine(case):
    export_adapter(case / "adapter", "checkpoint", case / "out")
    for path in (case / "out").glob("*.json"):
        assert str(case) not in path.read_text(), path.name


def test_a_slow_tokenizer_is_refused(case, monkeypatch):
    from transformers import PythonBackend

    class Slow(PythonBackend):
        is_fast = False

        def __init__(self):
            self.chat_template = None

        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Slow())
    with pytest.raises(
        ValueError, match="must be a fast one, with a tokenizer.json, got Slow: export to peft, prefix"
    ):
        export_adapter(case / "adapter", "checkpoint", case / "out")
    assert not (case / "out").exists()


def test_a_template_that_undoes_the_prompt_is_refused(case):
    tokenizer = AutoTokenizer.from_pretrained(case / "base")
    from tokenizers.processors import BertProcessing

    tokenizer.backend_tokenizer.post_processor = BertProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.save_pretrained(case / "base")
    with pytest.raises(ValueError, match="post-processor must be a template or none, got BertProcessing"):
        export_adapter(case / "adapter", "checkpoint", case / "out")


# Embeddings for vLLM


def test_prompt_embeds_are_the_prompt(case):
    out = export_adapter(case / "adapter", "prompt-embeds", case / "prompt.safetensors")
    model = PriorPeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case / "base"), case / "adapter")
    prompt = load_file(out)["prompt_embeds"]
    assert torch.equal(prompt, model.prompt("default").theta[0])
    # As vLLM uses them: the model's own embeddings of the text after them.
    ids = torch.tensor([[3, 4, 5]])
    embeddings = torch.cat([prompt, model.base_model.get_input_embeddings()(ids)[0]])[None]
    with torch.no_grad():
        logits = model.base_model(inputs_embeds=embeddings).logits[:, COUNT:]
        assert torch.allclose(logits, model(ids).logits, atol=1e-4)
    with pytest.raises(FileExistsError, match="out must not exist"):
        export_adapter(case / "adapter", "prompt-embeds", out)
    with pytest.raises(ValueError, match="ends in .safetensors for prompt-embeds"):
        export_adapter(case / "adapter", "prompt-embeds", case / "prompt")


# What can't be done


@pytest.mark.parametrize("to", [name for name, deep in FORMATS.items() if not deep])
def test_deep_prompts_are_told_where_they_can_go(to, tmp_path):
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", tuning="deep")
    with pytest.raises(ValueError, match=f"to must be peft or prefix for a deep prompt, got '{to}'"):
        export_adapter(tmp_path / "adapter", to, tmp_path / "out.safetensors")


def test_an_unknown_format_and_a_taken_folder_are_refused(case):
    with pytest.raises(ValueError, match="to must be one of peft, prefix, checkpoint, prompt-embeds, got 'gguf'"):
        export_adapter(case / "adapter", "gguf", case / "out")
    for to in ("peft", "prefix", "checkpoint"):
        with pytest.raises(FileExistsError, match="out must not exist or be an empty folder"):
            export_adapter(case / "adapter", to, case / "base")
    (case / "empty").mkdir()
    export_adapter(case / "adapter", "peft", case / "empty")
    assert (case / "empty" / "adapter_model.safetensors").is_file()


def test_a_failed_export_leaves_nothing(case, monkeypatch):
    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("priors_peft.hub.checkpoint.save_file", full_disk)
    before = sorted(os.listdir(case))
    with pytest.raises(OSError, match="No space left"):
        export_adapter(case / "adapter", "checkpoint", case / "out")
    assert sorted(os.listdir(case)) == before


def test_an_adapter_without_a_base_model_asks_for_one(case):
    for name in ("adapter_config.json", "prior_config.json"):
        path = case / "adapter" / name
        described = json.loads(path.read_text())
        (described.get("config") or described)["base_model_name_or_path"] = None
        path.write_text(json.dumps(described))
    for to in ("prefix", "checkpoint"):
        with pytest.raises(ValueError, match="base_model must be given"):
            export_adapter(case / "adapter", to, case / "out")
    export_adapter(case / "adapter", "checkpoint", case / "out", base_model=str(case / "base"))


def test_the_command_writes_and_says_how_to_use_it(case, capsys):
    adapter = str(case / "adapter")
    assert main(["export", adapter, "--to", "checkpoint", str(case / "out")]) == 0
    printed = capsys.readouterr().out
    example = printed.split("To use it:\n\n")[1]
    scope: dict = {}
    exec(example, scope)  # what is printed is what runs
    assert scope["generator"](addition_rows(1)[0]["prompt"], max_new_tokens=2)
    assert main(["export", adapter, str(case / "other"), "--to", "peft"]) == 0
    assert main(["export", adapter, "--to", "prompt-embeds", str(case / "prompt.safetensors")]) == 0
    example = capsys.readouterr().out.split("To use it:\n\n")[-1]
    assert "enable_prompt_embeds=True" in example and len(example.strip().splitlines()) == 10
    assert main(["export", adapter, "--to", "onnx", str(case / "x")]) == 1
    assert "to must be one of peft, prefix, checkpoint, prompt-embeds, got 'onnx'" in capsys.readouterr().err
    assert main(["export", adapter, "--to", "peft"]) == 1
    assert "ADAPTER, OUT must be given" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["mean", "draw"])
def test_exports_hold_one_prompt_of_a_posterior_and_say_which(tmp_path, held, capsys):
    save_base(tmp_path / "base")
    wide = {"inference": "variational", "inference_kwargs": {"initial_scale": 1.0}}
    model = save_adapter(tmp_path / "adapter", tmp_path / "base", **wide)
    if held == "draw":
        encoder = model.prompt_encoder["default"]
        encoder.point = encoder.posterior.sample(encoder.coordinate, 1, torch.Generator().manual_seed(9))[0].detach()
        model.save_pretrained(tmp_path / "adapter")
    outs = {to: tmp_path / to / "prompt.safetensors" if to == "prompt-embeds" else tmp_path / to for to in FORMATS}
    for to, out in outs.items():
        assert main(["export", str(tmp_path / "adapter"), "--to", to, str(out)]) == 0
        assert (
            f"Wrote {out}, one prompt of a posterior, whose spread stays with the adapter" in capsys.readouterr().out
        )
    prompt, ids = model.prompt("default").theta.detach(), torch.tensor([[5, 20, 31]])
    assert not torch.allclose(model.posterior_samples(1)[0], prompt, atol=0.01)
    assert torch.equal(prompt, model.prompt_encoder["default"].mean()) == (held == "mean")
    assert torch.equal(load_file(outs["peft"] / "adapter_model.safetensors")["prompt_embeddings"], prompt[0])
    with safe_open(outs["prompt-embeds"], "pt") as file:
        assert torch.equal(file.get_tensor("prompt_embeds"), prompt[0]) and file.metadata()["posterior"] == held
    with safe_open(outs["prefix"] / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "posterior": held}
    checkpoint = AutoModelForCausalLM.from_pretrained(outs["checkpoint"]).get_input_embeddings().weight
    assert any(torch.allclose(rows, prompt[0]) for rows in checkpoint.unfold(0, COUNT, 1).mT)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        stock = PeftModel.from_pretrained(base, outs["prefix"])(ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(stock, model(ids).logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif("PRIORS_PEFT_TINY_MODEL" not in os.environ, reason="set PRIORS_PEFT_TINY_MODEL to a real model")
def test_a_real_model_and_tokenizer_tell_the_tuned_story(tmp_path):
    base = Path(os.environ["PRIORS_PEFT_TINY_MODEL"])
    model = save_adapter(tmp_path / "adapter", base)
    export_adapter(tmp_path / "adapter", "checkpoint", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("Once upon a time")["input_ids"]
    expected = tokenizer.decode(ids + answer(model, tokenizer, ids, 40), skip_special_tokens=True)
    code = """
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1])
text = generator("Once upon a time", max_new_tokens=40, do_sample=False, eos_token_id=None)[0]["generated_text"]
assert text == sys.argv[2], text
"""
    run(code, str(tmp_path / "out"), expected, blocked=("peft", "priors_peft"))


class StandInForVLLM:
    """Takes what `vllm.LLM` takes, and gives it to transformers."""

    def __init__(self, model, enable_prompt_embeds):
        assert enable_prompt_embeds
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(self, request):
        embeddings = request["prompt_embeds"]
        ids = self.model.generate(inputs_embeds=embeddings[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
        text = self.tokenizer.decode(ids[0], skip_special_tokens=True)
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)])]


def test_the_snippets_of_the_documentation_run(case, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "exports.md").read_text(encoding="utf-8")
    monkeypatch.chdir(case)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandInForVLLM))
    shutil.copytree(case / "adapter", "outputs/sums")
    commands = re.findall(r"^priors-peft (export outputs/.*)$", page, re.MULTILINE)
    assert len(commands) == 3 and all(main(command.split()) == 0 for command in commands)
    shutil.copytree("outputs/sums-model", "outputs/sums-gguf")
    example = capsys.readouterr().out.split("To use it:\n\n")[-1].replace(str(case / "base"), "user/base").strip()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 5 and snippets[-1].replace("\n\n", "\n").strip() == example.replace("'", '"')
    scope = {"base_model": AutoModelForCausalLM.from_pretrained("base")}
    for snippet in snippets:
        exec(snippet.replace("user/adapter", "outputs/sums").replace("user/base", "base"), scope)
    base, gguf = (AutoTokenizer.from_pretrained(folder) for folder in ("base", "outputs/sums-gguf"))
    assert gguf(TEXT)["input_ids"] == base(TEXT)["input_ids"]
    ids = base("3 and 4 make")["input_ids"]
    model = PriorPeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "outputs/sums")
    said = capsys.readouterr().out.strip()
    assert said == base.decode(answer(model, base, ids), skip_special_tokens=True) and said
