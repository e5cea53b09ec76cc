"""`priors-peft push DIR user/name`: an adapter with sidecars, analysis, pictures and card, in one commit."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from ..hub.push import check_whole, files_of, push_folder
from .arguments import parse
from .card import CardArguments


@dataclass
class PushArguments:
    """Where it goes. The token is the one that `hf auth login` stored, or HF_TOKEN."""

    private: bool = field(default=False, metadata={"help": "Make a new repository private"})
    revision: str | None = field(default=None, metadata={"help": "Branch, made if it is not there; main if unset"})
    dry_run: bool = field(default=False, metadata={"help": "List what would be pushed; nothing is sent or written"})


def main(arguments: list[str]) -> None:
    """Push, or say what would be pushed."""
    folder, repo_id, args, card = parse(
        (PushArguments, CardArguments), arguments, "priors-peft push", ["folder", "repository"]
    )
    validate_repo_id(repo_id)
    if args.dry_run:
        check_whole(Path(folder))
        files = files_of(Path(folder), repo_id, **vars(card))
        sizes = {path: len(of) if isinstance(of, bytes) else of.stat().st_size for path, of in files.items()}
        for path, size in sizes.items():
            print(f"{size:>14,}  {path}")
        print(f"{sum(sizes.values()):>14,}  bytes to {repo_id}, revision {args.revision or 'main'}; nothing was sent")
        return
    done, new = push_folder(folder, repo_id, private=args.private or None, revision=args.revision, **vars(card))
    print(f"{'pushed' if new else 'nothing has changed since'}: {done.commit_url}")
