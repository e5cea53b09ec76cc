"""What is saved loads anywhere to the same numbers, and what is damaged is refused by name."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, LAYERS, WIDTH, make_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

from priors_peft import PriorConfig, PriorPeftModel, get_prior_model
from priors_peft.hub.adapter import PRIOR_CONFIG, PRIOR_WEIGHTS
from priors_peft.inference.posterior import SampledPosterior
from priors_peft.priors import GaussianPrior


SHAPES = {"soft": {}, "deep": {"tuning": "deep"}, "partly_deep": {"tuning": "deep", "layers": [0, -1]}}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

LOAD_WITH_STOCK_PEFT = """
import sys, warnings
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
inputs = load_file(sys.argv[1] + "/inputs.safetensors")
for case in sys.argv[2:]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        base = AutoModelForCausalLM.from_pretrained(case + "/base", attn_implementation="eager")
        model = PeftModel.from_pretrained(base, case + "/adapter")
        auto = AutoPeftModelForCausalLM.from_pretrained(case + "/adapter", attn_implementation="eager")
        logits = model(**inputs).logits
    # transformers itself warns of a name that peft still uses; it has nothing to do with the adapter
    seen = [str(warning.message) for warning in seen if "is_gradient_checkpointing" not in str(warning.message)]
    assert not seen, (case, seen)
    assert (auto(**inputs).logits == logits).all()
    text = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    outputs = {"logits": logits.detach().contiguous(), "text": text.contiguous()}
    save_file(outputs, case + "/outputs.safetensors")
assert not any(name.startswith("priors_peft") for name in sys.modules)
"""


def tuned(shape, architecture="llama", **settings):
    config = PriorConfig(num_virtual_tokens=4, **SHAPES[shape], **settings)
    model = get_prior_model(make_model(architecture), config)
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():  # somewhere training could have led
        encoder.coordinate.add_(torch.randn(encoder.coordinate.shape, generator=torch.Generator().manual_seed(5)))
    return model


def inputs():
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
def test_stock_peft_gives_the_same_models_without_a_warning(tmp_path):
    save_file(inputs(), tmp_path / "inputs.safetensors")
    models = {}
    for architecture, shape in itertools.product(CONFIGS, SHAPES):
        case = tmp_path / f"{architecture}_{shape}"
        make_model(architecture).save_pretrained(case / "base")
        model = models[case] = tuned(shape, architecture)
        model.peft_config["default"].base_model_name_or_path = str(case / "base")
        model.save_pretrained(case / "adapter")
    command = [sys.executable, "-c", LOAD_WITH_STOCK_PEFT, str(tmp_path), *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case, model in models.items():
        theirs = load_file(case / "outputs.safetensors")
        with torch.no_grad():
            ours = model(**inputs()).logits
        assert torch.allclose(theirs["logits"][:, -7:], ours, atol=1e-4), case.name
        text = model.generate(**inputs(), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(theirs["text"], text), case.name


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prompt_is_handed_out_as_stock_peft_does(shape, tmp_path):
    model = tuned(shape)
    model.save_pretrained(tmp_path)
    ours, theirs = (of.get_prompt(3) for of in (model, PeftModel.from_pretrained(make_model(), str(tmp_path))))
    if not isinstance(theirs, torch.Tensor):
        ours, theirs = ([(layer.keys, layer.values) for layer in cache.layers] for cache in (ours, theirs))
        ours, theirs = (torch.stack([torch.stack(pair) for pair in cache]) for cache in (ours, theirs))
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("coordinates", ["plain", "whitened"])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_exact(shape, coordinates, tmp_path):
    model = tuned(shape, coordinates=coordinates, prior_weight=0.3, seed=4)
    model.save_pretrained(tmp_path)
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    encoder, other = model.prompt_encoder["default"], again.prompt_encoder["default"]
    assert encoder.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in encoder.state_dict().items())
    assert torch.equal(encoder.log_prob(encoder()), other.log_prob(other()))
    assert other.coordinate.requires_grad and again.active_peft_config.prior_weight == 0.3
    frozen = PriorPeftModel.from_pretrained(make_model(), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters()) and not frozen.training
    assert torch.equal(frozen(**inputs()).logits, model(**inputs()).logits)


def test_several_adapters_save_and_load_under_their_names(tmp_path):
    model = tuned("soft")
    model.add_adapter("other", PriorConfig(num_virtual_tokens=3, tuning="deep", seed=9))
    model.save_pretrained(tmp_path)
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter("other", inference_mode=True)
    model.set_adapter("other")
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)


@pytest.mark.filterwarnings("ignore:for .*. copying from a non-meta parameter")
def test_what_is_loaded_again_lies_where_the_prompt_does(tmp_path):
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, inference="laplace"))
    encoder = model.prompt_encoder["default"]
    encoder.posterior, encoder.point = SampledPosterior(torch.ones(2, 1, 4, WIDTH)), torch.ones(1, 4, WIDTH)
    model.save_pretrained(str(tmp_path))
    encoder.posterior = encoder.point = None
    encoder.to("meta")
    model.load_adapter(str(tmp_path), "default")
    assert {encoder.point.device.type, encoder.posterior.draws.device.type} == {"meta"}


def test_a_changed_configuration_keeps_the_prompt(tmp_path):
    model = tuned("soft")
    model.save_pretrained(tmp_path)
    config = PriorConfig(num_virtual_tokens=4, coordinates="plain", prior_weight=0.0)
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True, config=config)
    assert again.active_peft_config.coordinates == "plain" and again.active_peft_config.prior_weight == 0
    assert torch.equal(again.prompt_encoder["default"].coordinate, model.prompt_encoder["default"]())


@pytest.mark.parametrize("saved", ["map", "variational"])
def test_a_configuration_that_leaves_the_inference_open_keeps_the_saved_one(tmp_path, saved):
    model = tuned("soft", inference=saved, prior_weight=0.5)
    model.save_pretrained(tmp_path)
    config = PriorConfig(num_virtual_tokens=4)
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True, config=config)
    assert (again.active_peft_config.inference, again.active_peft_config.prior_weight) == (saved, 0.5)
    config = PriorConfig(num_virtual_tokens=4, prior_weight=0.1)  # alone: MAP's
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True, config=config)
    assert (again.active_peft_config.inference, again.active_peft_config.prior_weight) == ("map", 0.1)


def test_a_stock_soft_prompt_loads_without_a_prior(tmp_path):
    model = tuned("soft")
    model.save_pretrained(tmp_path)
    (tmp_path / PRIOR_CONFIG).unlink()
    (tmp_path / PRIOR_WEIGHTS).unlink()
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    assert again.active_peft_config.prior_weight == 0
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)


def test_a_checkpoint_of_other_layers_is_refused(tmp_path):
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, tuning="deep", layers=[0, 1]))
    model.save_pretrained(tmp_path)
    other = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, tuning="deep", layers=[0, 2]))
    with pytest.raises(
        ValueError, match="the checkpoint must hold layers \\[0, 2\\] like the model's, got \\[0, 1\\]"
    ):
        other.load_adapter(tmp_path, "default")


def test_a_configuration_can_be_used_again():
    config = PriorConfig(num_virtual_tokens=4)
    first, second = make_model(), make_model()
    first.name_or_path, second.name_or_path = "first/model", "second/model"
    names = [get_prior_model(base, config).active_peft_config.base_model_name_or_path for base in (first, second)]
    assert names == ["first/model", "second/model"] and config.token_dim is None


def test_what_cannot_be_saved_is_refused_before_training():
    import numpy as np

    with pytest.raises(TypeError, match="not JSON serializable"):
        get_prior_model(
            make_model(), PriorConfig(num_virtual_tokens=4, prior="gaussian", prior_kwargs={"scale": np.float32(0.1)})
        )


def test_provenance_says_where_the_prior_came_from(tmp_path):
    tuned("partly_deep").save_pretrained(tmp_path)
    described = json.loads((tmp_path / PRIOR_CONFIG).read_text())
    assert [entry["layer"] for entry in described["reference"]] == [0, LAYERS - 1]
    assert all(entry["source"] == "vocabulary" and entry["rows"] > 10 for entry in described["reference"])
    assert described["config"]["prior"] == "structured"


def test_a_prior_object_is_saved_as_its_family(tmp_path):
    prior = GaussianPrior(torch.zeros(WIDTH), torch.full((WIDTH,), 0.02))
    get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, prior=prior)).save_pretrained(tmp_path)
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(again.prompt_encoder["default"].priors[0].scale, prior.scale)


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "tampered": data[:-1] + bytes([data[-1] ^ 1])}[how])


@pytest.mark.parametrize("file", [WEIGHTS, PRIOR_WEIGHTS])
@pytest.mark.parametrize("how", ["truncated", "tampered"])
def test_damaged_weights_are_refused(file, how, tmp_path):
    tuned("soft").save_pretrained(tmp_path)
    damage(tmp_path / file, how)
    with pytest.raises(ValueError, match=f"{file} is damaged or was changed"):
        PriorPeftModel.from_pretrained(make_model(), tmp_path)


def test_damaged_stock_weights_are_refused(tmp_path):
    tuned("soft").save_pretrained(tmp_path)
    (tmp_path / PRIOR_CONFIG).unlink()
    damage(tmp_path / WEIGHTS, "truncated")
    with pytest.raises(ValueError, match=f"{WEIGHTS} must be a whole safetensors file"):
        PriorPeftModel.from_pretrained(make_model(), tmp_path)


def test_another_hidden_size_or_depth_is_refused(tmp_path):
    tuned("soft").save_pretrained(tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 96, "intermediate_size": 16, "num_attention_heads": 2}
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=LAYERS, **settings))
    with pytest.raises(ValueError, match="its prompt has hidden size 32, the model 16"):
        PriorPeftModel.from_pretrained(wide, tmp_path)
    shallow = LlamaForCausalLM(LlamaConfig(hidden_size=WIDTH, num_hidden_layers=1, **settings))
    with pytest.raises(ValueError, match="it was trained on 3 layers, the model has 1"):
        PriorPeftModel.from_pretrained(shallow, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 99}, "format_version must be 1 .* update priors_peft"),
        ({"config": []}, "config must be an object"),
        ({"sha256": []}, "is damaged or was changed"),
        ({"config": {"num_virtual_tokens": -1}}, r"num_virtual_tokens must be an integer in \[1, .* got -1"),
        (
            {"config": {"num_virtual_tokens": 4, "prior": "os.system"}},
            "names the prior 'os.system', which is its author's own",
        ),
        ({"config": {"num_virtual_tokens": 5, "token_dim": 32, "coordinates": "whitened"}}, "must have shape"),
    ],
)
def test_damaged_configurations_are_refused(change, message, tmp_path):
    tuned("soft").save_pretrained(tmp_path)
    described = json.loads((tmp_path / PRIOR_CONFIG).read_text())
    (tmp_path / PRIOR_CONFIG).write_text(json.dumps(described | change))
    with pytest.raises(ValueError, match=message):
        PriorPeftModel.from_pretrained(make_model(), tmp_path)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}"):
        PriorPeftModel.from_pretrained(make_model(), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        PriorPeftModel.from_pretrained(make_model(), tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match="peft_type must be PROMPT_TUNING .* got 'LORA'"):
        PriorPeftModel.from_pretrained(make_model(), tmp_path)


def test_a_prompt_that_is_not_finite_leaves_the_folder_as_it_was(tmp_path):
    model = tuned("soft")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.prompt_encoder["default"].coordinate.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite to be saved"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    model = tuned("soft")
    model.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()

    def full_disk(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("priors_peft.hub.adapter.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
