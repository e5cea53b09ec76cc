"""The curvature of a language model's likelihood, as the Laplace approximation draws it."""

import torch
from test_trainer import make_trainer

from priors_peft.inference.laplace import fisher_gradients, laplace_posterior


def fisher_trainer(folder, batch_size=4):
    config = {"inference": "laplace", "num_virtual_tokens": 2, "prior_weight": 0.1}
    trainer = make_trainer(folder, rows=3, config=config, per_device_train_batch_size=batch_size)
    trainer.model.eval()
    return trainer


def test_gradients_under_drawn_answers_have_the_fisher_information_as_their_second_moment(tmp_path):
    trainer = fisher_trainer(tmp_path)
    gradients = fisher_gradients(trainer, 300).flatten(1)
    model, batch = trainer.model, trainer.data_collator(list(trainer.train_dataset))
    logits, coordinate = model(**batch).logits, model.prompt_encoder["default"].coordinate
    exact = torch.zeros(coordinate.numel(), coordinate.numel())
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        log_probs = logits[row, column - 1].log_softmax(-1)
        wanted = torch.eye(len(log_probs))
        jacobian = torch.autograd.grad(log_probs, coordinate, wanted, retain_graph=True, is_grads_batched=True)[0]
        exact += jacobian.flatten(1).mT @ (log_probs.exp()[:, None] * jacobian.flatten(1))
    drawn = gradients.mT @ gradients / len(gradients)
    assert (drawn - exact.detach()).norm() < 0.15 * exact.norm()


def test_draws_are_the_rows_own_whatever_batches_they_come_in(tmp_path):
    alone, together = (fisher_gradients(fisher_trainer(tmp_path, size), 3) for size in (1, 3))
    assert (alone - together).norm() < 1e-5 * alone.norm()


def test_what_is_found_lies_where_the_curvature_does_and_can_be_rescaled():
    values, directions = torch.ones(2, device="meta"), torch.ones(2, 1, 3, 4, device="meta")
    posterior = laplace_posterior(values, directions, precision=2.0)
    posterior.scale_by(torch.ones(1, 1, 1, device="meta"))
    assert {tensor.device.type for tensor in posterior.buffers()} == {"meta"}
