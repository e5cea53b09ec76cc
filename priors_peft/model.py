"""The tuned model: a prompt pass for the whole batch, a text pass, and the head on supervised positions only."""

import copy
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS
from transformers.utils import logging

from .architecture import check_base_model, decoder_layers, expand_cache, replace_prompt, supports_prompt_cache
from .batch import HeadInput, Supervision, Text, extended_mask
from .config import PriorConfig
from .fitting import new_encoder
from .priors.reference import Provenance


if TYPE_CHECKING:
    from .hub.adapter import SavedAdapter

logger = logging.get_logger(__name__)

_REPEATING = ("num_beams", "num_return_sequences")

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
        log_prior: log p(θ) of the prompt, in nats; in training, where `prior_weight` is not 0.
    """

    row_nll: Tensor | None = None
    row_tokens: Tensor | None = None
    log_prior: Tensor | None = None


class PriorPeftModel(PeftModelForCausalLM):
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

    prompt_encoder: Any

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PriorConfig,
        adapter_name: str = "default",
        tokenizer: Any | None = None,
        saved: "SavedAdapter | None" = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        check_base_model(model)
        self.tokenizer = tokenizer
        self.provenance: dict[str, list[Provenance]] = {}
        # PeftModel's constructor calls `add_adapter`, which can't take more arguments there.
        self._saved = saved
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.train(model.training)

    # Adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PriorConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained prompt: fit its prior on the reference and draw its start from it.

        Soft and deep prompts may live side by side. `low_cpu_mem_usage` and `autocast_adapter_dtype` are PEFT's and
        change nothing here: a prompt is small and always float32.
        """
        saved, self._saved = self._saved, None
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name must be new, got {adapter_name!r}, which this model already has")
        if not isinstance(peft_config, PriorConfig):
            raise TypeError(f"peft_config must be a PriorConfig, got {type(peft_config).__name__}")
        # A copy, since what is filled in belongs to this base model and the caller may use the configuration again.
        peft_config = copy.copy(peft_config)
        layers = self._prepare_config(peft_config)
        if saved is None:
            encoder, provenance = new_encoder(self.base_model, peft_config, layers, self.tokenizer)
        else:
            encoder, provenance = saved.encoder(), saved.provenance
        if not hasattr(self, "prompt_encoder"):
            self.prompt_encoder = nn.ModuleDict()
            self.base_model.requires_grad_(False)
        self.prompt_encoder[adapter_name] = encoder.to(self.base_model.get_input_embeddings().weight.device)
        self.peft_config[adapter_name] = peft_config
        self.provenance[adapter_name] = provenance
        self.set_requires_grad(adapter_name, adapter_name == self.active_adapter and not peft_config.inference_mode)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make a prompt the active one; it alone is trainable, unless `inference_mode`."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name must be one of {list(self.peft_config)}, got {adapter_name!r}")
        self.active_adapter = adapter_name
        for name in self.peft_config:
            self.set_requires_grad(name, name == adapter_name and not inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Turn the gradients of prompts on or off."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.prompt_encoder[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a prompt; if it was active, the first that is left becomes active."""
        if adapter_name not in self.peft_config or len(self.peft_config) == 1:
            raise ValueError(
                f"adapter_name must be one of {list(self.peft_config)} and not the last, got {adapter_name!r}"
            )
        del self.peft_config[adapter_name], self.prompt_encoder[adapter_name]
        self.provenance.pop(adapter_name, None)
        if self.active_adapter == adapter_name:
            self.set_adapter(next(iter(self.peft_config)))

    def _prepare_config(self, config: PriorConfig) -> list[int]:
        """Fill in what PEFT keeps about the base model; return the selected layers."""
        text_config = self.base_model.config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None)
        if context is not None and config.num_virtual_tokens >= context:
            raise ValueError(
                f"num_virtual_tokens must leave room for text in the model's context of {context} tokens, got "
                f"{config.num_virtual_tokens}"
            )
        config.num_layers = text_config.num_hidden_layers
        layers = config.selected_layers(config.num_layers)
        config.token_dim = self.base_model.get_input_embeddings().weight.shape[1]
        if len(layers) > 1 and config.token_dim != text_config.hidden_size:
            raise ValueError(
                f'tuning must be "soft" for a model whose embeddings ({config.token_dim}) and hidden states '
                f'({text_config.hidden_size}) differ in width, got "deep"'
            )
        if len(layers) > 1 and not supports_prompt_cache(self.base_model):
            raise ValueError(
                f'tuning must be "soft" for {type(self.base_model).__name__}, which has no key/value cache of every '
                'layer, got "deep"'
            )
        config.num_attention_heads = text_config.num_attention_heads
        config.num_transformer_submodules = 1
        config.task_type = config.task_type or "CAUSAL_LM"
        config.base_model_name_or_path = config.base_model_name_or_path or self.base_model.name_or_path or None
        config.revision = config.revision or getattr(self.base_model.config, "_commit_hash", None)
        json.dumps(config.to_dict())  # what can't be saved is found out now and not after training
        return layers

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

        Returns:
            Loss in nats per supervised token, logits aligned with `input_ids`, and each row's likelihood.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        text = Text(input_ids, inputs_embeds, attention_mask, position_ids)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._continue(text, past_key_values, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        if token_type_ids is not None:
            logger.warning_once("token_type_ids are ignored: a prompt has none. Leave them out of the inputs.")
        encoder = self.prompt_encoder[self.active_adapter]
        prompt = encoder()
        self._check_text(text, prompt.shape[1])
        supervision = None if labels is None else Supervision.of(labels, attention_mask)
        whole = return_logits if return_logits is not None else (labels is None or not self.training)
        keep = slice(-logits_to_keep if logits_to_keep else None, None)
        run = self._concatenated_pass if self._concatenates() else self._cached_pass
        outputs = run(prompt, text.after(prompt.shape[1]), HeadInput(supervision, whole, keep), kwargs)
        logits = outputs.logits
        result = PriorCausalLMOutput(
            past_key_values=outputs.past_key_values if kwargs.get("use_cache") else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if supervision is not None:
            scored = logits[supervision.rows, supervision.predictors + 1] if whole else logits[0]
            nll = nn.functional.cross_entropy(scored.float(), supervision.targets, reduction="none")
            result.row_nll = nll.new_zeros(text.batch_size).index_add(0, supervision.rows, nll.detach())
            result.row_tokens = torch.bincount(supervision.rows, minlength=text.batch_size)
            count = num_items_in_batch if num_items_in_batch is not None else max(len(nll), 1)
            result.loss = nll.sum() / count
            if self.training and self.active_peft_config.prior_weight:
                result.log_prior = encoder.log_prob(prompt)
            logits = logits[:, 1:][:, keep] if whole else None
        result.logits = logits
        return result if return_dict is not False else result.to_tuple()

    def _cached_pass(self, prompt: Tensor, text: Text, head: HeadInput, options: dict[str, Any]) -> Any:
        """Prompt once at batch 1, then the text over its cache. Exact, as prompt positions never see the text."""
        cache, last = self.prompt_pass(prompt)

        def with_prompt(hidden: Tensor) -> Tensor:
            return torch.cat([last.expand(text.batch_size, 1, -1), hidden], dim=1)

        with head.of(self.base_model, with_prompt):
            return self.base_model(
                input_ids=text.input_ids,
                inputs_embeds=text.inputs_embeds,
                attention_mask=text.attention_mask,
                past_key_values=expand_cache(cache, text.batch_size),
                **self._positions(text.position_ids),
                **{"use_cache": False, **options},
            )

    def _concatenated_pass(self, prompt: Tensor, text: Text, head: HeadInput, options: dict[str, Any]) -> Any:
        """Prompt and text as one sequence, for gradient checkpointing and models without a key/value cache."""
        count = prompt.shape[1]
        position_ids = text.position_ids
        if position_ids is not None:
            before = torch.arange(count, device=position_ids.device).expand(text.batch_size, -1)
            position_ids = torch.cat([before, position_ids], dim=1)
        with self._deep_prompt(prompt), head.of(self.base_model, lambda hidden: hidden[:, count - 1 :]):
            outputs = self.base_model(
                inputs_embeds=self._prompted_embeddings(prompt, text.input_ids, text.inputs_embeds),
                attention_mask=text.attention_mask,
                **self._positions(position_ids),
                **{"use_cache": False, **options},
            )
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(hidden[:, count:] for hidden in outputs.hidden_states)
        return outputs

    def _prompted_embeddings(self, prompt: Tensor, input_ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """The embedding layer's θ before the text's embeddings, shape `[B, P + L, d]`."""
        if embeddings is None:
            embeddings = self.base_model.get_input_embeddings()(input_ids)
        return torch.cat([prompt[0].to(embeddings.dtype).expand(len(embeddings), -1, -1), embeddings], dim=1)

    def prompt_pass(self, prompt: Tensor) -> tuple[DynamicCache, Tensor]:
        """Run the virtual tokens alone.

        Args:
            prompt: θ, shape `[S, P, d]`.

        Returns:
            The key/value cache of P positions at batch 1, and the last virtual token's final hidden state
            `[1, 1, d]`, which predicts the first token of every row.
        """
        start = prompt[:1].to(self.base_model.get_input_embeddings().weight.dtype)
        with self._deep_prompt(prompt):
            outputs = self.base_model.base_model(inputs_embeds=start, use_cache=True)
        return outputs.past_key_values, outputs.last_hidden_state[:, -1:]

    def _continue(self, text: Text, cache: Any, **options: Any) -> Any:
        """One more step over a cache that holds the prompt; the caller's mask and positions don't count the prompt."""
        text = text.after(self.active_peft_config.num_virtual_tokens)
        return self.base_model(
            input_ids=text.input_ids,
            inputs_embeds=text.inputs_embeds,
            attention_mask=text.attention_mask,
            past_key_values=cache,
            **self._positions(text.position_ids),
            **options,
        )

    def _concatenates(self) -> bool:
        """Whether prompt and text must run as one sequence; the one place where that is decided."""
        return not supports_prompt_cache(self.base_model) or (
            self.training and self.base_model.is_activation_checkpointing
        )

    def _positions(self, position_ids: Tensor | None) -> dict[str, Tensor]:
        # BLOOM takes positions from the attention mask, MPT from the keys' order; neither has such an argument.
        accepted = "position_ids" in inspect.signature(self.base_model.forward).parameters
        return {"position_ids": position_ids} if accepted and position_ids is not None else {}

    def _check_text(self, text: Text, num_virtual_tokens: int) -> None:
        config = self.base_model.config.get_text_config()
        context, length = getattr(config, "max_position_embeddings", None), text.length
        if context is not None and num_virtual_tokens + length > context:
            raise ValueError(
                f"input_ids must leave room for the {num_virtual_tokens} virtual tokens in the model's context of "
                f"{context} tokens, got {length}: shorten the text or the prompt"
            )
        mask = text.attention_mask
        if config.model_type == "mpt" and mask is not None and not bool(mask[:, 0].all()):
            raise ValueError("rows must be padded on the right for MPT, whose ALiBi counts padding, got left padding")

    @contextmanager
    def _deep_prompt(self, prompt: Tensor) -> Iterator[None]:
        """Replace the hidden states of the first P positions at the input of every selected deeper layer."""
        layers = self.active_peft_config.selected_layers(self.active_peft_config.num_layers)
        handles = []
        if len(layers) > 1:
            blocks = decoder_layers(self.base_model)
            for layer, theta in zip(layers[1:], prompt[1:], strict=True):
                hook = replace_prompt(theta)
                handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # Generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """`transformers`' `generate` after the prompt; arguments and results are those of the base model."""
        base = self.base_model
        base.generation_config = self.generation_config
        cache = kwargs.get("past_key_values")
        if self._adapters_disabled or (cache is not None and cache.get_seq_length() > 0):
            return base.generate(inputs, **kwargs)
        input_ids, embeddings = kwargs.pop("input_ids", inputs), kwargs.pop("inputs_embeds", None)
        text = input_ids if embeddings is None else embeddings
        if text is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        mask = kwargs.pop("attention_mask", None)
        config = kwargs.get("generation_config") or base.generation_config
        if mask is None:
            pad = config.pad_token_id
            inferable = embeddings is None and pad is not None and pad not in _as_list(config.eos_token_id)
            mask = text.ne(pad).long() if inferable else torch.ones(text.shape[:2], device=text.device).long()
        prompt = self.prompt_encoder[self.active_adapter]()
        self._check_text(Text(input_ids, embeddings, mask, None), prompt.shape[1])
        kwargs["attention_mask"] = extended_mask(mask, prompt.shape[1])
        if self._concatenates():
            kwargs["inputs_embeds"] = self._prompted_embeddings(prompt, input_ids, embeddings)
            with self._deep_prompt(prompt):
                generated = base.generate(**kwargs)
            return generated if input_ids is None else _prepended(input_ids, generated)
        if embeddings is not None:
            # generate drops as many leading embeddings as the cache has positions
            kwargs["inputs_embeds"] = self._prompted_embeddings(prompt, None, embeddings)
        # Beams and samples are rows too; generate repeats its tensors for them but not a cache.
        repeats = max(kwargs.get(name) or getattr(config, name, None) or 1 for name in _REPEATING)
        kwargs["past_key_values"] = expand_cache(self.prompt_pass(prompt)[0], len(text) * repeats)
        # Trainer switches the cache off in the base model's configuration; here it holds the prompt.
        return base.generate(input_ids, **kwargs | {"use_cache": True})

    def get_prompt(self, batch_size: int, task_ids: None = None, max_cache_len: int | None = None) -> Any:
        """θ `[batch_size, P, d]` of a soft prompt, or the key/value cache of a deep one, as PEFT gives them."""
        prompt = self.prompt_encoder[self.active_adapter]()
        if self.active_peft_config.tuning == "soft":
            return prompt.expand(batch_size, -1, -1)
        return expand_cache(self.prompt_pass(prompt)[0], batch_size)

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save prompts as stock PEFT adapters with sidecars; see `priors_peft.hub.adapter.save_adapter`."""
        from .hub.adapter import save_adapters

        if not safe_serialization:
            raise ValueError("safe_serialization must be True, got False: prompts are saved as safetensors only")
        save_adapters(self, save_directory, selected_adapters, is_main_process)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PriorConfig | None = None,
        **kwargs: Any,
    ) -> "PriorPeftModel":
        """Load a prompt onto its base model.

        Args:
            model: The base model.
            model_id: A local folder or a Hub id.
            adapter_name: Name the prompt gets here.
            is_trainable: Whether to go on training it.
            config: A changed configuration, for a different `prior_weight` say; by default the saved one.
            **kwargs: `revision`, `subfolder`, `token`, `cache_dir` and the like, for the Hub.

        Raises:
            ValueError: The adapter is damaged, is not a soft or deep prompt, or does not fit the base model.
        """
        from .hub.adapter import read_adapter

        hub_arguments, _ = cls._split_kwargs(kwargs)
        saved = read_adapter(model_id, config=config, is_trainable=is_trainable, **hub_arguments)
        saved.check_fits(model)
        tuned = cls(model, saved.config, adapter_name, saved=saved)
        return tuned if is_trainable else tuned.eval()

    def load_adapter(
        self,
        model_id: str,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a prompt beside the others, or the state of one that is there already (as `Trainer` does to resume)."""
        from .hub.adapter import read_adapter

        hub_arguments, _ = self._split_kwargs(kwargs)
        present = self.peft_config.get(adapter_name)
        saved = read_adapter(model_id, config=present, is_trainable=is_trainable, **hub_arguments)
        saved.check_fits(self.base_model)
        if adapter_name not in self.peft_config:
            self._saved = saved
            self.add_adapter(adapter_name, saved.config)
            self.set_requires_grad(adapter_name, is_trainable)
        else:
            saved.restore(self.prompt_encoder[adapter_name], self.peft_config[adapter_name])
        return torch.nn.modules.module._IncompatibleKeys([], [])


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


def _prepended(input_ids: Tensor, generated: Any) -> Any:
    # From embeddings, generate returns the new tokens only; from ids, the ids come first.
    if isinstance(generated, Tensor):
        return torch.cat([input_ids.repeat_interleave(len(generated) // len(input_ids), 0), generated], dim=1)
    generated.sequences = _prepended(input_ids, generated.sequences)
    return generated


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]
