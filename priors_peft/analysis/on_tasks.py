"""What takes the model and data: faithfulness of prompts, lines between runs, activations of tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import prompts_of, tokenize
from ..model import PriorPeftModel
from ..priors.reference import text_states
from .activations import match_lengths, separability
from .description import describe
from .faithfulness import rank_ablations, waywardness
from .measure import ablation_nlls, line_nlls, no_prompt_nll, prompt_nll, task_activations
from .members import Member
from .projected import rounded
from .projection import pca


# Of a row's end, to tell points apart in a picture.
_LABEL = 60
_FOLDS = 5


class OnTasks:
    """Adapters on a model, measured on rows; what is measured once is kept.

    Args:
        members: The adapters.
        model: Their base model.
        tokenizer: Its tokenizer.
        tasks: Rows by task, maybe none.
        batch_size: Rows at once.
        loss_rows: Most rows of a task that losses are measured on; all if None.
    """

    def __init__(
        self,
        members: Sequence[Member],
        model: Any,
        tokenizer: Any,
        tasks: Mapping[str, Any],
        batch_size: int,
        loss_rows: int | None = None,
    ) -> None:
        self._members, self._tokenizer, self._tasks, self._batch_size = members, tokenizer, tasks, batch_size
        first = members[0].source.saved
        self._model = PriorPeftModel(model, first.config, "0", tokenizer=tokenizer, saved=first).eval()
        for index, member in enumerate(members[1:], start=1):
            self._model.load_adapter(member.source.path, str(index))
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = context and context - max(member.source.prompt.shape[1] for member in members)
        self._rows = {name: tokenize(rows, tokenizer, room) for name, rows in tasks.items()}
        self._measured = {
            name: [rows[place] for place in spread(len(rows), loss_rows or len(rows))]
            for name, rows in self._rows.items()
        }
        self._nlls: dict[int, float] = {}
        self._without: dict[str, float] = {}

    def task_of(self, index: int) -> str:
        """The task that an adapter is measured on: its own if there is data for it, else the first."""
        own = self._members[index].task
        return own if own in self._rows else next(iter(self._rows))

    def nll(self, index: int) -> float:
        """Nats per answer token with an adapter's prompt."""
        if index not in self._nlls:
            self._nlls[index] = prompt_nll(self._active(index), self._of(index), batch_size=self._batch_size)
        return self._nlls[index]

    def line(self, start: int, end: int) -> Tensor:
        """Nats per answer token along the straight line between two adapters' prompts."""
        one, other = (self._members[index].source.prompt for index in (start, end))
        return line_nlls(self._active(start), self._of(start), one, other, batch_size=self._batch_size)

    def of_adapter(self, index: int, describes: bool) -> dict[str, Any]:
        """An adapter's entries `faithfulness`, `description` and `description_of_draw`."""
        member, model = self._members[index], self._active(index)
        found: dict[str, Any] = {"faithfulness": None, "description": None, "description_of_draw": None}
        if describes:
            random = torch.stack([null.draws[0] for null in member.nulls])
            found["description"] = describe(model, self._tokenizer)
            found["description_of_draw"] = describe(model, self._tokenizer, random)
        if self._rows:
            found["faithfulness"] = self._faithfulness(index)
        return found

    def _faithfulness(self, index: int) -> dict[str, Any]:
        member, model, rows, task = self._members[index], self._active(index), self._of(index), self.task_of(index)
        source, size = member.source, self._batch_size
        if task not in self._without:
            self._without[task] = no_prompt_nll(model, rows, size)
        # At deeper layers too what the tokens themselves give there, so that the whole prompt is that text.
        hard = torch.stack(text_states(model.base_model, source.layers, member.near.ids[:, 0])).cpu()
        count = source.prompt.shape[1]
        places = torch.stack([prior.loc.expand(count, -1) for prior in member.priors])
        whole, hardened = self.nll(index), prompt_nll(model, rows, hard, size)
        ranking = rank_ablations(whole, ablation_nlls(model, rows, places, size))
        return {
            "task": task,
            "metric": "nll",
            "rows": len(rows),
            "prompt_nll": whole,
            "hardened_nll": hardened,
            "no_prompt_nll": self._without[task],
            "initial_nll": None if source.initial is None else prompt_nll(model, rows, source.initial, size),
            "waywardness": waywardness(whole, hardened, self._without[task]),
            "ablations": [
                {"index": token, "nll": ranking.losses[token], "increase": ranking.importance[token]}
                for token in ranking.order.tolist()
            ],
        }

    def activations(self, layers: Sequence[int] | None, seed: int, left_out: dict[str, str]) -> dict[str, Any] | None:
        """Tasks as clusters of their rows' hidden states, without a prompt and with one of each task."""
        if len(self._rows) < 2:
            left_out["activations"] = "they need two tasks, and one was given"
            return None
        if min(map(len, self._rows.values())) < _FOLDS:
            left_out["activations"] = f"they need {_FOLDS} rows of each task"
            return None
        depth = self._model.base_model.config.get_text_config().num_hidden_layers
        chosen = sorted({depth // 3, 2 * depth // 3, depth}) if layers is None else list(layers)
        before = {
            name: prompts_of(*(list(rows[column]) for column in ("input_ids", "attention_mask", "labels")))
            for name, rows in self._rows.items()
        }
        matched = match_lengths(before)
        labels = {
            name: [row["prompt"][-_LABEL:] for row, _ in zip(self._tasks[name], rows, strict=False)]
            for name, rows in matched.items()
        }
        cut = [row for rows in matched.values() for row in rows]
        prompts = {self.task_of(index): index for index in reversed(range(len(self._members)))}
        found = []
        for index in (None, *sorted(prompts.values())):
            model = self._active(index or 0)
            # The first token's state is an attention sink's, the same in all rows, where no prompt comes before it.
            skip = int(min(map(len, cut)) > 1)
            states = task_activations(model, cut, chosen, index is not None, batch_size=self._batch_size, skip=skip)
            for layer, points in states.items():
                name = None if index is None else self._members[index].source.name
                found.append({"layer": layer % (depth + 1), "with_prompt": index is not None, "adapter": name})
                found[-1] |= _separated(points, labels, seed)
        return {"layers": sorted(found, key=lambda one: one["layer"])}

    def _active(self, index: int) -> PriorPeftModel:
        self._model.set_adapter(str(index), inference_mode=True)
        return self._model

    def _of(self, index: int) -> Any:
        return self._measured[self.task_of(index)]


def spread(total: int, count: int) -> list[int]:
    """Places of at most `count` rows, spread over `total`, which may be sorted."""
    count = min(count, total)
    return [place * total // count for place in range(count)]


def _separated(points: Tensor, labels: dict[str, list[str]], seed: int) -> dict[str, Any]:
    sizes = [len(rows) for rows in labels.values()]
    parts = dict(zip(labels, points.split(sizes), strict=True))
    classes = [name for name, rows in labels.items() for _ in rows]
    plane = pca(parts)
    return separability(points, classes, _FOLDS, seed).to_dict() | {
        "explained_variance": plane.explained_variance,
        "groups": [{"name": name, "points": rounded(plane.points[name]), "labels": labels[name]} for name in labels],
    }
