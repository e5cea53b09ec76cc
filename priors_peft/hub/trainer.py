"""What a trainer does with the Hub: facts and cards with every save, pushes of whole adapters."""

import json
import logging
import os
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..calibration import Calibration
from ..files import atomic_path
from ..sharding import is_sharded
from .adapter import ADAPTER_WEIGHTS, PRIOR_CONFIG, PRIOR_WEIGHTS
from .card import CARD, adapters_in, write_card
from .facts import by_prompt, collect_facts, read_facts
from .push import ADAPTER_FILES, PushError, adopt_card, commit, explained, files_of, prepare_repo, push_folder


logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
# Not shared with a checkpoint: a pickle and scripts that nothing needs, the card, the base model's tokenizer.
_LEFT_OUT = (
    "training_args.bin",
    "zero_to_*.py",
    CARD,
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)


class HubTrainer(Trainer):
    """A `Trainer` of prompts that leaves facts and a card with every adapter, and pushes adapters whole.

    Attributes:
        recipe: The flags that `priors-peft train` was given, for the card.
        adapter_names: The prompts that are evaluated.
        calibrations: By the last evaluation, of each prompt, or `NAME, PART` for each of several evaluation sets.
    """

    recipe: dict[str, Any] = {}
    adapter_names: list[str]
    compute_metrics: Any
    calibrations: dict[str, Calibration] = {}
    hub_model_id: str | None = None
    _evaluated: tuple[int, dict[str, float], dict[str, Calibration], dict[str, dict[str, float]]] | None = None
    _is_unaveraged = False
    _before: dict[str, float] | None = None
    _saved = False

    # Facts and card

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; figures that were measured since the last training are those before this one."""
        step, figures, *_ = self._evaluated or (None, None)
        same = step == self.state.global_step and not (step and resume_from_checkpoint)
        self._before, self._evaluated = figures if same else None, None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer`'s; figures of the trainer's own evaluation rows go onto the card, if the prompt was saved."""
        if eval_dataset is None:
            self.calibrations = {}
        figures = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None and not self.is_in_train:
            calibrations, means = self.calibrations, self._unaveraged()
            self.calibrations = calibrations | self.calibrations
            self._evaluated = self.state.global_step, figures, self.calibrations, means
            if self._saved and self.is_world_process_zero():
                self._try_card(Path(self.args.output_dir))
        return figures

    def _unaveraged(self) -> dict[str, dict[str, float]]:
        """Evaluate prompts with a posterior without averaging, as the stock adapter predicts; nothing is logged."""
        names, metrics, callbacks = self.adapter_names, self.compute_metrics, self.callback_handler.callbacks
        spread = [name for name in names if self.model.prompt_encoder[name].posterior is not None]
        parts = self.eval_dataset if isinstance(self.eval_dataset, dict) else [None]
        figures: dict[str, float] = {}
        self.adapter_names, self.compute_metrics, self.callback_handler.callbacks = spread, None, []
        self._is_unaveraged = True
        try:
            for part in parts if spread else []:
                prefix = "eval" if part is None else f"eval_{part}"
                loader = self.get_eval_dataloader(part)
                figures |= self.evaluation_loop(
                    loader, "Evaluation of the adapter alone", metric_key_prefix=prefix
                ).metrics
            return by_prompt(figures, spread)
        finally:
            self.adapter_names, self.compute_metrics, self.callback_handler.callbacks = names, metrics, callbacks
            self._is_unaveraged = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s, but that only the prompt is gathered where the model is sharded; every process calls this."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save and is_sharded(self.model):
            self.model.save_pretrained(output_dir or self.args.output_dir, is_main_process=False)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle has no place in a folder that people share.
            (folder / "training_args.bin").unlink(missing_ok=True)
            self._try_card(folder)
            self._saved = self._saved or folder == Path(self.args.output_dir)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `training.json` and the card into `output_dir`; the card's own part is kept.

        Args:
            language: Of the data.
            license: Of the adapter, as the Hub names licences.
            tags: More tags.
            model_name: The card's title.
            **kwargs: `Trainer`'s other arguments, which follow from the facts here.
        """
        if self.is_world_process_zero():
            self._write_card(
                Path(self.args.output_dir), language=language, license=license, tags=tags, model_name=model_name
            )

    def _try_card(self, folder: Path) -> None:
        try:
            self._write_card(folder)
        except (ValueError, OSError) as error:
            # The prompt itself matters more.
            logger.warning("The card of %s could not be made: %s", folder, error)

    def _write_card(self, folder: Path, **options: Any) -> None:
        step, figures, calibrations, means = self._evaluated or (None, None, {}, {})
        if step != self.state.global_step:
            figures, calibrations, means = None, {}, {}
        facts = collect_facts(self, figures, self._before)
        facts.mean_results = means
        facts.calibration = {name: of.to_dict() for name, of in calibrations.items()}
        facts.repo_id = facts.repo_id or read_facts(folder).repo_id
        facts.save(folder)
        write_card(folder, **options)

    # Pushing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, as `Trainer` does.

        Raises:
            PushError: The Hub or the network failed.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        started = hasattr(self, "state")  # in its constructor, Trainer asks for the repository first
        again = None if started else "Nothing was trained; mend it and start again, or train without push_to_hub"
        with explained(args.output_dir, name, private, args.hub_revision, again):
            api = HfApi(token=token or args.hub_token)
            self.hub_model_id = prepare_repo(api, name, private, args.hub_revision)
            adopt_card(api, self.hub_model_id, args.hub_revision, Path(args.output_dir))
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save the prompt and push it with sidecars, analysis, pictures and card in one commit.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait until it is there; else a `Future` is returned.
            token: Of the Hub; else `hub_token`, HF_TOKEN or the stored one.
            revision: Branch; else `hub_revision`.
            private: Whether a new repository is private; else `hub_private_repo`.
            **kwargs: `license`, `language`, `tags` and `model_name` for the card.

        Raises:
            PushError: The Hub or the network failed; the folder is whole, and the message says how to try again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # First of all, so that the folder is whole whatever the Hub answers.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._finish_current_push()
        given = {key: kwargs[key] for key in ("language", "license", "tags", "model_name") if key in kwargs}

        def push() -> CommitInfo:
            return push_folder(
                self.args.output_dir,
                str(self.hub_model_id),
                revision=revision or self.args.hub_revision,
                token=token or self.args.hub_token,
                message=commit_message or "End of training",
                **given,
            )[0]

        return push() if blocking else HfApi().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint's adapter, and by `hub_strategy` the checkpoint itself, in one commit in the background."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        output, checkpoint = Path(args.output_dir), Path(checkpoint_folder)
        _copy_adapters(checkpoint, output)
        self._try_card(output)
        files = files_of(output)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folder = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            files |= {f"{folder}/{path}": content for path, content in _checkpoint_files(checkpoint).items()}
        at = f"step {self.state.global_step}"
        if args.save_strategy != SaveStrategy.STEPS:
            at = f"epoch {int(self.state.epoch or 0)}"
        # What is sent in the background must not change or go away meanwhile, as older checkpoints do.
        staged = Path(tempfile.mkdtemp(prefix=".push-", dir=output))
        files = {path: _staged(content, staged / path) for path, content in files.items()}
        repo_id, revision = str(self.hub_model_id), args.hub_revision

        def push() -> None:
            try:
                with explained(output, repo_id, revision=revision):
                    commit(HfApi(token=args.hub_token), repo_id, files, f"Training in progress, {at}", revision)
            except PushError as error:
                logger.warning("Training goes on: %s", error)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        job = HfApi().run_as_future(push)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)


def _copy_adapters(source: Path, target: Path) -> None:
    """Copy adapters and sidecars, weights first and hashes last, as they are saved."""
    for own, _, _ in adapters_in(source).values():
        names = sorted(
            ADAPTER_FILES, key=lambda name: (name == PRIOR_CONFIG, name not in (ADAPTER_WEIGHTS, PRIOR_WEIGHTS))
        )
        for path in (source / own / name for name in names):
            if path.is_file():
                with atomic_path(target / own / path.name) as temporary:
                    shutil.copyfile(path, temporary)


def _checkpoint_files(checkpoint: Path) -> dict[str, Path | bytes]:
    """All that training goes on from, without this machine's folders."""
    found: dict[str, Path | bytes] = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if not any(path.match(pattern) for pattern in _LEFT_OUT):
            found[path.relative_to(checkpoint).as_posix()] = path
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
        found[_STATE] = json.dumps(state, indent=2).encode()
    found |= files_of(checkpoint)
    return {path: content for path, content in found.items() if path != CARD}


def _staged(content: Path | bytes, path: Path) -> Path | bytes:
    """The same file under another name, as a link where the file system has them."""
    if isinstance(content, bytes):
        return content
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(content, path)
    except OSError:
        shutil.copyfile(content, path)
    return path
