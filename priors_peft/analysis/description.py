"""In the model's own words: what it says a prompt asks for."""

from typing import Any

import torch
from torch import Tensor

from ..architecture import decoder
from ..model import PriorPeftModel
from ..passes import Prompt, deep_prompts
from .measure import active_prompt, device_of, measuring


CARRIER = (
    "Instruction: Translate this sentence into French.\nIt asks for: a translation\n\n"
    "Instruction: Add the numbers 3 and 4.\nIt asks for: the sum of two numbers\n\nInstruction: ",
    "\nIt asks for:",
)


def describe(
    model: PriorPeftModel,
    tokenizer: Any,
    prompt: Tensor | None = None,
    layer: int = 0,
    carrier: tuple[str, str] = CARRIER,
    max_new_tokens: int = 24,
) -> str:
    """What the base model says a prompt asks for, when the prompt stands in a carrier text in a description's place.

    After Patchscopes (Ghandeharioun et al. 2024) and InSPEcT (Ramati et al. 2024). The model will say something of
    any vectors at all, and small models mostly repeat the carrier's examples: hold it against what it says of draws
    from the prior before believing it.

    Args:
        model: A model with a prompt.
        tokenizer: The base model's.
        prompt: In the place of the active one, shape `[S, P, d]`.
        layer: 0 puts the virtual tokens in as they are. l also replaces, at the input of decoder layer l, their states
            by those that the prompt has there alone, so that the carrier has no part in them.
        carrier: The text before the prompt and the text after it.
        max_new_tokens: Most tokens of the description.

    Returns:
        The first line that the model goes on with, greedily; it may be empty.
    """
    base, given = model.base_model, active_prompt(model)
    depth = base.config.get_text_config().num_hidden_layers
    if not 0 <= layer < depth:
        raise ValueError(f"layer must be between 0 and {depth - 1} for this model, got {layer}")
    if prompt is not None and prompt.shape != given.theta.shape:
        raise ValueError(f"prompt must have shape {list(given.theta.shape)}, got {list(prompt.shape)}")
    theta = given.theta if prompt is None else prompt.to(given.theta)
    patched = Prompt(theta, given.layers, [])
    embed = base.get_input_embeddings()
    with measuring(model):
        if layer:
            patched = Prompt(torch.stack([theta[0], _states_alone(model, patched, layer)]), [0, layer], [])
        before, after = (
            embed(torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], device=device_of(model)))
            for text, special in zip(carrier, (True, False), strict=True)
        )
        embeddings = torch.cat([before, theta[0].to(before.dtype), after])[None]
        with deep_prompts(base, [(len(before), patched)]):
            generated = base.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=device_of(model)),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
    return tokenizer.decode(generated[0], skip_special_tokens=True).strip().partition("\n")[0].strip()


def _states_alone(model: PriorPeftModel, prompt: Prompt, layer: int) -> Tensor:
    """Hidden states `[P, d]` that a prompt has at the input of a layer, without any text."""
    if layer in prompt.layers:
        return prompt.theta[prompt.layers.index(layer)]
    base = model.base_model
    start = prompt.theta[:1].to(base.get_input_embeddings().weight.dtype)
    with deep_prompts(base, [(0, prompt)]):
        states = decoder(base)(inputs_embeds=start, use_cache=False, output_hidden_states=True).hidden_states
    return states[layer][0].to(prompt.theta)
