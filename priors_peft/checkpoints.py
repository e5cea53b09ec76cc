"""Checkpoints of a training: which is the last whole one, and whether a trainer can go on from it."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import write_json
from .hub.adapter import PRIOR_CONFIG
from .hub.reading import read_json
from .inference.base import inference_from
from .model import PriorPeftModel
from .priors import prior_family


logger = logging.getLogger(__name__)

# In `output_dir`: the checkpoints that an earlier run left there.
EARLIER = ".earlier_checkpoints.json"


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint of the run that was begun last, written to its end (`trainer_state.json` comes last), or None.

    By time, as those of an earlier run in the folder may have higher steps; by step where all are of one second.
    """
    path, times = Path(folder, EARLIER), _times_of_checkpoints(folder)
    earlier = read_json(path) if path.is_file() else {}
    own = {name: time for name, time in times.items() if earlier.get(name) != time}
    if times and not own:
        logger.warning(
            "%s holds no checkpoint of the run that was begun last; %s is of a run before it. To go on from that one pass "
            "it as resume_from_checkpoint",
            folder,
            max(times, key=lambda name: times[name]),
        )
    told = bool(own) and max(own.values()) - min(own.values()) >= 1
    order = sorted(own, key=lambda name: (own[name] if told else 0, int(name.split("-")[-1])))
    return str(Path(folder, order[-1])) if order else None


def _times_of_checkpoints(folder: str | os.PathLike) -> dict[str, float]:
    paths = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    states = {path.name: path / TRAINER_STATE_NAME for path in paths}
    return {name: state.stat().st_mtime for name, state in states.items() if state.is_file()}


def pass_over_checkpoints(folder: str | os.PathLike) -> None:
    """Have `last_checkpoint` know those that are there now, by name and time, as an earlier run's."""
    times = _times_of_checkpoints(folder)
    if times:
        write_json(Path(folder, EARLIER), times)


def check_checkpoint(model: PriorPeftModel, name: str, checkpoint: str | os.PathLike) -> None:
    """Refuse to go on from half a checkpoint, one under another prior, or of an algorithm that trains otherwise."""
    if not Path(checkpoint, TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint must be a whole checkpoint, got {str(checkpoint)!r} without {TRAINER_STATE_NAME}"
        )
    described, config = _described(checkpoint, name), model.peft_config[name]
    saved, family = described.get("config", {}), prior_family(model.prompt_encoder[name].priors[0])
    # What a prior that was loaded had been fitted on its configuration no longer tells.
    source = next((origin.source for origin in model.provenance.get(name, [])), None)
    settings = json.loads(json.dumps(config.prior_kwargs))
    begun = [
        saved.get("prior", family),
        saved.get("prior_kwargs", settings),
        next((origin["source"] for origin in described.get("reference", [])), source),
        saved.get("inference", "map"),
        saved.get("inference_kwargs") or {},
    ]
    given = [family, settings, source, config.inference, config.inference_kwargs]
    found, wanted = inference_from(*begun[-2:]), inference_from(*given[-2:])
    hooks = ("start", "prompts", "optimizer", "before_step", "step")
    alike = all(getattr(type(found), hook) is getattr(type(wanted), hook) for hook in hooks)
    algorithms = not alike or (type(found) is type(wanted) and vars(found) != vars(wanted))
    arguments = ("prior", "prior_kwargs", "reference", "inference", "inference_kwargs")
    for argument, one, other in zip(arguments, begun, given, strict=True):
        if one != other and (algorithms or not argument.startswith("inference")):
            raise ValueError(
                f"{argument} must be the checkpoint's {one!r} to go on from {str(checkpoint)!r}, got {other!r}: pass "
                f"{argument}={one!r}, or train anew in another output_dir"
            )


def weight_of(checkpoint: str | os.PathLike, name: str) -> float | None:
    """The prior's weight under which the checkpoint was trained; None where it does not say."""
    weight = _described(checkpoint, name).get("config", {}).get("prior_weight")
    return weight if isinstance(weight, (int, float)) else None


def _described(checkpoint: str | os.PathLike, name: str) -> dict[str, Any]:
    path = Path(checkpoint, "" if name == "default" else name, PRIOR_CONFIG)
    return read_json(path) if path.is_file() else {}
