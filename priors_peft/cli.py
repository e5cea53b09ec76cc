"""The `priors-peft` command: says what there is, and hands over to `priors_peft.commands`."""

import importlib
import os
import sys

from . import __version__
from .names import unknown


COMMANDS = {
    "train": "train a prompt under a prior and evaluate it",
    "evaluate": "measure a saved adapter on a task, beside the base model without it",
    "analyze": "say what prompts mean: tokens, geometry, runs, data; as JSON, pictures and a page",
    "transfer": "measure every prompt on every task, and whether similar prompts transfer better",
    "compare": "hold runs of several priors against one another: table, differences, curves, maps",
    "card": "make an adapter's model card again from what lies in its folder",
    "push": "push an adapter with its sidecars, analysis and card to the Hub, in one commit",
    "export": "write an adapter for other tools: stock PEFT, plain transformers, vLLM",
    "doctor": "print versions, the device, and what a model supports",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Nothing heavy is imported before a command is chosen."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"priors_peft {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"command must be {unknown(command, COMMANDS)}", file=sys.stderr)
        return 2
    if command != "train" and int(os.environ.get("RANK", 0)):
        return 0  # under a launcher of several processes the first does all
    try:
        importlib.import_module(f"{__package__}.commands.{command}").main(rest)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        # What a user can mend is said in a line; a traceback would bury it.
        print(f"priors-peft {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: priors-peft COMMAND [RECIPE.yaml] [--FLAG VALUE ...]",
            "",
            "Bayesian prompt-tuning: soft and deep prompts with a prior.",
            "",
            "commands:",
            *lines,
            "",
            "`priors-peft COMMAND --help` lists the flags; a recipe's keys are the flags' names.",
        ]
    )
