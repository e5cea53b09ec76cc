"""The tuned model: a prompt pass for the whole batch, a text pass, and the head on supervised positions only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS
from transformers.utils import logging

from .adapters import AdapterModel
from .architecture import expand_cache, supports_prompt_cache
from .batch import Supervision, Text
from .calibration import row_bins
from .config import PriorConfig
from .generation import generate_after
from .head import logits_of, supervised_nll
from .inference.predictive import mean_log_prob, mean_logits, token_scores
from .names import check_at_least
from .packing import Unpackable, supports_packing
from .passes import (
    Prompt,
    PromptState,
    cached_pass,
    concatenated_pass,
    continued,
    packed_pass,
    prompt_pass,
)
from .sharding import is_sharded, process_rank


logger = logging.get_logger(__name__)

# What a packed sequence, or rows with different prompts, can't give back.
_EXTRAS = ("use_cache", "output_hidden_states", "output_attentions")

_NOT_WEIGHED = (
    "transformers.Trainer takes the loss as it is, so this prompt trains without its prior: use priors_peft.PriorTrainer. "
    "(A trainer that adds the outputs' log_prior itself sets model.weighs_prior = True.)"
)

# `transformers.pipeline` knows models by the name of their class; without this it prints an error and works all the same.
SUPPORTED_PEFT_TASKS["text-generation"].append("PriorPeftModel")


@dataclass
class PriorCausalLMOutput(CausalLMOutputWithPast):
    """Outputs of a causal language model with a prompt.

    Args:
        loss: Mean negative log likelihood of the supervised tokens, in nats.
        logits: Aligned with `input_ids`, shape `[B, L, V]`; None in training, where they are never built.
        row_nll: Summed negative log likelihood of each row's supervised tokens, in nats, shape `[B]`.
        row_tokens: Number of supervised tokens of each row, shape `[B]`.
        row_bins: Without gradients and logits, what `calibration.calibration_of` takes the sum of, shape `[B, 3, 10]`.
        log_prior: log p(θ) of the prompt, in nats, or −KL(q ‖ p) where a posterior is trained; in training, where
            `prior_weight` is not 0.
    """

    row_nll: Tensor | None = None
    row_tokens: Tensor | None = None
    row_bins: Tensor | None = None
    log_prior: Tensor | None = None


class PriorPeftModel(AdapterModel):
    """A frozen causal language model with a soft or deep prompt under a prior.

    Args:
        model: The base model; its weights are frozen in place.
        peft_config: What is tuned, under which prior.
        adapter_name: Name of this prompt.
        tokenizer: Tells which vocabulary rows are special, so that the prior is not fitted on them.
        saved: A saved prompt to start from instead of a draw from the prior.

    Raises:
        ValueError: The base model can't take a prompt, or the configuration does not fit it.
    """

    _unpackable = False
    _kept: dict[Any, tuple[Any, PromptState, list[Tensor]]] | None = None
    _averaged: tuple[int, int] | None = None
    # Whether who trains this adds `log_prior` to the loss.
    weighs_prior = False

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
        adapter_names: list[str] | None = None,
        return_dict: bool | None = None,
        task_ids: None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> PriorCausalLMOutput | tuple:
        """Run the prompt and the text.

        Args:
            input_ids: Shape `[B, L]`, without the prompt; or give `inputs_embeds` `[B, L, d]`.
            attention_mask: 1 for text, 0 for padding on either side, shape `[B, L]`.
            labels: Token ids, −100 where unsupervised, shape `[B, L]`. As in PEFT the first token of a row can be
                supervised: the last virtual token predicts it.
            position_ids: Positions in the text, shape `[B, L]`; counted from the attention mask if None.
            past_key_values: A cache that this model returned (`use_cache=True`); the prompt is in it already.
            num_items_in_batch: What the summed loss is divided by; the number of supervised tokens if None.
            return_logits: Whether to build `[B, L, V]` logits. By default not in training with labels.
            logits_to_keep: Build logits for that many last positions only; 0 for all.
            adapter_names: The prompt of each row; the active one for all if None.

        Returns:
            Loss in nats per supervised token, logits aligned with `input_ids`, and each row's likelihood.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        text = Text(input_ids, inputs_embeds, attention_mask, position_ids)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            # The caller's mask and positions don't count the prompt.
            text = text.after(self.active_peft_config.num_virtual_tokens)
            kwargs = {"labels": labels, "logits_to_keep": logits_to_keep, "use_cache": None} | kwargs
            return continued(self.base_model, text, past_key_values, kwargs)
        if token_type_ids is not None:
            logger.warning_once("token_type_ids are ignored: a prompt has none. Leave them out of the inputs.")
        prompts = self._prompts(adapter_names, text.batch_size)
        text.check_fits(self.base_model, max(prompt.length for prompt in prompts.values()))
        asked = None if labels is None else Supervision.of(labels, attention_mask)
        prompts, text, supervision, count = self._drawn(prompts, text, asked)
        whole = return_logits if return_logits is not None else (labels is None or not self.training)
        result, nll = PriorCausalLMOutput(), None
        if supervision is not None and not whole:
            states = self._predicting_states(prompts, text, supervision, kwargs, result)
            nll = self._nll(states, supervision, text.batch_size, count, result)
        else:
            states = self._padded_states(prompts, text, kwargs, result)
            if supervision is not None:
                logits = logits_of(self.base_model, states)
                scored = logits[supervision.rows, supervision.predictors + 1]
                nll = nn.functional.cross_entropy(scored.float(), supervision.targets, reduction="none")
                result.logits = mean_logits(logits[:, 1:][:, -logits_to_keep:], count)
            elif whole:
                result.logits = mean_logits(logits_of(self.base_model, states[:, 1:][:, -logits_to_keep:]), count)
        if asked is not None and nll is not None:
            nll = nll if len(nll) == len(asked.targets) else -mean_log_prob(-nll.unflatten(0, (count, -1)))
            batch_size = text.batch_size // count
            result.row_nll = nll.new_zeros(batch_size).index_add(0, asked.rows, nll.detach())
            result.row_tokens = torch.bincount(asked.rows, minlength=batch_size)
            result.loss = nll.sum() / (num_items_in_batch if num_items_in_batch is not None else max(len(nll), 1))
            log_prior = {_adapter(key): prompt.log_prior for key, prompt in prompts.items()}
            if any(part is not None for part in log_prior.values()):
                if num_items_in_batch is not None and not self.weighs_prior:
                    logger.warning_once(_NOT_WEIGHED)
                terms = torch.stack([nll.new_zeros(()) if part is None else part for part in log_prior.values()])
                result.log_prior = terms.sum() if adapter_names is None else terms
        return result if return_dict is not False else result.to_tuple()

    def _nll(
        self, states: Tensor, supervision: Supervision, num_rows: int, count: int, result: PriorCausalLMOutput
    ) -> Tensor:
        """NLL of supervised tokens of `count` draws; without gradients averaged over them, with `result.row_bins`."""
        if torch.is_grad_enabled():
            return supervised_nll(self.base_model, states, supervision.targets)
        size = len(supervision.targets) // count
        targets, rows = supervision.targets[:size], supervision.rows[:size]
        scores = token_scores(self.base_model, states.unflatten(0, (count, -1)), targets, with_entropy=False)
        result.row_bins = row_bins(rows, num_rows // count, scores["sure"], scores["right"])
        return scores["nll"]

    def _prompts(self, adapter_names: list[str] | None, batch_size: int) -> dict[Any, Prompt]:
        """The prompts of a batch, in the order in which rows name them first."""
        names = [self.active_adapter] * batch_size if adapter_names is None else adapter_names
        if len(names) != batch_size or not set(names) <= set(self.peft_config):
            raise ValueError(
                f"adapter_names must name one of {list(self.peft_config)} for each of the {batch_size} rows, got "
                f"{names}"
            )
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        if not self.training:
            return {name: self.prompt(name, of) for name, of in rows.items()}
        return {key: prompt for name, of in rows.items() for key, prompt in self._trained_prompts(name, of)}

    def _trained_prompts(self, name: str, rows: list[int]) -> Iterator[tuple[Any, Prompt]]:
        """As a step of training takes them: a draw where a posterior is trained, with log p(θ) or −KL(q ‖ p).

        Rows are shared out among the Gaussians of a mixture, from another one on each time, as not all may get as many;
        over processes as one process would, whose batch has the rows of all.
        """
        config, encoder = self.peft_config[name], self.prompt_encoder[name]
        thetas, log_prior = encoder(drawn=True, weighted=bool(config.prior_weight))
        layers, count = config.selected_layers(config.num_layers), len(thetas)
        if count == 1:
            yield name, Prompt(thetas[0], layers, rows, log_prior)
            return
        device = None if encoder.noise is None else encoder.noise.device
        first = int(torch.randint(count, (), generator=encoder.noise, device=device)) + process_rank() * len(rows)
        for number in range(min(count, len(rows))):
            yield (name, number), Prompt(thetas[(first + number) % count], layers, rows[number::count], log_prior)

    def prompt(self, name: str, rows: list[int] | None = None) -> Prompt:
        """θ of an adapter as it is now, its layers, and the rows of a batch that it comes before."""
        config = self.peft_config[name]
        return Prompt(self.prompt_encoder[name](), config.selected_layers(config.num_layers), rows or [])

    def run_prompt(self, name: str) -> PromptState:
        """The key/value cache of a prompt, and its last hidden state."""
        return prompt_pass(self.base_model, self.prompt(name))

    def _drawn(
        self, prompts: dict[str, Prompt], text: Text, supervision: Supervision | None
    ) -> tuple[dict[Any, Prompt], Text, Supervision | None, int]:
        """Within `averaged`, the batch once for each draw: its rows over and over, each time after other draws."""
        if self.training or not self._averages(*prompts):
            return dict(prompts), text, supervision, 1
        count, size = self._averaged[0], text.batch_size  # type: ignore[index]
        drawn = {
            (name, number): replace(prompt, theta=theta, rows=[row + number * size for row in prompt.rows])
            for name, prompt in prompts.items()
            for number, theta in enumerate(self._draws(name))
        }
        supervision = None if supervision is None else supervision.repeated(count, size)
        return drawn, text.repeated(count), supervision, count

    def _averages(self, *names: str) -> bool:
        """Whether a batch of these prompts is averaged over draws."""
        return self._averaged is not None and any(self.prompt_encoder[name].posterior is not None for name in names)

    def _draws(self, name: str) -> Tensor:
        count, seed = self._averaged or (1, 0)
        return self.posterior_samples(count, seed, name)

    def _padded_states(
        self, prompts: dict[Any, Prompt], text: Text, options: dict[str, Any], result: PriorCausalLMOutput
    ) -> Tensor:
        """Final hidden states `[B, 1 + L, d]`, the last virtual token's first; fills in what else was asked for."""

        def run(name: Any, prompt: Prompt, text: Text) -> Any:
            if self._concatenates(self.training):
                return concatenated_pass(self.base_model, prompt, text, options)
            return cached_pass(self.base_model, self._state(name, prompt), text, options)

        if len(prompts) == 1:
            outputs = run(*next(iter(prompts.items())), text)
            result.past_key_values = outputs.past_key_values if options.get("use_cache") else None
            result.hidden_states, result.attentions = outputs.get("hidden_states"), outputs.get("attentions")
            return outputs.last_hidden_state
        asked = [name for name in _EXTRAS if options.get(name)]
        if asked:
            raise ValueError(
                f"{asked[0]} must be False for rows with different prompts, as a mixture's are in training, got True"
            )
        parts = [run(name, prompt, text.of(prompt.rows)).last_hidden_state for name, prompt in prompts.items()]
        order = torch.tensor([row for prompt in prompts.values() for row in prompt.rows])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def _state(self, name: Any, prompt: Prompt) -> PromptState:
        """The prompt's key/value cache; within `cached_prompt` the one that is kept, if the prompt is still the same.

        `name` is the adapter's, with the number of the draw where it is one.
        """
        if self._kept is None or torch.is_grad_enabled() or self.training or is_sharded(self):
            return prompt_pass(self.base_model, prompt)
        encoder = self.prompt_encoder[_adapter(name)]
        tensors = list(encoder.state_dict(keep_vars=True).values())
        version = [(tensor.data_ptr(), tensor._version) for tensor in tensors], self._averaged
        if self._kept.get(name, (None,))[0] != version:
            # The tensors too: another encoder's must not get the address of ones that are gone.
            self._kept[name] = version, prompt_pass(self.base_model, prompt), tensors
        return self._kept[name][1]

    def _predicting_states(
        self,
        prompts: dict[Any, Prompt],
        text: Text,
        supervision: Supervision,
        options: dict[str, Any],
        result: PriorCausalLMOutput,
    ) -> Tensor:
        """Final hidden states `[N, d]` that predict supervised tokens, by one sequence without padding if it can be."""
        if self.packs(self.training) and not any(options.get(name) for name in _EXTRAS):
            state = None
            if len(prompts) == 1 and self._kept is not None and not (torch.is_grad_enabled() or self.training):
                state = self._state(*next(iter(prompts.items())))
                if any(state.cache.is_sliding):  # what left the window is dropped there
                    state = None
            try:
                return packed_pass(self.base_model, list(prompts.values()), state, text, supervision, options)
            except Unpackable:
                self._unpackable = True
        states = self._padded_states(prompts, text, options, result)
        return states[supervision.rows, supervision.predictors + 1]

    def predicting_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Supervision]:
        """Final hidden states that predict supervised tokens, of each of K draws (`averaged`): `[K, N, d]`; and which."""
        text, asked = Text(input_ids, None, attention_mask, None), Supervision.of(labels, attention_mask)
        prompts = {self.active_adapter: self.prompt(self.active_adapter, list(range(len(input_ids))))}
        drawn, text, supervision, count = self._drawn(prompts, text, asked)
        states = self._predicting_states(drawn, text, supervision or asked, {}, PriorCausalLMOutput())
        return states.unflatten(0, (count, len(asked.rows))), asked

    # The posterior

    @torch.no_grad()
    def posterior_samples(self, count: int, seed: int = 0, adapter_name: str | None = None) -> Tensor:
        """Prompts θ drawn from the posterior, shape `[count, S, P, d]`; the same for the same seed.

        Where the posterior is a point (`inference="map"`) all are the prompt itself.

        Raises:
            ValueError: `count` is no integer >= 1.
        """
        check_at_least("count", count, 1)
        encoder = self.prompt_encoder[adapter_name or self.active_adapter]
        return encoder.samples(count, torch.Generator().manual_seed(seed))

    @contextmanager
    def averaged(self, count: int = 8, seed: int = 0) -> Iterator[None]:
        """Within this context evaluation and generation average token probabilities over draws from the posterior.

        All draws run in one pass; logits are then log probabilities. Where the posterior is a point nothing changes.

        Args:
            count: Number of draws; 1 takes the one prompt that stands for the posterior, as outside of this context.
            seed: The same draws for the same seed.
        """
        check_at_least("count", count, 1)
        before, self._averaged = self._averaged, None if count == 1 else (count, seed)
        try:
            yield
        finally:
            self._averaged = before

    @contextmanager
    def cached_prompt(self) -> Iterator[None]:
        """Within this context prompts run once for all calls in evaluation mode without gradients.

        For evaluating or generating in many batches; a prompt that is changed in between runs again.
        """
        kept, self._kept = self._kept, {} if self._kept is None else self._kept
        try:
            yield
        finally:
            self._kept = kept

    def packs(self, training: bool) -> bool:
        """Whether a loss is computed on rows as one sequence without padding, in training or evaluation."""
        return not (self._unpackable or self._concatenates(training)) and supports_packing(self.base_model)

    def _concatenates(self, training: bool) -> bool:
        """Whether prompt and text must run as one padded sequence; with `packs` where the way through is decided."""
        return not self._takes_cache or (training and self.base_model.is_activation_checkpointing)

    @cached_property
    def _takes_cache(self) -> bool:
        return supports_prompt_cache(self.base_model)

    # Generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """`transformers`' `generate` after the prompt; arguments and results are those of the base model."""
        base = self.base_model
        base.generation_config = self.generation_config
        cache = kwargs.get("past_key_values")
        if self._adapters_disabled or (cache is not None and cache.get_seq_length() > 0):
            return base.generate(inputs, **kwargs)
        prompt, caches = self.prompt(self.active_adapter), []
        if self._concatenates(self.training):
            if self._averages(self.active_adapter):
                raise ValueError(
                    f"draws can't be averaged in generation by {type(base).__name__}, whose prompt leaves no key/value "
                    "cache: call generate outside of averaged, for the one prompt that stands for the posterior"
                )
        elif not self._averages(self.active_adapter):
            caches = [self._state(self.active_adapter, prompt).cache]
        else:
            drawn = [replace(prompt, theta=theta) for theta in self._draws(self.active_adapter)]
            caches = [self._state((self.active_adapter, number), one).cache for number, one in enumerate(drawn)]
        if is_sharded(self):
            kwargs.setdefault("synced_gpus", True)  # a process that is done goes on for those that are not
        return generate_after(base, prompt, caches, inputs, kwargs)

    def get_prompt(self, batch_size: int, task_ids: None = None, max_cache_len: int | None = None) -> Any:
        """θ `[batch_size, P, d]` of a soft prompt, or the key/value cache of a deep one, as PEFT gives them."""
        prompt = self.prompt(self.active_adapter)
        if self.active_peft_config.tuning == "soft":
            return prompt.theta.expand(batch_size, -1, -1)
        return expand_cache(self._state(self.active_adapter, prompt).cache, batch_size)


def _adapter(key: Any) -> str:
    """The adapter whose prompt has that key in a batch: its name, or its name and the number of a draw."""
    return key if isinstance(key, str) else key[0]


def get_prior_model(
    base_model: PreTrainedModel, config: PriorConfig, tokenizer: Any | None = None, adapter_name: str = "default"
) -> PriorPeftModel:
    """Wrap a causal language model with a prompt under a prior.

    Args:
        base_model: The model to adapt; its weights are frozen in place.
        config: What is tuned, under which prior.
        tokenizer: Tells which vocabulary rows are special, so that the prior is not fitted on them.
        adapter_name: Name of the prompt.

    Raises:
        ValueError: The base model can't take a prompt, or the configuration does not fit it.
    """
    return PriorPeftModel(base_model, config, adapter_name, tokenizer=tokenizer)
