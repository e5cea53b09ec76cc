"""`priors-peft export ADAPTER --to FORMAT OUT`: a tuned prompt for other tools."""

from dataclasses import dataclass, field

from ..hub.adapter import read_adapter
from ..hub.base_model import BUNDLED, resolve_base_model
from ..hub.export import FORMATS, export_adapter
from .arguments import ModelArguments, parse
from .train import dtype_from


@dataclass
class ExportArguments:
    """What for."""

    to: str | None = field(default=None, metadata={"help": f"The format: {', '.join(FORMATS)}"})


_NEXT = {
    "peft": """\
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, {out!r})""",
    "checkpoint": """\
from transformers import pipeline
generator = pipeline("text-generation", model={out!r})""",
    "prompt-embeds": """\
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM
tokenizer, base = AutoTokenizer.from_pretrained({base!r}), AutoModelForCausalLM.from_pretrained({base!r})
prompt = load_file({out!r})["prompt_embeds"]
text = tokenizer("3 and 4 make", return_tensors="pt").input_ids
embeddings = base.get_input_embeddings()(text)[0].detach()
llm = LLM(model={base!r}, enable_prompt_embeds=True)
print(llm.generate({{"prompt_embeds": torch.cat([prompt.to(embeddings.dtype), embeddings])}})[0].outputs[0].text)""",
}
_NEXT["prefix"] = _NEXT["peft"]


def main(arguments: list[str]) -> None:
    """Write the export and print how to use it."""
    adapter, out, model_arguments, args = parse(
        (ModelArguments, ExportArguments), arguments, "priors-peft export", ["adapter", "out"]
    )
    if args.to is None:
        raise ValueError(f"to must be given: --to {' or '.join(FORMATS)}")
    export_adapter(
        adapter,
        args.to,
        out,
        base_model=model_arguments.model,
        base_revision=model_arguments.model_revision,
        dtype=dtype_from(model_arguments.dtype),
        trust_remote_code=model_arguments.trust_remote_code,
    )
    saved = read_adapter(adapter)
    base = model_arguments.model or saved.config.base_model_name_or_path
    if args.to == "prompt-embeds" and base == BUNDLED:
        base = resolve_base_model(base)
    of_posterior = ", one prompt of a posterior, whose spread stays with the adapter" if saved.posterior else ""
    print(f"Wrote {out}{of_posterior}. To use it:\n\n{_NEXT[args.to].format(out=str(out), base=base)}")
