"""Evaluation in training: an exact likelihood of all rows, and generated answers in their order."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from .calibration import calibration_of
from .callback import suffix
from .data import padded_text, prompts_of
from .hub.trainer import HubTrainer


class LikelihoodTrainer(HubTrainer):
    """A `Trainer` that evaluates prompts by nats per supervised token over all rows, not by a mean of means."""

    _encode: Callable[[Any], Any]
    _max_length: int | None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer`'s, for rows with `prompt` and `completion` too."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if named else self._encode(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `Trainer`'s, for rows with `prompt` and `completion` too."""
        return super().get_test_dataloader(self._encode(test_dataset))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`Trainer`'s loop, with a loss that is exact: nats per supervised token over all rows, not a mean of means."""
        users_metrics, active = self.compute_metrics, self.model.active_adapter
        order = _by_length(dataloader.dataset)
        self.compute_metrics = partial(_figures, users_metrics=users_metrics, order=order)
        figures: dict[str, float] = {}
        part = metric_key_prefix.partition("_")[2]
        if not part:
            self.calibrations = {}  # particles of before are gone
        try:
            with self.model.cached_prompt():
                for name in self.adapter_names:
                    self.model.active_adapter = name
                    with nullcontext() if self._is_unaveraged else self.model.averaged(self.args.posterior_draws):
                        output = super().evaluation_loop(
                            dataloader, description, False, ignore_keys, metric_key_prefix
                        )
                    label = ", ".join(filter(None, [f"{name} alone" if self._is_unaveraged else name, part]))
                    self.calibrations[label] = calibration_of(torch.from_numpy(output.predictions[2]).sum(0))
                    for key, value in output.metrics.items():
                        figures[key + suffix(name, self.adapter_names)] = value
        finally:
            self.compute_metrics, self.model.active_adapter = users_metrics, active
        if len(self.adapter_names) > 1:
            losses = [value for key, value in figures.items() if key.startswith(f"{metric_key_prefix}_loss/")]
            figures[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        answers, labels = (_in_order(part, order) for part in (_generated(output.predictions), output.label_ids))
        return output._replace(predictions=answers, label_ids=labels, metrics=figures)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return _by_length(eval_dataset)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, ...], Tensor]:
        """Likelihood of each row's answer and, if there are metrics to compute, a generated answer."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, return_logits=False)
            scores: tuple[Tensor, ...] = (outputs.row_nll, outputs.row_tokens, outputs.row_bins)
            if self.compute_metrics is not None and self.compute_metrics.keywords["users_metrics"] is not None:
                scores = (*scores, self._answers(model, inputs))
        return None, scores, inputs["labels"]

    def _answers(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        rows = prompts_of(inputs["input_ids"].tolist(), mask.tolist(), inputs["labels"].tolist())
        if self._max_length:
            # Room for the answer within the context, at the cost of the prompt's start as in training.
            room = max(1, self._max_length - self.args.max_new_tokens)
            rows = [row[-room:] for row in rows]
        prompts = padded_text(rows, self.processing_class.pad_token_id, "left", self.args.device)
        generated = self.accelerator.unwrap_model(model).generate(
            **prompts,
            max_new_tokens=self.args.max_new_tokens,
            do_sample=False,
            pad_token_id=self.processing_class.pad_token_id,
        )
        return generated[:, prompts["input_ids"].shape[1] :]


def _by_length(dataset: Any) -> list[int] | None:
    """Rows from the longest to the shortest, so that rows that are decoded together need little padding."""
    if not isinstance(dataset, Dataset):  # a stream, which is evaluated as it comes
        return None
    lengths = [len(row) for row in dataset["input_ids"]]
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def _in_order(rows: Any, order: list[int] | None) -> Any:
    """Rows that came by length, in the data set's order; the last do not come where `dataloader_drop_last` is set."""
    return rows if rows is None or order is None else rows[np.argsort(order[: len(rows)])]


def _figures(
    prediction: EvalPrediction,
    users_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    order: list[int] | None,
) -> dict[str, float]:
    nll, tokens, bins = prediction.predictions[:3]
    figures = {"loss": float(np.sum(nll, dtype=np.float64) / max(1, np.sum(tokens)))}
    figures["ece"] = calibration_of(torch.from_numpy(bins).sum(0)).error
    if users_metrics is not None:
        answers, labels = _generated(prediction.predictions), prediction.label_ids
        figures |= users_metrics(EvalPrediction(_in_order(answers, order), _in_order(labels, order)))
    return figures


def _generated(predictions: Any) -> Any:
    return predictions[3] if isinstance(predictions, tuple) and len(predictions) > 3 else None
