"""`priors-peft card DIR`: an adapter's model card, made again from what lies in its folder."""

from dataclasses import dataclass, field

from ..hub.card import write_card
from .arguments import parse


@dataclass
class CardArguments:
    """What only the adapter's author can say."""

    license: str | None = field(
        default=None, metadata={"help": "Licence of the adapter, as the Hub names it: apache-2.0"}
    )
    language: str | None = field(default=None, metadata={"help": "Language of its data, as ISO 639: en"})
    model_name: str | None = field(default=None, metadata={"help": "Title of the card"})


def main(arguments: list[str]) -> None:
    """Write the folder's `README.md`; what stands below its marked line is kept."""
    folder, args = parse((CardArguments,), arguments, "priors-peft card", ["folder"])
    print(write_card(folder, **vars(args)))
