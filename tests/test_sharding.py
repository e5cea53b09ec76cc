"""What several processes must agree on, as far as one process can show it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import make_model, make_tokenizer

from priors_peft import PriorConfig, get_prior_model
from priors_peft.checks import check_processes
from priors_peft.sharding import as_launched, is_sharded, share, whole_state


def trainer(processes: int = 8, rows: int = 8, **settings):
    """As much of a `PriorTrainer` as the checks look at."""
    plugin, deepspeed = settings.pop("plugin", None), settings.pop("deepspeed", None)
    return SimpleNamespace(
        train_dataset=range(rows),
        args=SimpleNamespace(world_size=processes, bf16=settings.pop("bf16", False), fp16=False),
        is_deepspeed_enabled=deepspeed is not None,
        is_fsdp_enabled=plugin is not None,
        accelerator=SimpleNamespace(
            state=SimpleNamespace(
                fsdp_plugin=plugin, deepspeed_plugin=SimpleNamespace(deepspeed_config=deepspeed or {})
            )
        ),
    )


@pytest.fixture
def eight_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)


def test_fewer_rows_than_processes_are_refused_with_both_numbers(eight_processes):
    check_processes(trainer(rows=8))
    with pytest.raises(ValueError, match="a row for each of the 8 processes, got 5 rows.*--num_processes 5"):
        check_processes(trainer(rows=5))


def test_processes_that_do_not_know_of_each_other_are_refused(eight_processes):
    with pytest.raises(ValueError, match="started 8 processes, but accelerate sees 1: .*accelerate_configs/"):
        check_processes(trainer(processes=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"deepspeed": {"optimizer": {}, "scheduler": {}}},
            "must not name optimizer, scheduler: .* lr_scheduler_type",
        ),
        ({"deepspeed": {}, "bf16": True}, "bf16 and fp16 must be off under DeepSpeed and FSDP"),
        ({"plugin": SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False)}, "fsdp_version 2"),
        ({"plugin": SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True)}, "efficient_loading false"),
    ],
)
def test_what_a_sharded_model_can_not_honour_is_refused(eight_processes, settings, message):
    with pytest.raises(ValueError, match=message):
        check_processes(trainer(**settings))


def test_accelerate_knows_of_deepspeed_only_where_the_base_model_is_sharded(monkeypatch):
    states = {"distributed_type": DistributedType.DEEPSPEED, "device": torch.device("cpu")}, {}
    monkeypatch.setattr(PartialState, "_shared_state", states[0])
    monkeypatch.setattr(AcceleratorState, "_shared_state", states[1])
    with as_launched():  # the first trainer makes its accelerator
        states[1].update(states[0])
    for _ in range(2):
        assert [state["distributed_type"] for state in states] == [DistributedType.MULTI_CPU] * 2
        with as_launched():
            assert [state["distributed_type"] for state in states] == [DistributedType.DEEPSPEED] * 2


def test_every_process_gets_the_first_ones_prior_and_prompt(eight_processes, monkeypatch):
    encoder = get_prior_model(
        make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=make_tokenizer()
    ).prompt_encoder
    first = {name: tensor + 1 for name, tensor in encoder.state_dict().items()}
    sent = iter(first.values())
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.copy_(next(sent)))
    share(encoder, torch.device("cpu"))
    assert all(torch.equal(tensor, first[name]) for name, tensor in encoder.state_dict().items())


def test_a_whole_model_is_not_sharded_and_its_state_is_its_own():
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=make_tokenizer())
    state = whole_state(model.prompt_encoder["default"])
    assert not is_sharded(model) and state.keys() == model.prompt_encoder["default"].state_dict().keys()
    assert torch.equal(state["coordinate"], model.prompt_encoder["default"].coordinate)
