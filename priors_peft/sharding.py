"""Models whose weights lie in shards on several processes (DeepSpeed ZeRO-3, FSDP2): every process takes part in using them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


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
