"""What the model itself must be asked: likelihoods under other prompts, its states and neurons.

Nothing here changes the model: another prompt stands in for the active one while it is measured, and evaluation mode
ends where it began, also after an error. Results don't depend on batch size or order, but for floating-point rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..architecture import activation_functions, decoder
from ..batch import Supervision, Text
from ..data import IGNORED, pad
from ..head import supervised_nll
from ..model import PriorPeftModel
from ..names import check_at_least
from ..passes import Prompt, continued
from .activations import pool
from .common import check_points
from .faithfulness import ablations
from .stability import line_points


class _Fixed(nn.Module):
    """Stands where a prompt encoder does and gives one prompt, exactly, whatever the encoder's coordinates."""

    theta: Tensor

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.register_buffer("theta", theta)

    def forward(self) -> Tensor:
        return self.theta


@contextmanager
def replaced_prompt(model: PriorPeftModel, prompt: Tensor) -> Iterator[None]:
    """While this lasts, the active prompt is another one; the trained one is not touched.

    Args:
        model: A model with a prompt.
        prompt: Shape `[S, P, d]`, that of the active prompt.

    Raises:
        ValueError: It has another shape, or is not finite.
    """
    name, present = model.active_adapter, active_prompt(model)
    encoder = model.prompt_encoder[name]
    prompt = check_points("prompt", prompt, "[S, P, d]")
    if prompt.shape != present.theta.shape:
        raise ValueError(
            f"prompt must have the shape {list(present.theta.shape)} of the active prompt {name!r}, got "
            f"{list(prompt.shape)}"
        )
    model.prompt_encoder[name] = _Fixed(prompt.to(present.theta))
    try:
        yield
    finally:
        model.prompt_encoder[name] = encoder


@contextmanager
def measuring(model: PriorPeftModel) -> Iterator[None]:
    """Evaluation mode without gradients, prompts run once; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), model.cached_prompt():
            yield
    finally:
        for module, training in modes:
            module.training = training


def active_prompt(model: PriorPeftModel) -> Prompt:
    with torch.no_grad():
        return model.prompt(model.active_adapter)


def device_of(model: PriorPeftModel) -> torch.device:
    return model.base_model.get_input_embeddings().weight.device


# Likelihoods.


def prompt_nll(model: PriorPeftModel, rows: Any, prompt: Tensor | None = None, batch_size: int = 16) -> float:
    """Negative log likelihood of the rows' answers under a prompt, in nats per answer token.

    Args:
        model: A model with a prompt.
        rows: Tokenized rows (`priors_peft.data.tokenize`): `input_ids`, and `labels` that are −100 outside the answer.
        prompt: In the place of the active one, shape `[S, P, d]`; the active one as it is if None.
        batch_size: Rows at once.

    Raises:
        ValueError: There is no row or no answer, or the prompt has another shape.
    """
    prompt = active_prompt(model).theta if prompt is None else prompt
    return float(prompt_nlls(model, rows, prompt[None], batch_size, "Measuring the prompt")[0])


def prompt_nlls(
    model: PriorPeftModel, rows: Any, prompts: Tensor, batch_size: int = 16, desc: str = "Measuring prompts"
) -> Tensor:
    """`prompt_nll` of many prompts of one shape.

    Args:
        model: A model with a prompt.
        rows: As in `prompt_nll`.
        prompts: Shape `[K, S, P, d]`.
        batch_size: Rows at once.
        desc: What the progress bar says.

    Returns:
        Nats per answer token, float64, shape `[K]`.
    """
    prompts, batches = check_points("prompts", prompts, "[K, S, P, d]"), _batches(model, rows, batch_size)
    losses = []
    with measuring(model), tqdm(desc=desc, total=len(prompts) * len(batches), delay=2, leave=False) as progress:
        for prompt in prompts:
            with replaced_prompt(model, prompt):
                total, count = 0.0, 0
                for batch in batches:
                    outputs = model(**batch, return_logits=False)
                    total += float(outputs.row_nll.double().sum())
                    count += int(outputs.row_tokens.sum())
                    progress.update()
                losses.append(total / count)
    return torch.tensor(losses, dtype=torch.float64)


def no_prompt_nll(model: PriorPeftModel, rows: Any, batch_size: int = 16) -> float:
    """The same of the base model alone, in nats per answer token; arguments as in `prompt_nll`.

    Raises:
        ValueError: There is no row or no answer, or an answer has no token before it.
    """
    total, count = 0.0, 0
    batches = _batches(model, rows, batch_size)
    with measuring(model), tqdm(desc="No prompt", total=len(batches), delay=2, leave=False) as progress:
        for batch in batches:
            supervision = Supervision.of(batch["labels"], batch["attention_mask"])
            if bool((supervision.predictors < 0).any()):
                raise ValueError(
                    "rows must begin with a token that is no answer: without a prompt nothing predicts it"
                )
            text = Text(batch["input_ids"], None, batch["attention_mask"], None)
            states = continued(decoder(model.base_model), text.after(0), None, {}).last_hidden_state
            states = states[supervision.rows, supervision.predictors]
            total += float(supervised_nll(model.base_model, states, supervision.targets).double().sum())
            count += len(supervision.targets)
            progress.update()
    return total / count


def ablation_nlls(model: PriorPeftModel, rows: Any, replacement: Tensor | None = None, batch_size: int = 16) -> Tensor:
    """The loss without what each virtual token has learnt, for `faithfulness.rank_ablations`.

    Args:
        model: A model with a prompt.
        rows: As in `prompt_nll`.
        replacement: What stands in for a virtual token, at every selected layer: shape `[S, d]`, or `[S, P, d]` where
            each has its own. The locations of the layers' priors if None, as `faithfulness.ablations` explains.
        batch_size: Rows at once.

    Returns:
        Nats per answer token without virtual token p, float64, shape `[P]`.
    """
    present = active_prompt(model)
    if replacement is None:
        priors = model.prompt_encoder[model.active_adapter].priors
        places = [prior.loc.expand(present.length, -1) for prior in priors]
    elif len(replacement) != len(present.theta):
        raise ValueError(
            f"replacement must have one entry for each of the {len(present.theta)} selected layers, got shape "
            f"{list(replacement.shape)}"
        )
    else:
        places = list(replacement)
    changed = [ablations(theta, place) for theta, place in zip(present.theta, places, strict=True)]
    return prompt_nlls(model, rows, torch.stack(changed, dim=1), batch_size, "Leaving out virtual tokens")


def line_nlls(
    model: PriorPeftModel, rows: Any, start: Tensor, end: Tensor, count: int = 11, batch_size: int = 16
) -> Tensor:
    """Losses along the straight line between two prompts, for `stability.barrier`.

    Args:
        model: A model with a prompt of their shape.
        rows: As in `prompt_nll`.
        start: Shape `[S, P, d]`.
        end: The same shape.
        count: Points, both ends among them.
        batch_size: Rows at once.

    Returns:
        Nats per answer token, float64, shape `[count]`.
    """
    return prompt_nlls(model, rows, line_points(start, end, count), batch_size, "Walking from prompt to prompt")


def _batches(model: PriorPeftModel, rows: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """Rows of about one length together, padded on the right, on the model's device."""
    check_at_least("batch_size", batch_size, 1)
    rows = list(rows)
    for number, row in enumerate(rows):
        if not {"input_ids", "labels"} <= set(row):
            raise ValueError(
                f"rows must be tokenized, with input_ids and labels, got {sorted(row)} in row {number}: pass "
                "priors_peft.data.tokenize(rows, tokenizer)"
            )
    if not any(label != IGNORED for row in rows for label in row["labels"]):
        raise ValueError(f"rows must hold an answer (labels that are not {IGNORED}), got {len(rows)} rows without any")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    batches = []
    for first in range(0, len(order), batch_size):
        chunk = [rows[index] for index in order[first : first + batch_size]]
        labels = pad([list(row["labels"]) for row in chunk], IGNORED, "right")
        batches.append(_padded(model, [row["input_ids"] for row in chunk]) | {"labels": labels.to(device_of(model))})
    return batches


def _padded(model: PriorPeftModel, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    lists = [list(row) for row in ids]
    parts = {"input_ids": pad(lists, 0, "right"), "attention_mask": pad([[1] * len(row) for row in lists], 0, "right")}
    return {name: part.to(device_of(model)) for name, part in parts.items()}


# Inside the model.


def task_activations(
    model: PriorPeftModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    with_prompt: bool = True,
    how: str = "mean",
    batch_size: int = 16,
    skip: int = 0,
) -> dict[int, Tensor]:
    """One vector a row at each layer: the text's hidden states pooled, padding and virtual tokens left out.

    Args:
        model: A model with a prompt.
        rows: Token ids of each row. To compare tasks, cut them with `activations.match_lengths` first: a mean over
            more tokens is shorter, and would tell tasks apart by their lengths alone.
        layers: As in `PriorConfig`: l is the input of decoder layer l, 0 the embeddings; the number of layers is what
            the head gets. Negative numbers count from there.
        with_prompt: Whether the active prompt comes before the text.
        how: As in `activations.pool`.
        batch_size: Rows at once.
        skip: How many tokens at the start of each row don't count. Where no prompt comes before it, a text's first token is
            an attention sink, whose state can outweigh all others together.

    Returns:
        For each of `layers`, as it was asked for, a float32 tensor `[n, d]` in the rows' order, on the CPU.

    Raises:
        ValueError: There is no row, a row has no token, or a layer does not exist.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("the number of rows", len(rows), 1)
    depth = model.base_model.config.get_text_config().num_hidden_layers
    wrong = [layer for layer in layers if not -depth - 1 <= layer <= depth]
    if wrong or not layers:
        raise ValueError(f"layers must be among {-depth - 1} to {depth} for this model, got {wrong or 'none'}")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    chunks = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    with measuring(model), tqdm(chunks, "Hidden states", delay=2, leave=False) as progress:
        for chunk in progress:
            batch = _padded(model, [rows[index] for index in chunk])
            if with_prompt:
                states = model(**batch, output_hidden_states=True, logits_to_keep=1).hidden_states
            else:
                text = Text(batch["input_ids"], None, batch["attention_mask"], None)
                options = {"output_hidden_states": True}
                states = continued(decoder(model.base_model), text.after(0), None, options).hidden_states
            counted = batch["attention_mask"].clone()
            counted[:, :skip] = 0
            for layer, pooled in parts.items():
                pooled.append(pool(states[layer], counted, how).cpu())
    back = torch.tensor(order).argsort()
    return {layer: torch.cat(pooled)[back] for layer, pooled in parts.items()}


def neuron_activations(model: PriorPeftModel, prompts: Tensor, token_id: int | None = None) -> Tensor:
    """Which feed-forward neurons prompts activate, for `transfer.activation_overlap`.

    Su et al. (2022), "On Transferability of Prompt Tuning for Natural Language Processing" (NAACL): the prompt and no
    data goes through the model, and the neurons are read at one token that is the same for all prompts, RoBERTa's
    mask or the token that starts T5's decoder (`activate_neuron_T5.py` in github.com/thunlp/Prompt-Transferability).
    Here it is the token that starts a text, after the prompt. A neuron is active where its activation function's
    value is above 0; of a gated layer that is the gate's.

    Args:
        model: A model with a prompt.
        prompts: Of the active prompt's shape, `[N, S, P, d]`.
        token_id: The token after the prompt; the one that starts a text if None.

    Returns:
        Boolean, on the CPU, shape `[N, layers, neurons]`.

    Raises:
        ValueError: The architecture's activation functions could not be found, or the prompts have another shape.
    """
    prompts = check_points("prompts", prompts, "[N, S, P, d]")
    config = model.base_model.config.get_text_config()
    if token_id is None:
        starts = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")]
        token_id = next((found for found in starts if isinstance(found, int)), 0)
    last: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        # The prompt's own pass, where there is one, comes before the token's.
        return lambda module, inputs, output: last.__setitem__(layer, (output.flatten(0, -2)[-1] > 0).cpu())

    functions = activation_functions(model.base_model)
    handles = [function.register_forward_hook(keep(layer)) for layer, function in enumerate(functions)]
    active = []
    try:
        with measuring(model), tqdm(prompts, "Neurons", delay=2, leave=False) as progress:
            for prompt in progress:
                with replaced_prompt(model, prompt):
                    model(input_ids=torch.tensor([[token_id]], device=device_of(model)), logits_to_keep=1)
                active.append(torch.stack([last[layer] for layer in range(len(functions))]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(active)
