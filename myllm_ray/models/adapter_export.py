"""Export of LoRA adapters alone, as a folder that `peft.PeftModel.from_pretrained` loads onto the base model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from myllm_ray.common.extras import require
from myllm_ray.common.modules import adapted_modules
from myllm_ray.config.errors import UserError
from myllm_ray.models.export import converted
from myllm_ray.models.trial_forward import one_line
from myllm_ray.models.verification import compare_logits, load_folder, logits_of, probe, quiet, same_bits

_PREFIX = "base_model.model."
"""Prefix of the names in an adapter's file: those of the base model inside a `PeftModel`."""
_NAME = "default"


def has_adapters(inner: nn.Module) -> bool:
    """Returns whether a transformers model contains adapters."""
    return next(iter(adapted_modules(inner)), None) is not None


def adapter_tensors(inner: Any, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], list[str]]:
    """Returns what training has changed: the adapters, and the other trained parameters.

    Args:
        inner: A transformers model with adapters.
        dtype: The dtype of the tensors; None: that of the parameters.

    Returns:
        The tensors by their names in an adapter's file, and the modules that are trained in full in addition to those
        that PEFT's config names (the score head of a reward model).
    """
    peft = require("peft", "peft", "--to adapter")
    with quiet():  # PEFT warns if the embeddings are among the adapted layers
        state: dict[str, Tensor] = dict(peft.get_peft_model_state_dict(inner, adapter_name=_NAME))
    full = []
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad and not _is_saved(name, state):
            state[name] = parameter.data
            full.append(name.rpartition(".")[0])
    tensors = {
        _PREFIX + name.removeprefix(_PREFIX): converted(name, t.detach(), dtype or t.dtype).contiguous().clone()
        for name, t in state.items()
    }
    return tensors, sorted(set(full))


def _is_saved(name: str, state: dict[str, Tensor]) -> bool:
    """Returns whether a parameter is in PEFT's state, where it has no adapter name and no wrapper in its name."""
    plain = name.replace(f".modules_to_save.{_NAME}.", ".").replace(f".{_NAME}.", ".").replace(f".{_NAME}", "")
    return plain in state


def write_adapter(inner: Any, tokenizer: Any, folder: Path, base: str, dtype: torch.dtype | None = None) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and the tokenizer.

    Args:
        inner: The transformers model with adapters, which is not modified.
        tokenizer: The tokenizer to write.
        folder: The folder to create.
        base: The hub id or the folder of the base model, which is recorded in the config.
        dtype: The dtype of the written tensors; None: that of training.

    Raises:
        UserError: PEFT is not installed, or a weight is too large for the dtype.
    """
    tensors, full = adapter_tensors(inner, dtype)
    config = copy.deepcopy(inner.peft_config[_NAME])
    config.base_model_name_or_path = base
    config.task_type = "CAUSAL_LM" if inner.get_output_embeddings() is not None else "SEQ_CLS"
    config.inference_mode = True
    if full:
        config.modules_to_save = sorted({*(config.modules_to_save or []), *full})
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def verify_adapter(inner: Any, folder: Path, base: Path, trust_remote_code: bool = False) -> None:
    """Loads the base model and the adapters from disk and compares their logits with those of the run's model.

    Args:
        inner: The run's model with its adapters, in the dtype of the exported adapters.
        folder: The exported folder.
        base: The local folder of the base model.
        trust_remote_code: Whether to run Python code of the base model's folder.

    Raises:
        UserError: The adapters can't be loaded onto the base model, or the logits differ.
    """
    peft = require("peft", "peft", "--to adapter")
    ids = probe(inner)
    labels = {"num_labels": 1} if inner.get_output_embeddings() is None else {}
    try:
        loaded = load_folder(base, inner, trust_remote_code, **labels)
        with quiet():
            again = peft.PeftModel.from_pretrained(loaded, str(folder)).get_base_model()
    except Exception as error:  # PEFT and the code of an architecture may raise any exception
        raise UserError(
            f"the exported adapter can't be loaded onto {base}: {one_line(error)}; nothing is kept"
        ) from None
    compare_logits(logits_of(inner, ids), logits_of(again, ids), "the base model with the exported adapter")


def verify_adapter_tensors(inner: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Compares the written tensors with those of the run's model, bit for bit.

    Raises:
        UserError: A tensor is missing or differs.
    """
    expected, _ = adapter_tensors(inner, dtype)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        for name, tensor in expected.items():
            if name not in names or not same_bits(file.get_tensor(name), tensor):
                raise UserError(f"the exported adapter has other values of {name} than the run's model")


def round_adapters(inner: Any, dtype: torch.dtype) -> None:
    """Rounds the trained parameters to a dtype and keeps them in their own, so that logits can be compared exactly."""
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = converted(name, parameter.data, dtype).to(parameter.dtype)
