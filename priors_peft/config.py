"""What is tuned, under which prior: `PriorConfig`, a `PeftConfig`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftType
from peft.config import PromptLearningConfig

from .inference.base import inference_from
from .names import check_at_least, check_choice, unknown


@dataclass
class PriorConfig(PromptLearningConfig):
    """Configuration of a soft or deep prompt with a prior.

    Args:
        num_virtual_tokens: Number P of virtual tokens.
        tuning: `"soft"` trains vectors at the embedding layer; `"deep"` also replaces the hidden states of the prompt
            positions at the input of every selected layer.
        prior: Family of the prior (`priors_peft.priors.prior_names()`), or a `Prior` object or a
            `torch.distributions.Distribution` with event shape `[d]`, used at every selected layer.
        prior_kwargs: Settings of the family, passed to its `fit`; `{"text": ...}` is the text prior's description.
        reference: What the prior is fitted on: `"vocabulary"`; `"activations"` of texts at each selected layer;
            `"adapters"` trained before; a tensor `[n, d]`, or two of them for an interpolation.
        reference_kwargs: What the reference is made of. vocabulary: `data` (texts or rows) whose token frequencies
            weigh it; activations: `data`, two of them for an interpolation, `num_tokens`, `max_length`, `batch_size`;
            adapters: `adapters`, a list of folders or Hub ids.
        layers: Selected layers for deep tuning: 0 is the embedding layer, l the input of decoder layer l, negative
            numbers count from the last. `"all"` (the default for deep) or a list that contains 0.
        coordinates: `"whitened"` optimises z in θ = µ + A z, `"plain"` optimises θ.
        deep_init: Where a deep prompt starts: `"states"`, at a draw for layer 0 and what the frozen model makes of it at deeper
            layers, so that it does at first what a soft prompt does; `"draws"`, at a draw from each layer's own prior. None:
            `"states"` for a `"structured"` or `"gaussian"` prior, whose draws for deeper layers don't belong together, else
            `"draws"`.
        prior_weight: Weight of log p(θ) in the objective, the posterior's temperature: 1 is Bayes' rule, 0 uses the prior
            for initialization only, less than 1 is a colder posterior. `"auto"`: `PriorTrainer` chooses it by held-out
            likelihood, or, resumed, takes the checkpoint's. None: what suits the algorithm, 0.01 for `"variational"`, 1 for `"map"`.
        inference: How the posterior is found (`priors_peft.inference`): `"map"`, its mode; `"variational"`, the nearest
            Gaussian; `"laplace"`, the Gaussian about the mode; `"sghmc"`, draws of a Markov chain; `"svgd"`, particles
            that keep apart. None: `"variational"` for a soft prompt under a `"structured"` or `"gaussian"` prior, where it
            was measured (docs/evidence.md), unless `prior_weight` is given or `coordinates` are plain; else `"map"`.
        inference_kwargs: Settings of that algorithm.
        seed: Seed of the initial prompt, so that every process draws the same one.
        task_type: `"CAUSAL_LM"`: only text is generated here.

    Raises:
        ValueError: An argument is out of range; the message says which.
    """

    tuning: Literal["soft", "deep"] = field(
        default="soft", metadata={"help": "soft: prompt vectors at the embedding layer; deep: at every selected layer"}
    )
    prior: Any = field(default="structured", metadata={"help": "Family of the prior, or a Prior object"})
    prior_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of the prior's fit"})
    reference: Any = field(default="vocabulary", metadata={"help": "What the prior is fitted on, or a tensor [n, d]"})
    reference_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "What the reference is made of: data, or adapters"}
    )
    layers: Any = field(
        default=None, metadata={"help": 'Selected layers: "all" or a list with 0 in it; negative numbers from the end'}
    )
    coordinates: Literal["whitened", "plain"] = field(
        default="whitened", metadata={"help": "whitened optimises z in θ = µ + A z, plain optimises θ"}
    )
    deep_init: Any = field(
        default=None,
        metadata={
            "help": "Start of a deep prompt: states (of layer 0's draw at deeper layers) or draws (each its own)"
        },
    )
    prior_weight: Any = field(
        default=None,
        metadata={
            "help": "Weight of log p(θ): 1 Bayes' rule, 0 initialization only, else a tempered posterior; or auto"
        },
    )
    inference: Any = field(
        default=None,
        metadata={"help": "How the posterior is found: map, variational, laplace, sghmc or svgd"},
    )
    inference_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of that algorithm"})
    seed: int = field(default=0, metadata={"help": "Seed of the initial prompt"})
    task_type: Any = field(default="CAUSAL_LM", metadata={"help": "CAUSAL_LM"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(f'task_type must be "CAUSAL_LM", got {self.task_type!r}: only text is generated here')
        self.task_type = "CAUSAL_LM"
        check_at_least("num_virtual_tokens", self.num_virtual_tokens, 1)
        check_at_least("seed", self.seed, 0)
        for name, allowed in {
            "tuning": ("soft", "deep"),
            "coordinates": ("whitened", "plain"),
        }.items():
            check_choice(name, getattr(self, name), allowed)
        self._complete()
        if self.tuning == "deep":
            check_choice("deep_init", self.deep_init, ("states", "draws"))
        if self.prior_weight != "auto" and not (
            isinstance(self.prior_weight, (int, float)) and self.prior_weight >= 0
        ):
            raise ValueError(f'prior_weight must be a number >= 0 or "auto", got {self.prior_weight!r}')
        self._check_posterior()
        if isinstance(self.prior, str):
            from .priors import prior_class

            prior_class(self.prior)
        if isinstance(self.reference, str) and self.reference not in ("vocabulary", "activations", "adapters"):
            raise ValueError(
                "reference must be a tensor [n, d] or "
                + unknown(self.reference, ("vocabulary", "activations", "adapters"))
            )
        if self.prior == "empirical" and isinstance(self.reference, str) and self.reference != "adapters":
            raise ValueError(f'prior="empirical" is fitted on reference="adapters", got {self.reference!r}')
        if self.modules_to_save:
            raise ValueError(
                f"modules_to_save must be None, got {self.modules_to_save!r}: only the prompt is trained here"
            )
        self.peft_type = PeftType.PROMPT_TUNING if self.tuning == "soft" else PeftType.PREFIX_TUNING

    def _complete(self) -> None:
        """Decide what was left open."""
        for name in ("prior_kwargs", "inference_kwargs"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a dict of settings, got {getattr(self, name)!r}")
        # An adapter that is loaded under this configuration keeps what was left open here.
        self.says_inference = (self.inference, self.prior_weight) != (None, None)
        plain_gaussian = isinstance(self.prior, str) and self.prior in ("structured", "gaussian")
        if self.tuning == "soft":
            self.deep_init = None
        elif self.deep_init is None:
            self.deep_init = "states" if plain_gaussian else "draws"
        if self.inference is None:
            measured = self.tuning == "soft" and self.coordinates == "whitened" and plain_gaussian
            self.inference = "variational" if measured and self.prior_weight is None else "map"
        if self.prior_weight is None:
            self.prior_weight = inference_from(self.inference, self.inference_kwargs).prior_weight

    def _check_posterior(self) -> None:
        if self.prior_kwargs.get("scale") == "evidence" and self.inference not in ("variational", "laplace"):
            raise ValueError(
                f'inference must be variational or laplace for a scale by "evidence", got {self.inference!r}'
            )
        if not inference_from(self.inference, self.inference_kwargs).samples:
            return
        if self.prior_weight in (0, "auto"):
            raise ValueError(
                f"prior_weight must be a number > 0 for inference={self.inference!r}, got {self.prior_weight!r}: it is "
                "the posterior's temperature"
            )
        if self.coordinates != "whitened":
            raise ValueError(f'coordinates must be "whitened" for inference={self.inference!r}, got "plain"')

    def selected_layers(self, num_layers: int) -> list[int]:
        """The selected layers as sorted numbers in [0, num_layers).

        Raises:
            ValueError: A layer does not exist, 0 is missing, or soft tuning asks for deeper layers.
        """
        if self.tuning == "soft":
            if self.layers not in (None, [0]):
                raise ValueError(
                    f'layers must be None or [0] for tuning="soft", got {self.layers!r}: use tuning="deep"'
                )
            return [0]
        if self.layers is None or self.layers == "all":
            return list(range(num_layers))
        if not isinstance(self.layers, (list, tuple)) or not all(isinstance(layer, int) for layer in self.layers):
            raise ValueError(f'layers must be "all" or a list of integers, got {self.layers!r}')
        wrong = [layer for layer in self.layers if not -num_layers <= layer < num_layers]
        if wrong:
            raise ValueError(f"layers must be in [{-num_layers}, {num_layers}) for this model, got {wrong}")
        layers = sorted({layer % num_layers for layer in self.layers})
        if 0 not in layers:
            raise ValueError(f"layers must contain 0, where the prompt positions start, got {self.layers!r}")
        return layers

    if not TYPE_CHECKING:  # which would take any name for a field's

        def __getattr__(self, name: str) -> Any:
            # What PEFT's own encoders ask of their configurations first.
            if name in ("prompt_tuning_init", "prefix_projection"):
                raise AttributeError(
                    f"PriorConfig has no {name}: peft.get_peft_model can't build a prompt with a prior. Use "
                    "priors_peft.get_prior_model(base_model, config), and PriorTrainer to train what it returns"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; objects and tensors are named, not stored."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("prior", "reference"):
            if not isinstance(values[name], str):
                values[name] = type(values[name]).__name__
        values["reference_kwargs"] = {
            name: value if isinstance(value, (str, int, float, type(None))) else _summary(value)
            for name, value in self.reference_kwargs.items()
        }
        return values | {"peft_type": self.peft_type.value}


def _summary(value: Any) -> str:
    return f"{len(value)} items" if hasattr(value, "__len__") else type(value).__name__
