"""The commands of `priors-peft`, one module each with a `main(arguments)`; they only wire the rest together."""
