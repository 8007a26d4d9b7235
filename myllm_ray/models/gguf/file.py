"""Writes a causal language model as one GGUF file, and compares the file with the model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from myllm_ray.common.extras import require
from myllm_ray.common.progress import Task
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.export import converted
from myllm_ray.models.generation_config import ends_of
from myllm_ray.models.gguf.architectures import architecture_of, extra_tensors
from myllm_ray.models.gguf.tokenizer import check_tokenizer, write_tokenizer
from myllm_ray.models.trial_forward import one_line
from myllm_ray.models.verification import compare_logits, load_folder, logits_of, probe, quiet

_NOT_READ = (
    "head_dim",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "n_inner",
    "n_positions",
    "layer_types",
    "query_pre_attn_scalar",
    "sliding_window",
)
"""Settings that the file states and that transformers does not read from it: the comparison takes them from the run."""


def check_gguf(model: nn.Module, tokenizer: Any, generation: GenerationConfig) -> None:
    """Checks that a model and its tokenizer can be written as GGUF.

    Raises:
        ConfigError: llama.cpp can't compute the model, or can't express the tokenizer.
        UserError: The package `gguf` is not installed.
    """
    require("gguf", "gguf", "--to gguf")
    if not isinstance(model, CausalLM):
        raise ConfigError(
            f"--to gguf needs a causal language model; this one is a {type(model).__name__} (use --to hf)"
        )
    architecture_of(model.config)
    check_tokenizer(tokenizer, ends_of(generation))


def write_gguf(
    inner: Any, tokenizer: Any, path: Path, generation: GenerationConfig, dtype: torch.dtype, name: str
) -> None:
    """Writes a model without adapters as one GGUF file, one tensor at a time.

    As in llama.cpp's own files, vectors and position embeddings are in fp32 for every dtype. The weights in memory are
    rounded to the written values.

    Args:
        inner: The transformers model.
        tokenizer: The tokenizer.
        path: The file to write.
        generation: The generation config, which names the end tokens.
        dtype: The dtype of the matrices.
        name: The name of the model in the file.

    Raises:
        UserError: A weight is too large for the dtype.
    """
    import gguf

    architecture = architecture_of(inner.config)
    kinds = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    # transformers reads a Llama whose name contains "mistral" as another architecture, for which it knows no tensors.
    if "mistral" not in name.lower():
        writer.add_name(name)
    writer.add_file_type(kinds[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.write(writer, inner.config)
    write_tokenizer(writer, tokenizer, inner.get_input_embeddings().weight.shape[0], ends_of(generation))
    round_weights(inner, dtype)
    size = 0
    for target, weight in tensors_of(inner):
        kind = dtype if is_matrix(target, weight) else torch.float32
        stored = weight.numel() * kind.itemsize
        size += stored
        writer.add_tensor_info(target, weight.shape, _stored(weight[:0], kind).dtype, stored, raw_dtype=kinds[kind][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Task("writing weights", size) as task:
        for target, weight in tensors_of(inner):
            kind = dtype if is_matrix(target, weight) else torch.float32
            data = _stored(weight, kind)
            writer.write_tensor_data(data)
            task.advance(data.nbytes)
    writer.close()


def _stored(weight: Tensor, dtype: torch.dtype) -> Any:
    """Returns the values as a numpy array; numpy has no bf16, so its bits are stored as integers."""
    weight = weight.detach().to(dtype).contiguous()
    return (weight.view(torch.uint16) if dtype == torch.bfloat16 else weight).numpy()


def is_matrix(target: str, weight: Tensor) -> bool:
    """Returns whether a tensor is written in the dtype of the export rather than in fp32."""
    return weight.dim() > 1 and target != "position_embd.weight"


def _names(inner: Any) -> Any:
    import gguf

    name = architecture_of(inner.config).name
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    return gguf.get_tensor_name_map(arch, inner.config.num_hidden_layers)


def tensors_of(inner: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the file, one at a time, by their GGUF names.

    Raises:
        ConfigError: The architecture of llama.cpp has no such tensor.
    """
    architecture, names = architecture_of(inner.config), _names(inner)
    yield from extra_tensors(inner.config).items()
    for name, parameter in inner.named_parameters():  # tied tensors are named once
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ConfigError(f"--to gguf: llama.cpp's {architecture.name} has no tensor for {name}; use --to hf")
        yield target, architecture.change(name, parameter.data, inner.config)


def round_weights(inner: Any, dtype: torch.dtype) -> None:
    """Rounds the weights that are written in a dtype, in place; they keep their own dtype.

    Raises:
        UserError: A weight is too large for the dtype.
    """
    names = _names(inner)
    for name, parameter in inner.named_parameters():
        if is_matrix(str(names.get_name(name, try_suffixes=(".weight", ".bias"))), parameter):
            parameter.data = converted(name, parameter.data, dtype).to(parameter.dtype)


def verify_gguf_logits(inner: Any, path: Path) -> None:
    """Loads the file with transformers and compares its logits with those of the model that was written.

    Raises:
        UserError: The file can't be loaded, or the logits differ.
    """
    ids = probe(inner)
    expected = logits_of(inner.float(), ids)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        for key in _NOT_READ:
            if hasattr(inner.config, key):
                setattr(config, key, getattr(inner.config, key))
        with redirect_stderr(io.StringIO()):  # a progress bar that can't be switched off
            again = load_folder(path.parent, inner, gguf_file=path.name, config=config)
    except Exception as error:  # transformers and gguf may raise any exception
        raise UserError(f"the exported file can't be loaded: {one_line(error)}; nothing is kept") from None
    compare_logits(expected, logits_of(again, ids), "the exported file")


def verify_gguf_tensors(inner: Any, path: Path) -> None:
    """Compares each tensor of the file with the model's weight, bit for bit, one at a time.

    Raises:
        UserError: A tensor is missing or differs.
    """
    import gguf
    import numpy as np

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for target, weight in tensors_of(inner):
        found = stored.pop(target, None)
        values = None if found is None else gguf.quants.dequantize(found.data, found.tensor_type)
        if values is None or not np.array_equal(values, weight.float().numpy(), equal_nan=True):
            raise UserError(f"the exported file has other values of {target} than the run's model; nothing is kept")
    if stored:
        raise UserError(f"the exported file has tensors that the model lacks, such as {min(stored)}; nothing is kept")
