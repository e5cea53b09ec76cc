"""The LM head on chosen hidden states, with whatever the architecture does after it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .architecture import decoder
from .sharding import is_sharded


# Logits of that many elements at once: 64 MiB in float32, and as much again for their gradient.
MOST_LOGITS = 2**24


class _Hidden(BaseModelOutputWithPast):
    """What a model's layers give, for whatever a head asks of it: cross-attentions, router logits."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `[B, L, V]` of final hidden states `[B, L, d]`.

    The model's own forward runs, without its layers: so scaled and soft-capped logits come out as they should.
    """
    # A part of a longer sequence is not: a linear layer would copy its weight for each row.
    hidden = hidden.contiguous()
    layers = decoder(model)
    shadowed, calls = layers.__dict__.get("forward"), []  # accelerate and others put their own there

    def forward(*arguments: Any, **options: Any) -> _Hidden:
        calls.append(layers)
        return _Hidden(last_hidden_state=hidden)

    layers.forward = forward
    try:
        logits = model(inputs_embeds=hidden, use_cache=False).logits
    finally:
        del layers.forward
        if shadowed is not None:
            layers.forward = shadowed
    if not calls:
        raise RuntimeError(
            f"model must run its layers through {type(layers).__name__}, which {type(model).__name__} does not: please report it"
        )
    return logits


def supervised_nll(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood of each target, in nats, shape `[N]`, from the states `[N, d]` that predict them."""
    if is_sharded(model):
        # Processes must use the head equally often, and its gradient inside a forward pass would set off their hooks.
        logits = logits_of(model, hidden.unsqueeze(0)).squeeze(0)
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    most = max(1, MOST_LOGITS // model.config.get_text_config().vocab_size)
    return _NLL.apply(hidden, targets, model, -(-len(hidden) // most))


class _NLL(torch.autograd.Function):
    """Takes the gradient while logits are there: they need not be kept, and their gradient takes their softmax's place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, model: PreTrainedModel, chunks: int) -> Tensor:
        wanted, chunks = ctx.needs_input_grad[0], max(1, chunks)
        values, gradients = [hidden.new_zeros(0, dtype=torch.float32)], [hidden[:0]]
        for chunk, part in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
            with torch.set_grad_enabled(wanted):
                chunk = chunk.detach().requires_grad_(wanted)
                # A view, as the gradient of a selection would be as large as all of it, and new.
                logits = logits_of(model, chunk.unsqueeze(0)).squeeze(0)
            scores = logits.detach().float().log_softmax(-1)
            values.append(-scores.gather(1, part[:, None]).squeeze(1))
            if wanted:
                upstream = scores.exp_()
                upstream[torch.arange(len(part), device=part.device), part] -= 1
                gradients += torch.autograd.grad(logits, chunk, upstream.to(logits.dtype))
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return (gradients * upstream[:, None]).to(gradients.dtype), None, None, None
