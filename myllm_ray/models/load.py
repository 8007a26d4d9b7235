"""Construction of models from a hub id or folder, from a config (random weights), or from a user-defined factory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from myllm_ray.common.materialize import Source, attach_source, held, materialize
from myllm_ray.common.pretrained import checkpoint_in, gguf_arguments, pretrained_folder
from myllm_ray.common.quiet import without_progress_bars
from myllm_ray.common.seeds import seed_all
from myllm_ray.common.tensor_files import Box, part_of
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.architecture import (
    auto_class,
    check_fit,
    config_of_name,
    from_config,
    implementation_of,
    random_by_name,
)
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.deferred import CheckpointTensors, checkpoint_source
from myllm_ray.models.heads import ActorCritic, RewardModel
from myllm_ray.models.initialization import record_initialization
from myllm_ray.models.lora import adapter_source, add_adapters, fill_adapters
from myllm_ray.models.lora_targets import freeze
from myllm_ray.models.quantization import add_quantization, quantized_source, remove_quantization
from myllm_ray.models.routers import router_loss_weight
from myllm_ray.models.trial_forward import check_forward, one_line
from myllm_ray.models.vocabulary import check_trained, resize_embeddings, resized_source
from myllm_ray.models.weights_folder import folder_source, weight_files

WRAPPERS: dict[str, Any] = {
    "causal_lm": CausalLM,
    "reward_model": RewardModel,
    "actor_critic": ActorCritic,
    "actor_own_critic": ActorCritic,
}
"""The wrapper of the transformers model for each kind of model."""


def build_model(
    section: ModelSection, tokenizer: Any, sequence_length: int, seed: int, kind: str = "causal_lm"
) -> nn.Module:
    """Builds the model of a config with all its weights, in fp32 and in training mode.

    See `build_deferred` for the arguments and errors.
    """
    return materialize(build_deferred(section, tokenizer, sequence_length, seed, kind))


def build_deferred(
    section: ModelSection, tokenizer: Any, sequence_length: int, seed: int, kind: str = "causal_lm"
) -> nn.Module:
    """Builds the model of a config on the meta device, with the source of its weights attached.

    A sharding backend can then fill its shards without ever having the full model in memory. Random weights are a
    function of `seed` and the tensor names. Some models are returned with their weights: those of a factory, and those
    whose weights cannot be created or read one by one (Mamba; checkpoints whose tensor names differ from the model's).

    Args:
        section: The section `model` of the config.
        tokenizer: The tokenizer; determines the vocabulary size of a model from a config.
        sequence_length: The length of the training rows, in tokens.
        seed: The seed of random weights.
        kind: `causal_lm`, `reward_model`, `actor_critic` (policy and critic with a shared trunk) or `actor_own_critic`
            (policy and critic with separate trunks).

    Raises:
        ConfigError: The model cannot be built, or it does not fit the tokenizer or the sequence length.
    """
    model = _build_deferred(section, tokenizer, sequence_length, seed, kind)
    freeze(model, section.freeze)
    return model


def _build_deferred(section: ModelSection, tokenizer: Any, sequence_length: int, seed: int, kind: str) -> nn.Module:
    if section.factory:
        # A factory may draw random numbers in any order, so every rank starts it with the same seed.
        with torch.random.fork_rng(devices=[]):
            seed_all("weights", seed)
            model = load_object(section.factory, "model.factory")(**section.options)
        if not isinstance(model, PreTrainedModel):
            if section.router_loss_weight:
                raise ConfigError(
                    "model.router_loss_weight requires a transformers model; "
                    f"{section.factory} returns a {type(model).__name__}"
                )
            return cast(nn.Module, model.train())
        check_fit(model, tokenizer, sequence_length)
        return _wrapped(
            section, model, kind, copy.deepcopy(model.base_model) if kind == "actor_own_critic" else None
        ).train()
    skeleton = _skeleton(section, tokenizer, sequence_length, kind)
    source = _source(section, skeleton, seed)
    if source is not None and section.resize_vocabulary:
        source = resized_source(source, skeleton)
    if source is not None:
        # The source is recorded before layers are replaced or wrapped, which changes the names of the tensors.
        if section.lora is not None:
            add_adapters(skeleton, section.lora)
            source = adapter_source(source, seed, skeleton, section.lora)
        if section.quantize is not None:
            add_quantization(skeleton)
            source = quantized_source(source, skeleton)
        with torch.device("meta"):
            critic = copy.deepcopy(skeleton.base_model) if kind == "actor_own_critic" else None
            model = _wrapped(section, skeleton, kind, critic)
        return attach_source(model.train(), _renamed(source, skeleton))
    with torch.random.fork_rng(devices=[]):
        seed_all("weights", seed)
        whole = (
            from_config(section, tokenizer, sequence_length, kind)
            if section.name is None
            else _from_name(section, kind, len(tokenizer))
        )
    if section.lora is not None:
        add_adapters(whole, section.lora)
        fill_adapters(whole, seed, section.lora)
    if section.quantize is not None:
        add_quantization(whole)
    return _wrapped(
        section, whole, kind, copy.deepcopy(whole.base_model) if kind == "actor_own_critic" else None
    ).train()


def _wrapped(section: ModelSection, model: PreTrainedModel, kind: str, critic: nn.Module | None) -> nn.Module:
    wrapped: nn.Module = ActorCritic(model, critic) if critic is not None else WRAPPERS[kind](model)
    wrapped.router_loss_weight = router_loss_weight(wrapped.routers, model.config, section.router_loss_weight)  # type: ignore[arg-type, assignment]
    return wrapped


def _renamed(source: Source, skeleton: PreTrainedModel) -> Source:
    """Returns the source of a wrapped model.

    The trunk of a critic starts with the policy's weights, and its value head starts at zero.
    """
    hidden = int(skeleton.config.get_text_config().hidden_size)

    def renamed(name: str, box: Box | None = None) -> torch.Tensor:
        if name == "value.weight":
            return part_of(torch.zeros(1, hidden), box)
        outer, _, inner = name.partition(".")
        return source(f"{skeleton.base_model_prefix}.{inner}" if outer == "critic" else inner, box)

    return renamed


def build_skeleton(
    section: ModelSection, tokenizer: Any, sequence_length: int, kind: str = "causal_lm"
) -> nn.Module | None:
    """Builds the model without weights, on the meta device, to detect config errors before the run starts.

    It returns None for a factory, which may have side effects. It raises the same errors as `build_model`, except those
    about values that can't be read.
    """
    if section.factory:
        load_object(section.factory, "model.factory")
        return None
    skeleton = _skeleton(section, tokenizer, sequence_length, kind)
    if section.name is None:
        check_forward(skeleton.config, skeleton.config._attn_implementation, sequence_length)
    elif checkpoint_in(section.name) is None and (folder := Path(section.name).expanduser()).is_dir():
        weight_files(folder)  # a damaged file is an error before the run starts; files of the hub are checked later
    with torch.device("meta"):
        if section.lora is not None:
            add_adapters(skeleton, section.lora)
        if section.quantize is not None:
            add_quantization(skeleton)
        if section.resize_vocabulary and section.lora is not None:
            check_trained(skeleton, int(config_of_name(section).get_text_config().vocab_size))
        model = _wrapped(section, skeleton, kind, None)
    freeze(model, section.freeze)
    return model


def _skeleton(section: ModelSection, tokenizer: Any, sequence_length: int, kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        model = (
            from_config(section, tokenizer, sequence_length, kind)
            if section.name is None
            else random_by_name(section, kind, len(tokenizer))
        )
    check_fit(model, tokenizer, sequence_length)
    return model


def _source(section: ModelSection, skeleton: PreTrainedModel, seed: int) -> Source | None:
    """Returns the source of a model's weights, or None if they can't be created or read one by one."""
    random = record_initialization(skeleton, skeleton.initialize_weights, seed)
    if section.name is None:
        return None if random.dependent else random.source
    if (checkpoint := checkpoint_in(section.name)) is not None:
        tensors = _opened(checkpoint)
        return None if random.dependent - tensors.names else checkpoint_source(tensors, skeleton, random.source)
    # Dequantized by transformers, as a whole.
    if gguf_arguments(section.name) or getattr(skeleton.config, "quantization_config", None) is not None:
        return None
    folder = pretrained_folder(section.name, "model.name", weights=True, code=section.trust_remote_code)
    return folder_source(folder, skeleton, random, section.resize_vocabulary)


def _opened(checkpoint: Path) -> CheckpointTensors:
    """Returns the weights of a checkpoint; those that it does not hold are built from the config of its run."""
    tensors = CheckpointTensors(checkpoint)
    if tensors.base is None:
        return tensors
    given, seed = ModelSection.model_validate(tensors.config["model"]), int(tensors.config["run"]["seed"])
    architecture, kind = given.model_copy(update={"name": str(checkpoint), "config": None}), tensors.base["model"]
    with torch.device("meta"):
        model = random_by_name(architecture, kind, 0)
    source = _source(given, model, seed)
    if source is None:
        tokens = int(model.config.get_text_config().vocab_size)  # of the model after it was resized
        with torch.random.fork_rng(devices=[]):
            seed_all("weights", seed)
            model = random_by_name(architecture, kind, 0) if given.name is None else _from_name(given, kind, tokens)
    elif given.resize_vocabulary:
        source = resized_source(source, model)
    if given.lora is not None:
        add_adapters(model, given.lora)
        if source is None:
            fill_adapters(model, seed, given.lora)
        else:
            source = adapter_source(source, seed, model, given.lora)
    tensors.initial_names = {*model.state_dict()} & {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    if given.quantize is not None:
        add_quantization(model)
        source = source and quantized_source(source, model)
        remove_quantization(model)  # `initial` has the names of the model without quantization
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors.initial = source or held(values)
    return tensors


def _from_name(section: ModelSection, kind: str, tokens: int) -> PreTrainedModel:
    """Builds the full model of a name with its weights, for models that cannot be read tensor by tensor.

    Args:
        section: The section `model` of the config.
        kind: See `build_deferred`.
        tokens: The number of tokens of the tokenizer.
    """
    checkpoint = checkpoint_in(section.name)
    if checkpoint is not None:
        model: PreTrainedModel = random_by_name(section, kind, tokens)
        values: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        source = checkpoint_source(_opened(checkpoint), model, held(values))
        source = resized_source(source, model) if section.resize_vocabulary else source
        with torch.no_grad():
            for name, tensor in values.items():
                tensor.copy_(source(name))
        return model
    folder = pretrained_folder(section.name or "", "model.name", weights=True, code=section.trust_remote_code)
    gguf: dict[str, Any] = {**gguf_arguments(section.name or "")}
    try:
        with without_progress_bars():
            model, info = auto_class(kind).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=implementation_of(section, config_of_name(section), kind),
                trust_remote_code=section.trust_remote_code,
                **(gguf or {"use_safetensors": True}),
                **({"num_labels": 1} if kind == "reward_model" else {}),
                **(section.config or {}),
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.name: {section.name!r} can't be loaded: {one_line(error)}") from None
    except RuntimeError as error:
        if not gguf:
            raise
        # The converter of transformers ignores some sizes, such as the width of the layers of GPT-2.
        raise ConfigError(
            f"model.name: transformers reads wrong sizes from {section.name!r}: use the model's safetensors files "
            f"({one_line(error)})"
        ) from None
    # transformers initializes missing tensors randomly and only logs a warning.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("score."))
    if missing:
        raise ConfigError(
            f"model.name: {section.name!r} lacks {len(missing)} tensors of the model, such as {missing[0]}"
        )
    if section.resize_vocabulary:
        resize_embeddings(model, tokens)
    return model
