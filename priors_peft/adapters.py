"""Prompts of one model: added, chosen, saved and loaded."""

import copy
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from peft import PeftModelForCausalLM
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from .architecture import check_base_model
from .config import PriorConfig
from .fitting import complete, has_free_scale, new_encoder
from .inference.base import inference_from
from .priors.reference import Provenance


if TYPE_CHECKING:
    from .hub.adapter import SavedAdapter

logger = logging.getLogger(__name__)


class AdapterModel(PeftModelForCausalLM):
    """A `PeftModel` whose adapters are prompts under priors; `PriorPeftModel` tells its arguments.

    Attributes:
        prompt_encoder: A `PriorPromptEncoder` by each prompt's name.
        provenance: Where each prompt's references came from.
    """

    prompt_encoder: Any

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PriorConfig,
        adapter_name: str = "default",
        tokenizer: Any | None = None,
        saved: "SavedAdapter | None" = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        check_base_model(model)
        self.tokenizer = tokenizer
        self.provenance: dict[str, list[Provenance]] = {}
        # PeftModel's constructor calls `add_adapter`, which can't take more arguments there.
        self._saved = saved
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.train(model.training)

    # Adding and choosing

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PriorConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained prompt: fit its prior on the reference and draw its start from it.

        Soft and deep prompts may live side by side. `low_cpu_mem_usage` and `autocast_adapter_dtype` are PEFT's and
        change nothing here: a prompt is small and always float32.
        """
        saved, self._saved = self._saved, None
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name must be new, got {adapter_name!r}, which this model already has")
        if not isinstance(peft_config, PriorConfig):
            raise TypeError(f"peft_config must be a PriorConfig, got {type(peft_config).__name__}")
        # A copy, since what is filled in belongs to this base model and the caller may use the configuration again.
        peft_config = copy.copy(peft_config)
        layers = complete(peft_config, self.base_model)
        if saved is None:
            encoder, provenance = new_encoder(self.base_model, peft_config, layers, self.tokenizer)
        else:
            encoder, provenance = saved.encoder(), saved.provenance
        if encoder.posterior is None:
            inference = inference_from(peft_config.inference, peft_config.inference_kwargs)
            encoder.posterior = inference.start(encoder)
        encoder.free_scale = has_free_scale(peft_config)
        if encoder.free_scale and not all(prior.is_gaussian for prior in encoder.priors):
            raise ValueError(
                f'prior must be Gaussian for prior_kwargs={{"scale": "evidence"}}, got {peft_config.prior!r}'
            )
        if not hasattr(self, "prompt_encoder"):
            self.prompt_encoder = nn.ModuleDict()
            self.base_model.requires_grad_(False)
        self.prompt_encoder[adapter_name] = encoder.to(self.base_model.get_input_embeddings().weight.device)
        self.peft_config[adapter_name] = peft_config
        self.provenance[adapter_name] = provenance
        self.set_requires_grad(adapter_name, adapter_name == self.active_adapter and not peft_config.inference_mode)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make a prompt the active one; it alone is trainable, unless `inference_mode`."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name must be one of {list(self.peft_config)}, got {adapter_name!r}")
        self.active_adapter = adapter_name
        for name in self.peft_config:
            self.set_requires_grad(name, name == adapter_name and not inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Turn the gradients of prompts on or off."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.prompt_encoder[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a prompt; if it was active, the first that is left becomes active."""
        if adapter_name not in self.peft_config or len(self.peft_config) == 1:
            raise ValueError(
                f"adapter_name must be one of {list(self.peft_config)} and not the last, got {adapter_name!r}"
            )
        del self.peft_config[adapter_name], self.prompt_encoder[adapter_name]
        self.provenance.pop(adapter_name, None)
        if self.active_adapter == adapter_name:
            self.set_adapter(next(iter(self.peft_config)))

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save prompts as stock PEFT adapters with sidecars and, if there is none, a card; see `hub.adapter.save_adapters`."""
        from .hub.adapter import save_adapters
        from .hub.card import CARD, write_card

        if not safe_serialization:
            raise ValueError("safe_serialization must be True, got False: prompts are saved as safetensors only")
        save_adapters(self, save_directory, selected_adapters, is_main_process)
        if is_main_process and not Path(save_directory, CARD).exists():
            try:
                write_card(save_directory)
            except (ValueError, OSError) as error:
                logger.warning("The prompt was saved, but its card could not be made: %s", error)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter with priors_peft",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        **card_options: Any,
    ) -> Any:
        """Push prompts, sidecars and card in one commit; see `priors_peft.hub.push.push_folder`."""
        from .hub.push import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                message=commit_message,
                again="Nothing is lost: call push_to_hub again, or save_pretrained and then `priors-peft push`",
                **card_options,
            )[0]

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PriorConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a prompt onto its base model.

        Args:
            model: The base model.
            model_id: A local folder or a Hub id.
            adapter_name: Name the prompt gets here.
            is_trainable: Whether to go on training it.
            config: A changed configuration, for a different `prior_weight` say; by default the saved one. `inference` and
                `prior_weight` stay as saved where it leaves both open.
            **kwargs: `revision`, `subfolder`, `token`, `cache_dir` and the like, for the Hub.

        Raises:
            ValueError: The adapter is damaged, is not a soft or deep prompt, or does not fit the base model.
        """
        from .hub.adapter import read_adapter

        hub_arguments, _ = cls._split_kwargs(kwargs)
        saved = read_adapter(model_id, config=config, is_trainable=is_trainable, **hub_arguments)
        saved.check_fits(model)
        tuned = cls(model, saved.config, adapter_name, saved=saved)
        return tuned if is_trainable else tuned.eval()

    def load_adapter(
        self,
        model_id: str,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a prompt beside the others, or the state of one that is there already (as `Trainer` does to resume)."""
        from .hub.adapter import read_adapter

        hub_arguments, _ = self._split_kwargs(kwargs)
        present = self.peft_config.get(adapter_name)
        saved = read_adapter(model_id, config=present, is_trainable=is_trainable, **hub_arguments)
        saved.check_fits(self.base_model)
        if adapter_name not in self.peft_config:
            self._saved = saved
            self.add_adapter(adapter_name, saved.config)
            self.set_requires_grad(adapter_name, is_trainable)
        else:
            saved.restore(self.prompt_encoder[adapter_name], self.peft_config[adapter_name])
        return _IncompatibleKeys([], [])
