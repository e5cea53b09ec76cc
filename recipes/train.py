"""`accelerate launch recipes/train.py RECIPE.yaml [--flag value ...]`: the same as `priors-peft train`."""

import sys

from priors_peft.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
