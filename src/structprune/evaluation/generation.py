"""What a model says: greedy decoding by stock transformers, to read dense and pruned models side by side."""

from __future__ import annotations

from typing import Any

import torch

from structprune.architectures.sources.tokenizer import TextEncoder


@torch.no_grad()
def generate_text(model: Any, encoder: TextEncoder, prompt: str, max_new_tokens: int) -> str:
    """Answer `prompt` greedily by at most `max_new_tokens` tokens; without a chat template, continue it."""
    tokenizer = encoder.tokenizer
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    # Named one by one: a checkpoint's own generation settings may sample.
    ids_BS = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(ids_BS[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
