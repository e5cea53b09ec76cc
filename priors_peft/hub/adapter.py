"""An adapter folder: a stock PEFT adapter that loads anywhere, plus sidecars with which training goes on exactly."""

import contextlib
import importlib.metadata
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import save_file
from torch import Tensor

from ..config import PriorConfig
from ..files import atomic_path, sha256, write_json
from ..inference.posterior import MixturePosterior, posterior_from
from ..priors import GaussianPrior, Prior, own_prior, prior_class, prior_family, prior_names
from ..priors.reference import Provenance
from ..prompt import PriorPromptEncoder
from ..sharding import as_forward, shape, whole_state
from .reading import check_sound, fetch_file, hash_of, read_json, read_tensors, required


if TYPE_CHECKING:
    from ..model import PriorPeftModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PRIOR_CONFIG, PRIOR_WEIGHTS = "prior_config.json", "prior.safetensors"
TASK_FILE = "task.json"
FORMAT_VERSION = 1
PACKAGES = ("priors_peft", "torch", "transformers", "peft")
# What PyTorch and Python say of tensors and fields that don't belong together.
_MISMATCHES = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)


# Saving


def save_adapters(
    model: "PriorPeftModel", folder: str | os.PathLike, names: list[str] | None = None, is_main_process: bool = True
) -> None:
    """Save prompts; `"default"` at the root of the folder, others in a subfolder of their name, as PEFT does.

    Every process calls this, since a sharded model needs all of them for the prompt pass; one of them writes.

    Raises:
        ValueError: A name is unknown, or a prompt is not finite; what the folder held is left as it was.
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_directory must be a folder, got the file {str(folder)!r}")
    names = list(model.peft_config) if names is None else names
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise ValueError(f"selected_adapters must be among {list(model.peft_config)}, got {unknown}")
    for name in names:
        stock = stock_adapter(model, name)
        state = whole_state(model.prompt_encoder[name]) | {"prompt": model.prompt(name).theta}
        if is_main_process:
            _write(model, name, *stock, state, folder if name == "default" else folder / name)


@torch.no_grad()
def stock_adapter(
    model: "PriorPeftModel", name: str, as_prefix: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights with which stock PEFT gives the same model.

    θ if soft (`PROMPT_TUNING`), its key/value cache if deep or `as_prefix` (`PREFIX_TUNING`).

    Raises:
        ValueError: The prompt is not finite, or stock PEFT can't hold the model's cache.
    """
    config = model.peft_config[name]
    prompt = model.prompt(name)
    if not torch.isfinite(prompt.theta).all():
        raise ValueError(f"the prompt {name!r} must be finite to be saved, got inf or nan: load the last checkpoint")
    shared = {
        "task_type": config.task_type,
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
    }
    if config.tuning == "soft" and not as_prefix:
        heads = config.num_attention_heads
        stock = PromptTuningConfig(**shared, token_dim=config.token_dim, num_attention_heads=heads)
        weights = prompt.theta[0]
    else:
        cache = _prompt_cache(model, name)
        shapes = {tuple(layer.keys.shape) for layer in cache.layers} | {
            tuple(layer.values.shape) for layer in cache.layers
        }
        if len(shapes) > 1 or len(cache.layers) != config.num_layers or shapes.copy().pop()[2] != prompt.length:
            raise ValueError(
                f"tuning must be soft{', and the format not prefix,' if as_prefix else ''} for "
                f"{type(model.base_model).__name__}: stock PREFIX_TUNING can't hold layers of different key/value "
                f"shapes, got {sorted(shapes)}"
            )
        _, heads, _, width = shapes.pop()
        # PEFT's layout: layer l's key in slot 2l, its value in slot 2l + 1, each [P, heads, width].
        slots = [states[0].transpose(0, 1).cpu() for layer in cache.layers for states in (layer.keys, layer.values)]
        weights = torch.stack(slots, dim=1).flatten(1)
        stock = PrefixTuningConfig(
            **shared, token_dim=heads * width, num_attention_heads=heads, encoder_hidden_size=heads * width
        )
    return stock.to_dict(), {"prompt_embeddings": weights.float().cpu().contiguous()}


def _prompt_cache(model: "PriorPeftModel", name: str) -> Any:
    training = model.base_model.training
    model.base_model.eval()
    try:
        return as_forward(model, "run_prompt")(name).cache
    finally:
        model.base_model.train(training)


def _write(
    model: "PriorPeftModel",
    name: str,
    stock: dict[str, Any],
    weights: dict[str, Tensor],
    state: dict[str, Tensor],
    folder: Path,
) -> None:
    config: PriorConfig = model.peft_config[name]
    encoder: Any = model.prompt_encoder[name]
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    described = {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict() | {"prior": prior_family(encoder.priors[0])},
        "reference": [provenance.to_dict() for provenance in model.provenance.get(name, [])],
        "versions": versions,
    }
    # All four are whole before the first takes its name; the one with the hashes takes it last.
    with contextlib.ExitStack() as stack:
        paths = {
            file: stack.enter_context(atomic_path(folder / file))
            for file in (PRIOR_CONFIG, ADAPTER_CONFIG, PRIOR_WEIGHTS, ADAPTER_WEIGHTS)
        }
        save_file(weights, paths[ADAPTER_WEIGHTS], metadata={"format": "pt"})
        save_file(state, paths[PRIOR_WEIGHTS], metadata={"format": "pt"})
        described["sha256"] = {file: sha256(paths[file]) for file in (ADAPTER_WEIGHTS, PRIOR_WEIGHTS)}
        write_json(paths[ADAPTER_CONFIG], stock)
        write_json(paths[PRIOR_CONFIG], described)


# Loading


@dataclass
class SavedAdapter:
    """What an adapter folder holds.

    Args:
        config: The configuration to load it with.
        provenance: Where the prior's references came from.
        priors: One fitted prior for each selected layer.
        prompt: θ, shape `[S, P, d]`.
        initial_prompt: θ before training, shape `[S, P, d]`.
        coordinate: The trained parameter, or None if it must be derived from θ.
        posterior: `state_dict()` of the posterior about it; empty where it is a point.
        point: z of the prompt that stands for the posterior, or None where that is its mean.
    """

    config: PriorConfig
    provenance: list[Provenance]
    priors: list[Prior]
    prompt: Tensor
    initial_prompt: Tensor
    coordinate: Tensor | None = None
    posterior: dict[str, Tensor] = field(default_factory=dict)
    point: Tensor | None = None

    def encoder(self) -> PriorPromptEncoder:
        """A prompt encoder in the saved state, exactly."""
        posterior = posterior_from(self.posterior, trained=self.config.inference == "variational")
        encoder = PriorPromptEncoder(self.priors, self.config.coordinates, self.initial_prompt, posterior)
        if self.coordinate is None:
            encoder.set_prompt(self.prompt)
        else:
            with torch.no_grad():
                encoder.coordinate.copy_(self.coordinate)
        encoder.point = self.point
        return encoder

    def restore(self, encoder: PriorPromptEncoder, config: PriorConfig) -> None:
        """Put the saved state into an encoder in place, so that optimizers keep its parameter."""
        depth = config.num_layers or 0
        if self.config.selected_layers(depth) != config.selected_layers(depth):
            raise ValueError(
                f"the checkpoint must hold layers {config.selected_layers(depth)} like the model's, got "
                f"{self.config.selected_layers(depth)}: use the configuration it was trained with"
            )
        saved = self.encoder().to(encoder.coordinate.device)
        if encoder.coordinates != saved.coordinates or encoder.coordinate.shape != saved.coordinate.shape:
            raise ValueError(
                f"the checkpoint must hold a {encoder.coordinates} prompt of shape {tuple(encoder.coordinate.shape)} "
                f"like the model's, got a {saved.coordinates} one of shape {tuple(saved.coordinate.shape)}: "
                "use the configuration it was trained with"
            )
        held = {} if saved.posterior is None else saved.posterior.state_dict()
        if not encoder.is_variational:
            encoder.posterior = saved.posterior  # of as many draws as there were by then
        elif not held:
            raise ValueError(
                f"the checkpoint must hold a posterior like the model's, got a point (inference={self.config.inference!r}): "
                "use the configuration it was trained with"
            )
        elif encoder.posterior.state_dict().keys() != held.keys():  # of as many Gaussians as there were then
            encoder.posterior = saved.posterior.requires_grad_(encoder.coordinate.requires_grad)
        encoder.point = saved.point
        encoder.load_state_dict(saved.state_dict())

    def check_fits(self, model: Any) -> None:
        """Raise `ValueError` unless the prompt is as wide and as deep as the base model."""
        width = shape(model.get_input_embeddings().weight)[1]
        layers = model.config.get_text_config().num_hidden_layers
        if self.prompt.shape[-1] != width:
            raise ValueError(
                f"the adapter must fit the base model: its prompt has hidden size {self.prompt.shape[-1]}, the model "
                f"{width}. It was trained on {self.config.base_model_name_or_path or 'an unnamed model'}"
            )
        if self.config.num_layers is not None and self.config.num_layers != layers:
            raise ValueError(
                f"the adapter must fit the base model: it was trained on {self.config.num_layers} layers, the model "
                f"has {layers}. It was trained on {self.config.base_model_name_or_path or 'an unnamed model'}"
            )
        if len(self.config.selected_layers(layers)) != len(self.prompt):
            raise ValueError(
                f"the adapter must hold a prompt for each of its layers {self.config.layers!r}, got {len(self.prompt)}"
            )


def read_adapter(
    model_id: str | os.PathLike, config: PriorConfig | None = None, is_trainable: bool = False, **hub_arguments: Any
) -> SavedAdapter:
    """Read an adapter folder, local or on the Hub; nothing that is read can run code.

    Args:
        model_id: A local folder or a Hub id.
        config: Used instead of the saved configuration; what the saved tensors decide must agree with it.
        is_trainable: Whether training will go on.
        **hub_arguments: `revision`, `subfolder`, `token`, `cache_dir`, ... for `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A file is damaged or unsound, or it is not a soft or deep prompt; the message names the file.
    """
    stock_path = required(model_id, ADAPTER_CONFIG, hub_arguments)
    from_hub = not Path(model_id, hub_arguments.get("subfolder") or "").is_dir()
    stock = read_json(stock_path)
    check_sound(stock, stock_path, from_hub)
    weights_path = required(model_id, ADAPTER_WEIGHTS, hub_arguments)
    prior_config = fetch_file(model_id, PRIOR_CONFIG, hub_arguments)
    if prior_config is None:
        return _from_stock(stock, stock_path, weights_path, is_trainable)
    described = read_json(prior_config)
    prior_path = required(model_id, PRIOR_WEIGHTS, hub_arguments)
    if described.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION} in {prior_config}, got {described.get('format_version')!r}: "
            "update priors_peft"
        )
    _check_hashes(described, weights_path, prior_path)
    own = None if config is None or isinstance(config.prior, str) else config.prior
    saved = _config_from(described, prior_config, own, from_hub)
    family, coordinates, inference = saved.prior, saved.coordinates, saved.inference
    if config is not None:
        saved = _overridden(saved, config)
    saved.inference_mode = not is_trainable
    state = read_tensors(prior_path)
    try:
        priors = _checked_priors(family, saved, state)
        provenance = [Provenance(**entry) for entry in described.get("reference", [])]
    except _MISMATCHES as error:
        raise ValueError(f"{prior_path} and {prior_config} must belong together, got: {error}") from error
    prompt, initial_prompt = state["prompt"], state["initial_prompt"]
    found = SavedAdapter(saved, provenance, priors, prompt, initial_prompt)
    if saved.coordinates == coordinates and saved.inference == inference:
        found.coordinate, found.posterior, found.point = state["coordinate"], _posterior(state), state.get("point")
    elif saved.coordinates == coordinates:  # another algorithm finds its own posterior
        found.coordinate = state.get("point", state["coordinate"])
    return found


def read_task(model_id: str | os.PathLike, **hub_arguments: Any) -> dict[str, Any] | None:
    """What an adapter was trained on, as `priors-peft train` leaves it in `task.json`; None if it is not said."""
    path = fetch_file(model_id, TASK_FILE, hub_arguments)
    return None if path is None else read_json(path)


def _check_hashes(described: dict[str, Any], *paths: Path) -> None:
    for path in paths:
        if hash_of(described, path.name) != sha256(path):
            raise ValueError(
                f"{path} is damaged or was changed after it was saved (its SHA-256 is not the one in {PRIOR_CONFIG}). "
                f"Fetch it again; to use {ADAPTER_WEIGHTS} as it is, delete {PRIOR_CONFIG} and {PRIOR_WEIGHTS}"
            )


def _checked_priors(family: str, config: PriorConfig, state: dict[str, Tensor]) -> list[Prior]:
    """The prior of each layer, once it is known that all tensors agree with each other and with the configuration."""
    expected = (len(state["prompt"]), config.num_virtual_tokens, config.token_dim)
    for name in {"prompt", "coordinate", "initial_prompt"} | {"point"} & state.keys():
        if tuple(state[name].shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(state[name].shape)}")
    if config.num_layers is not None and len(config.selected_layers(config.num_layers)) != expected[0]:
        raise ValueError(f"layers must be as many as the prompt's {expected[0]}, got {config.layers!r}")
    priors = [_prior(family, config, state, index) for index in range(expected[0])]
    for layer, (prior, prompt) in enumerate(zip(priors, state["prompt"], strict=True)):
        held = [prior.to_prompt(state[name][layer]) for name in ("coordinate", "point") if name in state]
        if not torch.isfinite(torch.cat([prompt, *held])).all():
            raise ValueError(f"the prompt and its prior must be finite, got inf or nan ({family})")
    posterior = posterior_from(_posterior(state), trained=False)
    if posterior is not None:
        coordinate = state["coordinate"]
        parts: list[tuple[Tensor, Any]] = [(coordinate, posterior)]
        if isinstance(posterior, MixturePosterior):
            parts = posterior.parts(coordinate)
        for mean, part in parts:
            drawn = part.sample(mean, 1)
            if tuple(drawn.shape) != (1, *expected) or not torch.isfinite(drawn).all():
                raise ValueError(
                    f"the posterior must give finite prompts of shape {expected}, got {tuple(drawn.shape)}"
                )
    return priors


def _posterior(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "posterior."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prior(family: str, config: PriorConfig, state: dict[str, Tensor], index: int) -> Prior:
    prefix = f"priors.{index}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not isinstance(config.prior, str):
        prior = own_prior(config.prior)
        prior.load_state_dict(own)
        return prior
    return prior_class(family).from_state_dict(own)


def _config_from(described: dict[str, Any], path: Path, own: Any | None, from_hub: bool) -> PriorConfig:
    values = described.get("config")
    known = {item.name for item in fields(PriorConfig)} - {"peft_type", "peft_version", "auto_mapping"}
    if not isinstance(values, dict):
        raise ValueError(f"config must be an object in {path}, got {type(values).__name__}")
    check_sound(values, path, from_hub)
    values = {key: value for key, value in values.items() if key in known}
    # What the prior was fitted on is known by its provenance; it is not needed again.
    values |= {"reference": "adapters" if values.get("prior") == "empirical" else "vocabulary", "reference_kwargs": {}}
    if own is not None:
        values["prior"] = own
    elif values.get("prior", "structured") not in prior_names():
        raise ValueError(
            f"{path} names the prior {values['prior']!r}, which is its author's own: pass it again, as "
            "from_pretrained(..., config=PriorConfig(prior=...)); nothing that is loaded can run code"
        )
    try:
        return PriorConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold a valid configuration, got: {error}") from error


def _overridden(saved: PriorConfig, config: PriorConfig) -> PriorConfig:
    for name in ("num_virtual_tokens", "tuning"):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(
                f"{name} must be the saved adapter's {getattr(saved, name)!r}, got {getattr(config, name)!r}"
            )
    names = ["coordinates"]
    if config.says_inference:
        names += ["inference", "inference_kwargs", "prior_weight"]
    return replace(saved, **{name: getattr(config, name) for name in names})


def _from_stock(stock: dict[str, Any], stock_path: Path, weights_path: Path, is_trainable: bool) -> SavedAdapter:
    """A soft prompt saved by stock PEFT: no prior is known, so none is used."""
    if stock.get("peft_type") != "PROMPT_TUNING":
        raise ValueError(
            f"peft_type must be PROMPT_TUNING in {stock_path}, where there is no {PRIOR_CONFIG}, got "
            f"{stock.get('peft_type')!r}: load it with peft.PeftModel"
        )
    tensors = read_tensors(weights_path)
    prompt = tensors.get("prompt_embeddings")
    if prompt is None or prompt.ndim != 2 or not prompt.numel() or not torch.isfinite(prompt.float()).all():
        raise ValueError(
            f"{weights_path} must hold prompt_embeddings of shape [P, d], all finite, got "
            f"{ {name: tuple(tensor.shape) for name, tensor in tensors.items()} }"
        )
    prompt = prompt.float()
    prior = GaussianPrior(prompt.mean(0), prompt.std(correction=0).clamp_min(1e-6).expand(prompt.shape[1]).clone())
    try:
        config = PriorConfig(
            task_type=stock.get("task_type") or "CAUSAL_LM",
            num_virtual_tokens=len(prompt),
            token_dim=prompt.shape[1],
            base_model_name_or_path=stock.get("base_model_name_or_path"),
            revision=stock.get("revision"),
            prior="gaussian",
            coordinates="plain",
            prior_weight=0.0,
            inference_mode=not is_trainable,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{stock_path} must hold a valid configuration, got: {error}") from error
    return SavedAdapter(config, [], [prior], prompt[None], prompt[None].clone())
