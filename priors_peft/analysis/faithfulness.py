"""Is a prompt what its nearest tokens say, and which of its virtual tokens matter? The caller measures the losses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..names import check_at_least
from .common import Ids, Result, check_points, check_same_width


def harden(prompt: Tensor, vocabulary: Tensor, ids: Ids) -> Tensor:
    """The prompt read as text: each virtual token replaced by the embedding of a vocabulary token.

    Args:
        prompt: Shape `[P, d]`.
        vocabulary: Embeddings as the model looks them up, shape `[V, d]`.
        ids: For each virtual token the id that stands for it, shape `[P]`: the first column of
            `nearest_tokens(...).ids`.

    Returns:
        Shape `[P, d]`, in the prompt's dtype and on its device.

    Raises:
        ValueError: There is not one id for each virtual token, or an id is not in the vocabulary.
    """
    prompt, vocabulary = check_points("prompt", prompt, "[P, d]"), check_points("vocabulary", vocabulary, "[V, d]")
    check_same_width("prompt", prompt, "vocabulary", vocabulary)
    tokens = torch.as_tensor(ids)
    if tokens.is_floating_point() or tokens.shape != prompt.shape[:1]:
        raise ValueError(
            f"ids must be integers of shape [{len(prompt)}], one for each virtual token, got {tokens.dtype} "
            f"{list(tokens.shape)}: pass the first column of the nearest tokens' ids"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= len(vocabulary):
        raise ValueError(
            f"ids must be rows of the vocabulary, 0 to {len(vocabulary) - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}"
        )
    return vocabulary[tokens.to(vocabulary.device)].to(prompt)


@dataclass(frozen=True, eq=False)
class Waywardness(Result):
    """What is lost by reading a prompt as its nearest tokens. Losses are in nats per token.

    Attributes:
        prompt_loss: With the prompt.
        hard_loss: With its nearest tokens in its place.
        no_prompt_loss: With neither, or None.
        lost: `hard_loss - prompt_loss`, nats per token: 0 is a prompt that is what it reads as.
        gained: `no_prompt_loss - prompt_loss`, what the prompt is worth, or None.
        lost_share: `lost / gained`: 1 where the reading is worth nothing, above where it is worse than nothing. None
            where the prompt itself gains nothing.
    """

    prompt_loss: float
    hard_loss: float
    no_prompt_loss: float | None
    lost: float
    gained: float | None
    lost_share: float | None


def waywardness(prompt_loss: float, hard_loss: float, no_prompt_loss: float | None = None) -> Waywardness:
    """How far a prompt does something else than its nearest tokens say.

    Khashabi et al. (2022), "Prompt Waywardness", find prompts that solve a task while they project onto the text of
    another: nearest tokens alone are no evidence of what a prompt does. This figure asks the task itself.

    Args:
        prompt_loss: Mean loss of the task with the prompt, nats per token.
        hard_loss: The same with the prompt `harden`ed, on the same rows.
        no_prompt_loss: The same without a prompt, which tells how much there was to lose.

    Raises:
        ValueError: A loss is not finite.
    """
    given = {"prompt_loss": prompt_loss, "hard_loss": hard_loss, "no_prompt_loss": no_prompt_loss}
    for name, value in given.items():
        if value is not None:
            _checked_losses(name, [value])
    lost = float(hard_loss) - float(prompt_loss)
    gained = None if no_prompt_loss is None else float(no_prompt_loss) - float(prompt_loss)
    return Waywardness(
        prompt_loss=float(prompt_loss),
        hard_loss=float(hard_loss),
        no_prompt_loss=None if no_prompt_loss is None else float(no_prompt_loss),
        lost=lost,
        gained=gained,
        lost_share=lost / gained if gained is not None and gained > 0 else None,
    )


def ablations(prompt: Tensor, replacement: Tensor) -> Tensor:
    """The prompt with one virtual token replaced at a time: `[p]` is without what virtual token p has learnt.

    Pass the prior's location as the replacement. It is what a virtual token is expected to be before training, so
    that the loss tells what its training is worth. Leaving the token out would move all later positions (and the
    text's) by one; zeros lie where no embedding does and layer norms blow up what little is there.

    Args:
        prompt: Shape `[P, d]`.
        replacement: The prior's `loc`, shape `[d]`, or `[P, d]` where each virtual token has its own.

    Returns:
        Shape `[P, P, d]`.
    """
    prompt = check_points("prompt", prompt, "[P, d]")
    if isinstance(replacement, Tensor) and replacement.ndim == 1:
        replacement = replacement.expand(prompt.shape[0], -1)
    replacement = check_points("replacement", replacement, "[P, d]").to(prompt)
    if replacement.shape != prompt.shape:
        raise ValueError(
            f"replacement must have shape [{prompt.shape[1]}] or {list(prompt.shape)}, got {list(replacement.shape)}: "
            "pass the loc of the prompt's prior"
        )
    ablated = prompt.repeat(len(prompt), 1, 1)
    places = torch.arange(len(prompt))
    ablated[places, places] = replacement
    return ablated


@dataclass(frozen=True, eq=False)
class AblationRanking(Result):
    """Virtual tokens by what they are worth.

    Attributes:
        loss: With the whole prompt, nats per token.
        losses: Without each virtual token, shape `[P]`.
        importance: `losses - loss`: what each is worth, in nats per token; below 0 it does harm. Shape `[P]`.
        order: Virtual tokens, the most important first, the earlier one among equals. Shape `[P]`.
    """

    loss: float
    losses: Tensor
    importance: Tensor
    order: Tensor


def rank_ablations(loss: float, losses: Sequence[float] | Tensor) -> AblationRanking:
    """Rank virtual tokens by the loss without each.

    Args:
        loss: Mean loss of the task with the whole prompt, nats per token.
        losses: The same with each of the `ablations`, on the same rows, shape `[P]`.

    Raises:
        ValueError: There is no loss, or one is not finite.
    """
    whole, without = _checked_losses("loss", [loss]), _checked_losses("losses", losses)
    importance = without - whole
    return AblationRanking(float(whole), without, importance, importance.argsort(descending=True, stable=True))


def _checked_losses(name: str, losses: Sequence[float] | Tensor) -> Tensor:
    values = torch.as_tensor(losses, dtype=torch.float64).cpu()
    check_at_least(f"the number of {name}", values.numel(), 1, "measure at least one")
    if values.ndim != 1 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must be finite, in nats per token, got {losses}")
    return values
