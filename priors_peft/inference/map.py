"""Maximum a posteriori: the mode of p(θ | data), tempered by a weight that may change during training or be chosen."""

import copy
import logging
import math
import tempfile
from typing import TYPE_CHECKING, Any

from .base import Inference


if TYPE_CHECKING:
    from ..trainer import PriorTrainer

logger = logging.getLogger(__name__)

SCHEDULES = ("constant", "linear", "cosine", "cyclical")
CYCLES = 4
# From initialization only to the exact MAP, by what mattered in trials with little data.
WEIGHT_GRID = (0.0, 0.03, 0.3, 1.0)
HELD_OUT_SHARE = 0.2


class Map(Inference):
    """The mode of p(z | data), by whatever optimizer the arguments name."""


def weight_factor(schedule: str, progress: float) -> float:
    """What `prior_weight` is multiplied by, in [0, 1].

    Args:
        schedule: `"constant"`; `"linear"`: rises over the first half of training, then stays (Bowman et al., 2016);
            `"cosine"`: (1 − cos πt) / 2 over all of it; `"cyclical"`: four cycles, each rising over its first half
            (Fu et al., 2019).
        progress: Share of the steps taken, in [0, 1].
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return min(1.0, 2 * progress)
    if schedule == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if schedule == "cyclical":
        return min(1.0, 2 * (CYCLES * progress % 1.0))
    raise ValueError(f"prior_weight_schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def choose_weight(trainer: "PriorTrainer") -> float:
    """The weight of the grid with the least held-out NLL, by training with each on four fifths of the training rows.

    The trainer's prompt starts from the same place each time and is put back there.

    Raises:
        FloatingPointError: The loss became NaN or infinite with each of them.
        ValueError: There are too few rows to hold some out.
    """
    rows = trainer.train_dataset
    held_out = int(HELD_OUT_SHARE * len(rows))
    if held_out < 1:
        raise ValueError(f'prior_weight="auto" needs at least 5 training rows to hold some out, got {len(rows)}')
    parts = rows.train_test_split(held_out, seed=trainer.args.seed)
    config = trainer.model.active_peft_config
    encoder = trainer.model.prompt_encoder[trainer.model.active_adapter]
    start = encoder.coordinate.detach().clone()
    losses = {}
    try:
        for weight in WEIGHT_GRID:
            config.prior_weight = weight
            losses[weight] = _held_out_loss(trainer, parts["train"], parts["test"])
            encoder.coordinate.data.copy_(start)
    finally:
        config.prior_weight = "auto"
        encoder.coordinate.data.copy_(start)
    chosen = min(losses, key=lambda weight: losses[weight])
    if losses[chosen] == math.inf:
        raise FloatingPointError(
            f"the loss became NaN or infinite with every prior_weight in {WEIGHT_GRID}: lower learning_rate "
            f"({trainer.args.learning_rate})"
        )
    tried = ", ".join(f"{weight:g}: {loss:.3f}" for weight, loss in losses.items())
    logger.warning("prior_weight=%g was chosen by held-out nats per token (%s)", chosen, tried)
    return chosen


def _held_out_loss(trainer: "PriorTrainer", train: Any, test: Any) -> float:
    args = copy.copy(trainer.args)
    args.save_strategy, args.eval_strategy, args.load_best_model_at_end = "no", "no", False
    args.report_to, args.push_to_hub = [], False
    args.deepspeed_plugin = None  # accelerate has it, and takes none twice
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        trial = type(trainer)(
            model=trainer.model,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            processing_class=trainer.processing_class,
            data_collator=trainer.data_collator,
        )
        try:
            trial.train()
        except FloatingPointError:
            return math.inf
        loss = trial.evaluate()["eval_loss"]
    return loss if math.isfinite(loss) else math.inf
