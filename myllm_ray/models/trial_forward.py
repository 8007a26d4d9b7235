"""A training step on fake tensors, which detects invalid values of `model.config` without allocating memory.

The constructors of transformers accept some values that fail only in the forward or backward pass.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.config.errors import ConfigError


def check_forward(config: Any, attention: str, sequence_length: int) -> None:
    """Runs a forward and backward pass of a short batch on fake tensors, which have shapes but no values.

    An operation that needs values fails on fake tensors with any config. An error is therefore reported only if the
    architecture's default config passes.

    Args:
        config: The transformers config.
        attention: The attention implementation.
        sequence_length: The length of the training rows, in tokens.

    Raises:
        ConfigError: A layer fails with the values of the config.
    """
    for key, value in config.to_dict().items():  # such values give NaN, or fail only on some devices
        if (key.endswith("pdrop") or "dropout" in key) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ConfigError(f"model.config.{key}={value} is not a probability")
        if key == "rope_parameters" and isinstance(value, dict) and not all(theta > 0 for theta in _thetas(value)):
            raise ConfigError(f"model.config.rope_parameters: rope_theta must be positive (got {value})")
    error = _error(config, attention, sequence_length)
    if error is not None and _error(AutoConfig.for_model(config.model_type), attention, sequence_length) is None:
        raise ConfigError(f"model.config: this {config.model_type} can't be run: {one_line(error)}")


def _thetas(rope: dict[str, Any]) -> list[float]:
    """Returns the bases of a config's rotary embeddings; there may be one per layer type."""
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [kind["rope_theta"] for kind in kinds if isinstance(kind.get("rope_theta"), (int, float))]


def _error(config: Any, attention: str, sequence_length: int) -> Exception | None:
    quiet = logging.getLogger("torch._subclasses.fake_tensor")  # logs a stack trace for the exceptions caught below
    was, quiet.disabled = quiet.disabled, True
    try:
        with FakeTensorMode():
            # The meta kernel of the experts' grouped matrix product supports only bf16.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=attention, dtype=torch.bfloat16
            ).train()
            tokens = torch.zeros(2, min(sequence_length, 16), dtype=torch.long)
            model.base_model(input_ids=tokens, position_ids=tokens, use_cache=False).last_hidden_state.sum().backward()
    except Exception as error:  # the code of an architecture may raise any exception
        return error
    finally:
        quiet.disabled = was
    return None


def one_line(error: BaseException) -> str:
    """Returns the message of an error in one line of at most 300 characters.

    The type is added if the message is empty or, as for a KeyError, unclear without it.
    """
    text = " ".join(str(error).split())[:300]
    return (
        f"{type(error).__name__}: {text}"
        if isinstance(error, (AttributeError, KeyError, IndexError, AssertionError)) or not text
        else text
    )
