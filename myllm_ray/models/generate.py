"""Text from a trained model, to look at what it has learnt."""

from __future__ import annotations

from typing import Any

import torch

from myllm_ray.common.seeds import seed_all
from myllm_ray.models.causal_lm import CausalLM


@torch.no_grad()
def sample(model: CausalLM, tokenizer: Any, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.8,
           top_p: float = 0.95, seed: int = 0) -> list[str]:
    """A completion of each prompt. `temperature=0` takes the most likely token every time."""
    was_training = model.training
    model.eval()
    texts = []
    for number, prompt in enumerate(prompts):
        seed_all("sample", seed, number)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        random = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        output = model.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, **random)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    model.train(was_training)
    return texts
