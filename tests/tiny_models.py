"""Tiny models in Hugging Face format, for tests of chats and servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.common.quiet import without_progress_bars
from myllm_ray.data.tokenizer import byte_tokenizer

REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template without system messages."""


def write_model(folder: Path, template: str | None, seed: int = 0, positions: int = 512) -> Path:
    """Writes a tiny Llama with random weights and one token per byte."""
    torch.manual_seed(seed)
    config = {k: v for k, v in LLAMA.items() if k != "model_type"}
    tokenizer = byte_tokenizer()
    made = AutoConfig.for_model("llama", **config, vocab_size=len(tokenizer), max_position_embeddings=positions)
    model: Any = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    with without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
