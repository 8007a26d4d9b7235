"""A training step without memory, to find values of `model.config` that transformers' constructors accept and its layers do not."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.config.errors import ConfigError


def check_forward(config: Any, attention: str, sequence_length: int) -> None:
    """Run a short batch forward and backward through a model of fake tensors, which have shapes and no values.

    Where an operation needs values, nothing is known and nothing is said: the architecture's own default config then fails, too.

    Raises:
        ConfigError: a layer fails for the values of the config.
    """
    for key, value in config.to_dict().items():  # these make NaNs, or fail on some devices only
        if (key.endswith("pdrop") or "dropout" in key) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ConfigError(f"model.config.{key}={value} is not a probability")
        if key == "rope_parameters" and isinstance(value, dict) and not all(theta > 0 for theta in _thetas(value)):
            raise ConfigError(f"model.config.rope_parameters: rope_theta must be positive (got {value})")
    error = _error(config, attention, sequence_length)
    if error is not None and _error(AutoConfig.for_model(config.model_type), attention, sequence_length) is None:
        raise ConfigError(f"model.config: this {config.model_type} can't be run: {one_line(error)}")


def _thetas(rope: dict[str, Any]) -> list[float]:
    """The bases of a config's rotary embeddings, which may be several, by kind of layer."""
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [kind["rope_theta"] for kind in kinds if isinstance(kind.get("rope_theta"), (int, float))]


def _error(config: Any, attention: str, sequence_length: int) -> Exception | None:
    quiet = logging.getLogger("torch._subclasses.fake_tensor")  # prints a stack for what is caught here
    was, quiet.disabled = quiet.disabled, True
    try:
        with FakeTensorMode():
            # In bf16: the meta kernel of the grouped matrix product of experts knows nothing else.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.bfloat16).train()
            tokens = torch.zeros(2, min(sequence_length, 16), dtype=torch.long)
            model.base_model(input_ids=tokens, position_ids=tokens, use_cache=False).last_hidden_state.sum().backward()
    except Exception as error:  # whatever the code of an architecture raises
        return error
    finally:
        quiet.disabled = was
    return None


def one_line(error: BaseException) -> str:
    """What an error says, in one line of limited length; its type where the text alone says little."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if isinstance(error, (AttributeError, KeyError, IndexError, AssertionError)) or not text else text
