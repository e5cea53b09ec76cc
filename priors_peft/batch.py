"""One batch: its text after the prompt, and which tokens are supervised."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Text:
    """What comes after the prompt: `input_ids` `[B, L]` or `inputs_embeds` `[B, L, d]`, mask and positions `[B, L]`."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None

    @property
    def batch_size(self) -> int:
        return len(self._given)

    @property
    def length(self) -> int:
        return self._given.shape[1]

    @property
    def _given(self) -> Tensor:
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds  # type: ignore[return-value]

    def of(self, rows: list[int]) -> "Text":
        """Some of the rows."""
        parts = (self.input_ids, self.inputs_embeds, self.attention_mask, self.position_ids)
        return Text(*(None if part is None else part[rows] for part in parts))

    def repeated(self, count: int) -> "Text":
        """All rows `count` times over, one time after another."""
        return self.of(list(range(self.batch_size)) * count)

    def after(self, count: int) -> "Text":
        """The same text after `count` virtual tokens: all rows see them, and positions go on from them."""
        positions, mask = self.position_ids, self.attention_mask
        if positions is None and mask is not None:
            # Padding on either side is skipped, so that a row gives what it gives alone.
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -self.length :]
        positions = None if positions is None else positions + count
        mask = None if mask is None else extended_mask(mask, count)
        return Text(self.input_ids, self.inputs_embeds, mask, positions)

    def check_fits(self, model: PreTrainedModel, num_virtual_tokens: int) -> None:
        """Raise `ValueError` if the text and the prompt don't fit the model's context or its way of padding."""
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and num_virtual_tokens + self.length > context:
            raise ValueError(
                f"input_ids must leave room for the {num_virtual_tokens} virtual tokens in the model's context of "
                f"{context} tokens, got {self.length}: shorten the text or the prompt"
            )
        mask = self.attention_mask
        if config.model_type == "mpt" and mask is not None and not bool(mask[:, 0].all()):
            raise ValueError("rows must be padded on the right for MPT, whose ALiBi counts padding, got left padding")


def extended_mask(attention_mask: Tensor, count: int) -> Tensor:
    """The mask with `count` positions before it that all rows see."""
    return nn.functional.pad(attention_mask, (count, 0), value=1)


@dataclass(frozen=True)
class Supervision:
    """Which tokens of a batch are supervised.

    Args:
        rows: Row of each supervised token, shape `[N]`.
        predictors: Position in the row that predicts it, −1 for the last virtual token, shape `[N]`.
        targets: Token ids, shape `[N]`.
    """

    rows: Tensor
    predictors: Tensor
    targets: Tensor

    def repeated(self, count: int, batch_size: int) -> "Supervision":
        """That of `batch_size` rows that are there `count` times over, one time after another."""
        rows = torch.cat([self.rows + number * batch_size for number in range(count)])
        return Supervision(rows, self.predictors.repeat(count), self.targets.repeat(count))

    @classmethod
    def of(cls, labels: Tensor, attention_mask: Tensor | None) -> "Supervision":
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        predictors = columns - 1
        if attention_mask is not None:
            # After left padding it is the prompt, not a padded position, that comes before the first token.
            padded = attention_mask[rows, predictors.clamp_min(0)] == 0
            predictors = predictors.masked_fill(padded, -1)
        return cls(rows, predictors, labels[rows, columns])
