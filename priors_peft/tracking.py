"""What trackers get besides figures: each prompt's nearest tokens as a table, and pictures of it."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .callback import snapshots_path, suffix
from .hub.markdown import code, table
from .sharding import is_sharded
from .snapshots import SNAPSHOTS


logger = logging.getLogger(__name__)

# Random prompts that the nearest tokens are held against: enough for signal at 5 % and its band.
NUM_DRAWS = 99
HEADS = ["virtual token", "nearest at the start", "nearest now", "cosine", "p-value"]

Tables = dict[str, list[list[Any]]]
Pictures = dict[str, np.ndarray]


class TrackingCallback(TrainerCallback):
    """Sends trackers what `priors-peft analyze` says of the prompt, when training has ended.

    TensorBoard, Weights & Biases and trackio get `prior/nearest_tokens`, a table of the nearest token of each virtual
    token before and after training and its p-value against random prompts, and the pictures `prior/tokens`,
    `prior/geometry` (over the steps) and `prior/projection` (prompt, its way and the vocabulary in a plane). Pictures
    need matplotlib. What fails is logged, and training ends as it would have. Where the model is sharded, and a process
    does not hold the whole vocabulary, trackers get figures only.

    `PriorTrainer` adds it; another `Trainer` of a `PriorPeftModel` can too.

    Args:
        callbacks: The trainer's, `trainer.callback_handler.callbacks`: trackers among them are sent to. It comes after
            `PriorCallback` and before them.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback]) -> None:
        self._callbacks = callbacks

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        trackers = [one for one in self._callbacks if isinstance(one, tuple(SENDERS))]
        if not trackers or not state.is_world_process_zero:
            return
        if is_sharded(model):
            logger.warning("Trackers get no tables and pictures of sharded models: `priors-peft analyze` makes them")
            return
        try:
            tables, pictures = look(getattr(model, "module", model), processing_class, args)
            for tracker in trackers:
                send = next(send for kind, send in SENDERS.items() if isinstance(tracker, kind))
                send(tracker, tables, pictures, state.global_step)
        except Exception as error:  # the trained prompt, not saved yet, matters more
            logger.warning("Trackers got no tables and pictures of the prompt: %s: %s", type(error).__name__, error)


def look(model: Any, tokenizer: Any, args: TrainingArguments) -> tuple[Tables, Pictures]:
    """Nearest tokens of the prompts that are trained, by their tables' names, and pictures `[H, W, 3]` by theirs."""
    from .analysis import analyze, save_pictures
    from .analysis.sources import unique_names

    names = [name for name in model.peft_config if model.prompt_encoder[name].coordinate.requires_grad]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, Path(args.output_dir).resolve().name)  # what pictures call the prompt
        model.save_pretrained(str(folder), selected_adapters=names)
        adapters = {name: folder if name == "default" else folder / name for name in names}
        for name, adapter in adapters.items():
            if snapshots_path(args, name).is_file():
                shutil.copy(snapshots_path(args, name), adapter / SNAPSHOTS)
        paths = [str(path) for path in adapters.values()]
        analysis = analyze(paths, model.base_model, tokenizer, num_draws=NUM_DRAWS, progress=not args.disable_tqdm)
        tokens = {adapter["name"]: adapter["tokens"]["virtual_tokens"] for adapter in analysis["adapters"]}
        tables = {
            "prior/nearest_tokens" + suffix(name, names): [_row(token) for token in tokens[shown]]
            for name, shown in zip(names, unique_names(paths), strict=True)
        }
        try:
            from PIL import Image

            files = save_pictures(analysis, folder / "pictures")
        except ImportError as error:
            logger.warning("Trackers got no pictures of the prompt: %s", error)
            return tables, {}
        return tables, {f"prior/{path.stem}": np.asarray(Image.open(path).convert("RGB")) for path in files}


def _row(token: dict[str, Any]) -> list[Any]:
    before, now = (token[key][0]["text"] if token[key] else "" for key in ("initial_nearest", "nearest"))
    return [token["index"], before, now, round(token["score"], 4), round(token["p_value"], 4)]


def _to_tensorboard(tracker: Any, tables: Tables, pictures: Pictures, step: int) -> None:
    for name, rows in tables.items():
        cells = [[str(index), code(before), code(now), *map(str, rest)] for index, before, now, *rest in rows]
        tracker.tb_writer.add_text(name, table(HEADS, cells), step)
    for name, picture in pictures.items():
        tracker.tb_writer.add_image(name, picture, step, dataformats="HWC")


def _to_run(library: Any, tables: Tables, pictures: Pictures, step: int) -> None:
    # trackio has the names of Weights & Biases.
    logged = {name: library.Table(columns=HEADS, data=rows) for name, rows in tables.items()}
    logged |= {name: library.Image(picture) for name, picture in pictures.items()}
    library.log(logged | {"train/global_step": step})


SENDERS = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: lambda tracker, *what: _to_run(tracker._wandb, *what),
    TrackioCallback: lambda tracker, *what: _to_run(tracker._trackio, *what),
}
