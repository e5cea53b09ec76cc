"""Models whose weights lie in shards on several processes (DeepSpeed ZeRO-3, FSDP2): every process takes part in using them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


if TYPE_CHECKING:
    from .trainer import PriorTrainer

# What runs the base model, beside a forward pass.
_RUN_BASE_MODEL = ("generate", "run_prompt", "predicting_states")


@contextmanager
def as_launched() -> Iterator[None]:
    """While this lasts accelerate knows of DeepSpeed and FSDP; else only of what prompts are trained by, DDP."""
    states = PartialState._shared_state, AcceleratorState._shared_state
    for state in states:
        if "launched_type" in state:
            state["distributed_type"] = state["launched_type"]
    try:
        yield
    finally:
        for state in states:
            launched = state.get("distributed_type")
            if launched in (DistributedType.DEEPSPEED, DistributedType.FSDP):
                kind = state["device"].type
                state["launched_type"] = launched
                state["distributed_type"] = DistributedType("MULTI_GPU" if kind == "cuda" else f"MULTI_{kind.upper()}")


def shard_base_model(trainer: "PriorTrainer") -> None:
    """Have DeepSpeed ZeRO-3 or FSDP2 shard the frozen base model; they never see the prompts, which stay whole.

    ZeRO-1 and 2 shard what is trained, of which they are left nothing.
    """
    model: Any = trainer.model
    prompts = model._modules.pop("prompt_encoder")
    try:
        with as_launched():
            plugin = trainer.accelerator.state.deepspeed_plugin
            if trainer.is_fsdp_enabled and not isinstance(model, FSDPModule):
                # Accelerate takes a model with an optimizer only.
                trainer.accelerator.prepare(model, torch.optim.SGD(model.parameters()))
                for method in _RUN_BASE_MODEL:
                    as_forward(model, method)
            elif plugin is not None and plugin.zero_stage == 3 and not hasattr(model, "sharded_by"):
                import deepspeed
                from transformers.integrations.deepspeed import deepspeed_init

                deepspeed_init(trainer, num_training_steps=0, inference=True)
                # In a tuple, as a module would be registered. When it goes, so do its hooks.
                model.sharded_by = deepspeed.initialize(model=model, config=plugin.deepspeed_config)[:1]
    finally:
        model._modules["prompt_encoder"] = prompts
    (prompts if is_sharded(model) else model).to(trainer.args.device)


def prompts_as_ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """DDP of a model whose base model is sharded: what is reduced and kept alike is prompts."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    others = [name for name, _ in tensors if not name.startswith("prompt_encoder.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    return DistributedDataParallel(model, **options)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only its part of some weights between their uses."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or _partitioned(model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter that FSDP2 has sharded; others are as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_forward(model: nn.Module, method: str) -> Callable:
    """A method that runs the base model; FSDP2 has the weights that its root holds whole in it, as in a forward pass."""
    if isinstance(model, FSDPModule) and method not in vars(model):
        register_fsdp_forward_method(model, method)
    return getattr(model, method)


def shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape when it is whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """While this lasts, parameters that DeepSpeed has partitioned are whole."""
    parameters = list(parameters)
    if not _partitioned(parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@contextmanager
def partitioned_as(dtype: str | torch.dtype | None) -> Iterator[None]:
    """While this lasts, DeepSpeed ZeRO-3 partitions weights in that type as they are loaded, not in its settings'."""
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    settings = deepspeed_config() if is_deepspeed_zero3_enabled() else {}
    given = dict(settings)
    name = str(dtype).removeprefix("torch.")
    settings |= {"bf16": {"enabled": name == "bfloat16"}, "fp16": {"enabled": name == "float16"}}
    try:
        yield
    finally:
        settings.clear()
        settings |= given


@contextmanager
def gathered_in_turn(model: nn.Module) -> Iterator[None]:
    """The same for one module after another as they run, before DeepSpeed's engine is there to see to it."""
    contexts: dict[nn.Module, AbstractContextManager[Any]] = {}

    def gather(module: nn.Module, arguments: Any) -> None:
        contexts[module] = gathered(module.parameters(recurse=False))
        contexts[module].__enter__()

    def release(module: nn.Module, arguments: Any, output: Any) -> None:
        contexts.pop(module).__exit__(None, None, None)

    handles = []
    if _partitioned(model.parameters()):
        for module in model.modules():
            handles += [module.register_forward_pre_hook(gather), module.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state with copies of its parameters, whole; every process calls this."""
    with gathered(module.parameters()):
        state = module.state_dict()  # which makes FSDP2 shard what is whole: on every process, or they are out of step
        return state | {name: whole(parameter.detach()).clone() for name, parameter in module.named_parameters()}


def process_rank() -> int:
    """Number of this process among those that train together."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@torch.no_grad()
def share(module: nn.Module, device: torch.device) -> None:
    """Give every process the first one's state, as machines of different kinds round differently."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1 and not is_sharded(module):
        for tensor in module.state_dict().values():
            sent = tensor.to(device)
            torch.distributed.broadcast(sent, 0)
            tensor.copy_(sent)


def _partitioned(parameters: Iterable[Tensor]) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in parameters)
