"""Running moments: a reference that is streamed, never held, with a bounded sample of its rows."""

import torch
from torch import Tensor


class Moments:
    """Mean, covariance and fourth moment of a stream of rows in float64, and a uniform sample of the rows.

    Sums are taken about the first rows' mean, so that a large common offset costs no precision. Results don't depend
    on how the stream is cut into batches beyond rounding.

    Args:
        keep: Most rows of the sample; families that need rows (mixtures, radii) are fitted on it.
        seed: Of the sample.
    """

    def __init__(self, keep: int = 8192, seed: int = 0) -> None:
        self.keep = keep
        self.count = 0.0
        self.sample = torch.empty(0, 0)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._shift: Tensor | None = None

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Take in rows `[n, d]`, each `weights` `[n]` times (once if None); weighted rows come all at once."""
        if len(rows) == 0:
            return
        rows = rows.detach().cpu()
        if not torch.isfinite(rows).all():
            raise ValueError("reference must be finite, got a row with inf or nan")
        if weights is not None and self.count:
            raise ValueError("weights must come with the first rows and all of them, got more rows after others")
        times = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double().cpu()
        values = rows.double()
        if self._shift is None:
            width = rows.shape[1]
            self._shift = (times @ values) / times.sum()
            self._first = torch.zeros(width, dtype=torch.float64)
            self._second = torch.zeros(width, width, dtype=torch.float64)
            self._third = torch.zeros(width, dtype=torch.float64)
            self._fourth = 0.0
            self.sample = torch.empty(0, width)
        values = values - self._shift
        lengths = values.square().sum(-1)
        self.count += float(times.sum())
        self._first += times @ values
        self._second += values.mT @ (values * times[:, None])
        self._third += (times * lengths) @ values
        self._fourth += float((times * lengths.square()).sum())
        if weights is not None:
            # A row that counts often must be able to be drawn often.
            rows = rows[torch.multinomial(times, self.keep, replacement=True, generator=self._generator)]
        # The rows of the largest keys are a uniform sample without replacement.
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        keys, kept = torch.cat([self._keys, keys]), torch.cat([self.sample, rows.float()])
        chosen = keys.topk(min(self.keep, len(keys))).indices
        self._keys, self.sample = keys[chosen], kept[chosen]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows taken in and their width, as of a tensor `[n, d]`."""
        return int(self.count), self.sample.shape[1]

    @property
    def mean(self) -> Tensor:
        """Shape `[d]`."""
        return self._shifted(self._shift) + self._first / self.count

    @property
    def covariance(self) -> Tensor:
        """Maximum-likelihood covariance, shape `[d, d]`."""
        offset = self._first / self.count
        return self._second / self.count - torch.outer(offset, offset)

    @property
    def fourth(self) -> float:
        """Mean of ‖x − µ‖⁴, from which Ledoit and Wolf's shrinkage follows."""
        offset = self._first / self.count
        square = offset @ offset
        # (‖y‖² − 2 m·y + ‖m‖²)², summed over the stream.
        total = self._fourth + 4 * offset @ self._second @ offset + self.count * square**2
        total += -4 * offset @ self._third + 2 * square * self._second.trace() - 4 * square * (offset @ self._first)
        return float(total / self.count)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, for the cache."""
        names = ("_keys", "sample", "_first", "_second", "_third")
        scalars = torch.tensor([self.count, self._fourth], dtype=torch.float64)
        return {"shift": self._shifted(self._shift), "scalars": scalars} | {
            name: getattr(self, name) for name in names
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "Moments":
        """Rebuild from `state_dict()`."""
        moments = cls()
        moments._shift = state["shift"]
        moments.count, moments._fourth = state["scalars"].tolist()
        for name in ("_keys", "sample", "_first", "_second", "_third"):
            setattr(moments, name, state[name])
        return moments

    def _shifted(self, shift: Tensor | None) -> Tensor:
        if shift is None:
            raise ValueError("reference must have rows, got an empty stream")
        return shift
