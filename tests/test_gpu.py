"""On an accelerator the numbers are those of the CPU; skipped where there is none."""

import pytest
import torch
from conftest import addition_rows, make_model, make_tokenizer
from test_model import assert_close, without_dropout
from test_packing import LENGTHS, ours_on, padded, rows, tuned

from priors_peft import PriorConfig, PriorTrainer, PriorTrainingArguments, get_prior_model


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
