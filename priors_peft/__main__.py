"""`python -m priors_peft COMMAND`, and `accelerate launch -m priors_peft COMMAND`: the same as `priors-peft COMMAND`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
