"""What each of two processes of `test_fsdp2` runs: raw `fully_shard`, without a Trainer."""

import sys
from pathlib import Path

import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from priors_peft import PriorConfig, get_prior_model
from priors_peft.architecture import decoder_layers


def trained(tuning: str, folder: Path, device: torch.device, shard: bool) -> None:
    """Two steps on a batch whose rows the processes share, then a save in which all take part."""
    rank, count = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shard else (0, 1)
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, tuning=tuning), tokenizer=make_tokenizer())
    model.to(device).train()
    if shard:
        for block in decoder_layers(model.base_model):
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 90, (4, 9), generator=generator).to(device)
    mine = rows[rank * len(rows) // count : (rank + 1) * len(rows) // count]
    labels = mine.masked_fill(torch.arange(mine.shape[1], device=device) < 5, -100)
    for _ in range(2):
        output = model(input_ids=mine, labels=labels, num_items_in_batch=16)
        # FSDP2 takes the mean over processes; the prior counts once.
        (count * output.loss - output.log_prior / 1000).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder), is_main_process=rank == 0)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows).logits
    if rank == 0:
        save_file({"logits": logits.cpu().contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.distributed.init_process_group("gloo" if device.type == "cpu" else None)
    assert torch.distributed.get_world_size() == int(sys.argv[2])
    if device.type != "cpu":
        device = torch.device(device.type, torch.distributed.get_rank())
        torch.accelerator.set_device_index(device.index)
    for tuning in ("soft", "deep"):
        trained(tuning, Path(sys.argv[1]) / tuning, device, shard=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
