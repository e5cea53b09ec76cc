"""A batch as one sequence without padding: every row attends to what it shares with the others, and to itself."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .architecture import decoder
from .batch import Supervision, Text


NAME = "priors_peft_packed"


@dataclass(frozen=True)
class Stretch:
    """A run of `length` positions that see an earlier stretch, if there is one to share, and, causally, themselves."""

    length: int
    shared: int | None = None


@dataclass(frozen=True)
class Run:
    """`count` stretches of one length after one another, which share the same run, if any."""

    count: int
    keys: int
    queries: int
    shared: int | None


@dataclass
class Layout:
    """Which stretch of a packed sequence attends to what.

    Args:
        stretches: In the order of the sequence.
        cached: How many of the first stretch's keys come from a cache: they have no queries.
        calls: How many layers have attended by it.
    """

    stretches: list[Stretch]
    cached: int
    calls: int = 0
    _tensors: dict[Any, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[int]:
        """Number of keys of each stretch."""
        return [stretch.length for stretch in self.stretches]

    @property
    def queries(self) -> list[int]:
        """Number of queries of each stretch."""
        return [self.stretches[0].length - self.cached, *self.keys[1:]]

    @property
    def seen(self) -> list[int]:
        """Number of keys that each stretch's last position sees."""
        keys = self.keys
        return [s.length + (0 if s.shared is None else keys[s.shared]) for s in self.stretches]

    @cached_property
    def runs(self) -> list[Run]:
        """Stretches of one length together, so that they can attend in one call."""
        runs: list[Run] = []
        run_of: list[int] = []
        for stretch, queries in zip(self.stretches, self.queries, strict=True):
            shared = None if stretch.shared is None else run_of[stretch.shared]
            run = Run(1, stretch.length, queries, shared)
            if shared is not None and replace(runs[-1], count=1) == run:
                runs[-1] = replace(run, count=runs[-1].count + 1)
            else:
                runs.append(run)
            run_of.append(len(runs) - 1)
        return runs

    def triangle(self, window: int | None, like: Tensor) -> Tensor:
        """Additive causal mask for as many positions as any stretch sees; the masks of all are parts of it."""
        key = ("triangle", window, like.device)
        if key not in self._tensors:
            position = torch.arange(max(self.seen), device=like.device)
            self._tensors[key] = _additive(_visible(position[:, None], position, window), like)
        return self._tensors[key]

    def padded(self, window: int | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stretches as the rows of one batch: query and key indices, where queries go back to, additive mask."""
        device = like.device  # layers may lie on several
        if device not in self._tensors:
            every = [range(start, stop) for start, stop in pairwise(accumulate(self.keys, initial=0))]
            seen = [
                [*(() if s.shared is None else every[s.shared]), *own]
                for s, own in zip(self.stretches, every, strict=True)
            ]
            asked = [[key - self.cached for key in own if key >= self.cached] for own in every]
            queries, keys = (pad_sequence([torch.tensor(row) for row in part], True) for part in (asked, seen))
            real = torch.arange(queries.shape[1]) < torch.tensor(self.queries)[:, None]
            first = torch.tensor(self.seen) - torch.tensor(self.queries)
            parts = (queries.long(), keys, real.flatten().nonzero()[:, 0], first)
            self._tensors[device] = [part.to(device) for part in parts]
        queries, keys, places, first = self._tensors[device]
        if (window, device) not in self._tensors:
            position = first[:, None, None] + torch.arange(queries.shape[1], device=device)[:, None]
            visible = _visible(position, torch.arange(keys.shape[1], device=device), window)
            self._tensors[window, device] = _additive(visible, like)[:, None]
        return queries, keys, places, self._tensors[window, device]


def _visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    visible = key <= query
    return visible if window is None else visible & (query - key < window)


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~visible, torch.finfo(like.dtype).min
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence: queries `[1, H, T, D]`, the result `[1, T, H, D]`.

    It hands each stretch to the model's own attention, so whatever that does (soft-capping, sinks, windows) happens.
    """
    layout, own = _present.get()
    layout.calls += 1
    inner = _own_attention(own, type(module).__module__)
    # On a CPU a call costs little and padding much, on an accelerator it is the other way round.
    through = _by_length if query.device.type == "cpu" else _at_once
    return through(partial(inner, module, **options), query, key, value, layout, options.get("sliding_window")), None


def _by_length(
    inner: Callable, query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None
) -> Tensor:
    triangle = layout.triangle(window, query)
    # Split, as each slice's gradient would be as large as the whole.
    queries = query.split([run.count * run.queries for run in layout.runs], dim=2)
    keys, values = (part.split([run.count * run.keys for run in layout.runs], dim=2) for part in (key, value))
    outputs = []
    for index, run in enumerate(layout.runs):
        if run.queries:
            seen_keys, seen_values = (
                _rows(of[index], run.count)
                if run.shared is None
                else torch.cat([of[run.shared].expand(run.count, -1, -1, -1), _rows(of[index], run.count)], dim=2)
                for of in (keys, values)
            )
            seen = seen_keys.shape[2]
            mask = triangle[None, None, seen - run.queries : seen, :seen]
            outputs.append(inner(_rows(queries[index], run.count), seen_keys, seen_values, mask)[0].flatten(0, 1))
    return torch.cat(outputs)[None]


def _rows(part: Tensor, count: int) -> Tensor:
    """`[1, H, count · L, D]` as `[count, H, L, D]`."""
    return part if count == 1 else part[0].unflatten(1, (count, -1)).transpose(0, 1)


def _at_once(inner: Callable, query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None) -> Tensor:
    queries, keys, places, mask = layout.padded(window, query)
    parts = (part[0][:, index].transpose(0, 1) for part, index in ((query, queries), (key, keys), (value, keys)))
    return inner(*parts, mask)[0].flatten(0, 1)[places][None]


@cache
def _own_attention(attention: str, module: str) -> Callable:
    return sdpa_attention_forward if attention == "sdpa" else sys.modules[module].eager_attention_forward


AttentionInterface.register(NAME, attend)
# Not a keyword argument of the model's forward: not all architectures hand these on to their layers.
_present: ContextVar[tuple[Layout, str]] = ContextVar("the packed sequence's layout and the model's own attention")


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether rows can run as one sequence: positions can be given, and attention is transformers' and replaceable."""
    config = model.config.get_text_config()
    return (
        getattr(model, "_supports_attention_backend", False)
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "attention_chunk_size", None) is None
        and "position_ids" in inspect.signature(decoder(model).forward).parameters
    )


class Unpackable(Exception):
    """The model has layers that do not attend by a layout, so packed rows would see each other."""


@contextmanager
def packed_attention(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Have the model attend by a layout while this lasts.

    Raises:
        Unpackable: Not every layer did.
    """
    config = model.config.get_text_config()
    own = config._attn_implementation
    token = _present.set((layout, own))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _present.reset(token)
    if layout.calls != config.num_hidden_layers:
        raise Unpackable


@dataclass(frozen=True)
class Packed:
    """A batch's text as one sequence.

    Args:
        tokens: Where each of the sequence's text tokens stands in the flattened batch, a tensor for each prompt.
        position_ids: Positions of the whole sequence, shape `[1, T]`.
        stretches: For the `Layout`.
        starts: Where each prompt starts.
        predictors: Where the hidden state that predicts each supervised token stands, shape `[N]`.
    """

    tokens: list[Tensor]
    position_ids: Tensor
    stretches: list[Stretch]
    starts: list[int]
    predictors: Tensor


def pack(text: Text, supervision: Supervision, prompts: list[tuple[int, list[int]]]) -> Packed:
    """Lay a batch out: each prompt, the text its rows begin with alike, then what each row goes on with.

    Positions that predict nothing supervised, padding and what follows the last answer, are left out. Tokens that all
    rows begin with see the same text, so they are computed once, as the prompt is.

    Args:
        text: Its mask and positions without the prompt.
        supervision: Whose predictors are to be found.
        prompts: Number of virtual tokens and rows of each prompt.
    """
    kept = _needed(text, supervision)
    rank = kept.long().cumsum(1) - 1
    lengths = kept.sum(1).tolist()
    rows = kept.flatten().nonzero()[:, 0].split(lengths)
    common = _common_start(text, rows, lengths)
    stretches: list[Stretch] = []
    tokens, positions, starts = [], [], []
    row_start, group_start = torch.zeros(2, len(lengths), dtype=torch.long).unbind()
    cursor = 0
    for count, members in prompts:
        members = sorted(members, key=lambda row: lengths[row])  # rows of one length can attend in one call
        parts = [rows[members[0]][:common], *(rows[row][common:] for row in members)]
        tokens.append(torch.cat(parts))
        start, shared = cursor, cursor + count + common
        starts.append(start)
        cursor, of_prompt = shared, len(stretches)
        stretches.append(Stretch(count + common))
        for row, part in zip(members, parts[1:], strict=True):
            group_start[row], row_start[row] = start + count, cursor
            if len(part):
                stretches.append(Stretch(len(part), of_prompt))
            cursor += len(part)
        given = rank if text.position_ids is None else text.position_ids
        virtual = torch.arange(count, device=rank.device)
        positions += [virtual, given.expand_as(rank).flatten()[tokens[-1]] + count]
    of_rows = rank[supervision.rows, supervision.predictors.clamp_min(0)]
    of_rows = of_rows.masked_fill(supervision.predictors < 0, -1)
    group_start, row_start = (part.to(rank.device)[supervision.rows] for part in (group_start, row_start))
    predictors = torch.where(of_rows < common, group_start + of_rows, row_start + of_rows - common)
    return Packed(tokens, torch.cat(positions)[None], stretches, starts, predictors)


def _needed(text: Text, supervision: Supervision) -> Tensor:
    """Which tokens `[B, L]` are text and come before a supervised token of their row."""
    device = supervision.rows.device
    last = torch.zeros(text.batch_size, dtype=torch.long, device=device)
    last = last.scatter_reduce(0, supervision.rows, supervision.predictors + 1, "amax")
    needed = torch.arange(text.length, device=device) < last[:, None]
    return needed if text.attention_mask is None else needed & text.attention_mask.bool()


def _common_start(text: Text, rows: tuple[Tensor, ...], lengths: list[int]) -> int:
    """How many tokens all rows begin with alike."""
    shortest = min(lengths)
    if text.input_ids is None or text.position_ids is not None or len(lengths) < 2 or shortest == 0:
        return 0
    starts = text.input_ids.flatten()[torch.stack([row[:shortest] for row in rows])]
    return int((starts == starts[:1]).all(0).long().cumprod(0).sum())
