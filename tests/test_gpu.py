"""On an accelerator the numbers are those of the CPU; skipped where there is none."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import addition_rows, make_model, make_tokenizer
from safetensors.torch import load_file
from test_model import assert_close, without_dropout
from test_packing import LENGTHS, ours_on, padded, rows, tuned

from priors_peft import PriorConfig, PriorTrainer, PriorTrainingArguments, get_prior_model


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

AHEAD = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "lm_head")
BEHIND = ("model.layers.1", "model.layers.2", "model.norm")


@pytest.mark.parametrize("lengths", LENGTHS)
def test_loss_and_gradient_are_the_cpus(architecture, lengths):
    batch = padded(rows(LENGTHS[lengths], common=1), "right")
    results = []
    for device in ("cpu", "cuda"):
        model = tuned(make_model(architecture), 5).to(device)
        without_dropout(model)
        results.append(ours_on(model, [{name: part.to(device) for name, part in batch.items()}], 1))
    (loss, gradient), (on_gpu, gradient_on_gpu) = results
    assert abs(on_gpu.cpu() - loss) < 1e-3
    assert_close(gradient_on_gpu.cpu(), gradient, 1e-3)


@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_training_and_evaluation_run_there(tmp_path, names):
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=make_tokenizer())
    for name in names[1:]:
        model.add_adapter(name, PriorConfig(num_virtual_tokens=4, seed=1))
    trainer = PriorTrainer(
        model=model,
        args=PriorTrainingArguments(output_dir=str(tmp_path), max_steps=4, bf16=True, report_to=[]),
        train_dataset=addition_rows(16),
        eval_dataset=addition_rows(6, start=400),
        processing_class=make_tokenizer(),
        adapter_names=names,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert model.prompt_encoder["default"].coordinate.device.type == "cuda"


@pytest.mark.parametrize("inference", ["variational", "laplace", "sghmc", "svgd"])
@pytest.mark.parametrize("settings", [{}, {"prior_kwargs": {"scale": "evidence"}}], ids=["fixed", "evidence"])
def test_posteriors_are_found_there_and_come_back(tmp_path, inference, settings):
    if settings and inference not in ("variational", "laplace"):
        pytest.skip("such a scale is found by the other two")
    config = PriorConfig(num_virtual_tokens=4, inference=inference, **settings)
    model = get_prior_model(make_model(), config, tokenizer=make_tokenizer())
    args = PriorTrainingArguments(output_dir=str(tmp_path), max_steps=4, save_steps=4, report_to=[])
    rows = addition_rows(16)
    trainer = PriorTrainer(model, args, rows, rows[:4], processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    model.load_adapter(str(tmp_path), "default")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_a_model_whose_layers_lie_on_two_devices_gives_what_it_gives_on_one(tmp_path, tuning):
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, tuning=tuning, prior_weight=1.0))
    batch, found = padded(rows(LENGTHS["uneven"], common=1), "right"), []
    for device in ("cpu", "cuda"):
        if device != "cpu":
            # As accelerate's `dispatch_model` has it, which computes on no CPU beside a GPU.
            of_module = {model.base_model.get_submodule(name): device for name in AHEAD}
            of_module |= {model.base_model.get_submodule(name): "cpu" for name in BEHIND}
            for module, place in of_module.items():
                add_hook_to_module(module.to(place), AlignDevicesHook(place))
            add_hook_to_module(model.base_model, AlignDevicesHook(device, io_same_device=True))
            model.prompt_encoder.to(device)
            batch = {name: part.to(device) for name, part in batch.items()}
        outputs = model.eval()(**batch)
        loss, gradient = ours_on(model.train(), [batch], 1)
        model.save_pretrained(str(tmp_path))
        stock = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
        found.append([part.detach().cpu() for part in (loss, gradient, outputs.logits, outputs.row_nll, stock)])
        model.zero_grad()
    for alone, spread in zip(*found, strict=True):
        assert_close(spread, alone, 1e-3)
