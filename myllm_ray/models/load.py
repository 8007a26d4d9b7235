"""Construction of models from a hub id or folder, from a config (random weights), or from a user-defined factory."""

from __future__ import annotations

import copy
import difflib
import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from myllm_ray.common.materialize import Source, attach_source, materialize
from myllm_ray.common.pretrained import architecture_folder, checkpoint_in, pretrained_folder
from myllm_ray.common.quiet import without_progress_bars
from myllm_ray.common.seeds import seed_all
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.deferred import CheckpointTensors, checkpoint_source, folder_source, record_initialization
from myllm_ray.models.heads import ActorCritic, RewardModel
from myllm_ray.models.lora import adapter_source, add_adapters, fill_adapters
from myllm_ray.models.lora_targets import freeze
from myllm_ray.models.routers import router_loss_weight
from myllm_ray.models.trial_forward import check_forward, one_line

WRAPPERS: dict[str, Any] = {
    "causal_lm": CausalLM,
    "reward_model": RewardModel,
    "actor_critic": ActorCritic,
    "actor_own_critic": ActorCritic,
}
"""The wrapper of the transformers model for each kind of model."""
_TOO_FEW = (
    "the model has {} token embeddings, the tokenizer {} tokens: use the model's own tokenizer, or leave "
    "model.config.vocab_size out"
)


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
        _check_fit(model, tokenizer, sequence_length)
        return _wrapped(
            section, model, kind, copy.deepcopy(model.base_model) if kind == "actor_own_critic" else None
        ).train()
    skeleton = _skeleton(section, tokenizer, sequence_length, kind)
    source = _source(section, skeleton, seed)
    if source is not None:
        # The source is recorded before adapters and wrappers are added, which change the names of the tensors.
        if section.lora is not None:
            add_adapters(skeleton, section.lora)
            source = adapter_source(source, seed, skeleton, section.lora)
        with torch.device("meta"):
            critic = copy.deepcopy(skeleton.base_model) if kind == "actor_own_critic" else None
            model = _wrapped(section, skeleton, kind, critic)
        return attach_source(model.train(), _renamed(source, skeleton))
    with torch.random.fork_rng(devices=[]):
        seed_all("weights", seed)
        whole = (
            _from_config(section, tokenizer, sequence_length, kind)
            if section.name is None
            else _from_name(section, kind)
        )
    if section.lora is not None:
        add_adapters(whole, section.lora)
        fill_adapters(whole, seed, section.lora)
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

    def renamed(name: str) -> torch.Tensor:
        if name == "value.weight":
            return torch.zeros(1, hidden)
        outer, _, inner = name.partition(".")
        return source(f"{skeleton.base_model_prefix}.{inner}" if outer == "critic" else inner)

    return renamed


def build_skeleton(
    section: ModelSection, tokenizer: Any, sequence_length: int, kind: str = "causal_lm"
) -> nn.Module | None:
    """Builds the model without weights, on the meta device, to detect config errors before the run starts.

    It returns None for a factory, which may have side effects. It raises the same errors as `build_model`, except those
    about unreadable weights.
    """
    if section.factory:
        load_object(section.factory, "model.factory")
        return None
    skeleton = _skeleton(section, tokenizer, sequence_length, kind)
    if section.name is None:
        check_forward(skeleton.config, section.attention, sequence_length)
    with torch.device("meta"):
        if section.lora is not None:
            add_adapters(skeleton, section.lora)
        model = _wrapped(section, skeleton, kind, None)
    freeze(model, section.freeze)
    return model


def _auto(kind: str) -> Any:
    return AutoModelForSequenceClassification if kind == "reward_model" else AutoModelForCausalLM


def _skeleton(section: ModelSection, tokenizer: Any, sequence_length: int, kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        model = (
            _from_config(section, tokenizer, sequence_length, kind)
            if section.name is None
            else _random_by_name(section, kind)
        )
    _check_fit(model, tokenizer, sequence_length)
    return model


def _source(section: ModelSection, skeleton: PreTrainedModel, seed: int) -> Source | None:
    try:
        random = record_initialization(skeleton, skeleton.initialize_weights, seed)
    # RuntimeError: the initialization reads values, which meta tensors do not have.
    except (NotImplementedError, RuntimeError):
        return None
    if section.name is None:
        return random
    if (checkpoint := checkpoint_in(section.name)) is not None:
        return checkpoint_source(_opened(checkpoint), skeleton, random)
    folder = pretrained_folder(section.name, "model.name", weights=True, code=section.trust_remote_code)
    # The score head is not required: it is randomly initialized if the folder contains a language model.
    return folder_source(
        folder, {name for name, _ in skeleton.named_parameters() if not name.startswith("score.")}, random
    )


def _opened(checkpoint: Path) -> CheckpointTensors:
    """Returns the weights of a checkpoint; those that it does not hold are built from the config of its run."""
    tensors = CheckpointTensors(checkpoint)
    if tensors.base is None:
        return tensors
    given, seed = ModelSection.model_validate(tensors.config["model"]), int(tensors.config["run"]["seed"])
    architecture, kind = given.model_copy(update={"name": str(checkpoint), "config": None}), tensors.base["model"]
    with torch.device("meta"):
        model = _random_by_name(architecture, kind)
    source = _source(given, model, seed)
    if source is None:
        with torch.random.fork_rng(devices=[]):
            seed_all("weights", seed)
            model = _random_by_name(architecture, kind) if given.name is None else _from_name(given, kind)
    if given.lora is not None:
        add_adapters(model, given.lora)
        if source is None:
            fill_adapters(model, seed, given.lora)
        else:
            source = adapter_source(source, seed, model, given.lora)
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors.initial = source or values.__getitem__
    tensors.initial_names = {*values} & {*model.state_dict()}
    return tensors


def config_of(section: ModelSection) -> Any:
    """Returns the transformers config of a model section without a factory."""
    if section.name is not None:
        return _config_of_name(section)
    given = dict(section.config or {})
    return AutoConfig.for_model(given.pop("model_type"), **given)


def _config_of_name(section: ModelSection) -> Any:
    """Returns the config of a folder, a run or a hub id, updated with `section.config`.

    `without_dropout` sets values in `section.config` for a model with a name.
    """
    name = section.name or ""
    checkpoint = checkpoint_in(name)
    if checkpoint is not None:
        folder = architecture_folder(checkpoint)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.name: {checkpoint} is a checkpoint, but {folder} does not contain the config of its model: "
                "use the run's folder, or export the run"
            )
    else:
        folder = pretrained_folder(name, "model.name", code=section.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code, **(section.config or {}))
    except Exception as error:  # invalid JSON, invalid values, or errors in the folder's own code
        raise ConfigError(f"model.name: {name!r} can't be loaded: {one_line(error)}") from None


def _random_by_name(section: ModelSection, kind: str) -> PreTrainedModel:
    """Builds the model of a name with random weights."""
    config = _config_of_name(section)
    if kind == "reward_model":
        config.num_labels = 1
    model: PreTrainedModel = _auto(kind).from_config(
        config, attn_implementation=section.attention, dtype=torch.float32, trust_remote_code=section.trust_remote_code
    )
    return model


def _from_config(section: ModelSection, tokenizer: Any, sequence_length: int, kind: str) -> PreTrainedModel:
    given = dict(section.config or {})
    model_type = given.pop("model_type")
    try:
        default = AutoConfig.for_model(model_type)
    except (ValueError, TypeError):
        raise ConfigError(
            f"model.config.model_type: transformers has no model type {model_type!r}; examples are llama, qwen3, "
            "gemma3_text and gpt2"
        ) from None
    for key in given:
        if not hasattr(default, key) and not _reads(default, key):
            close = difflib.get_close_matches(key, [k for k in vars(default) if not k.startswith("_")], 1)
            hint = f"did you mean {close[0]}?" if close else f"{type(default).__name__} has no such setting"
            raise ConfigError(f"unknown key model.config.{key}: {hint}")
    if not isinstance(given.setdefault("vocab_size", len(tokenizer)), int):
        raise ConfigError(
            f"model.config.vocab_size={given['vocab_size']!r} is not an integer; "
            "leave it out to use the tokenizer's size"
        )
    if given["vocab_size"] < len(tokenizer):
        raise ConfigError(_TOO_FEW.format(given["vocab_size"], len(tokenizer)))
    given.setdefault("eos_token_id", tokenizer.eos_token_id)
    given.setdefault("bos_token_id", tokenizer.bos_token_id)
    given.setdefault("pad_token_id", None)
    positions = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if sequence_length > getattr(default, positions, sequence_length):
        given.setdefault(positions, sequence_length)
    try:
        config = AutoConfig.for_model(model_type, **given, **({"num_labels": 1} if kind == "reward_model" else {}))
        model: PreTrainedModel = _auto(kind).from_config(
            config, attn_implementation=section.attention, dtype=torch.float32
        )
        return model
    except Exception as error:  # the code of an architecture may raise any exception for an invalid value
        raise ConfigError(f"model.config: transformers can't build this {model_type}: {one_line(error)}") from None


def _reads(config: Any, key: str) -> bool:
    """Returns whether the code of a model reads a key that its config class does not declare.

    An example is `head_dim` of Qwen3-MoE.
    """
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    module = inspect.getmodule(model_class) if model_class is not None else None
    return module is not None and f'"{key}"' in inspect.getsource(module)


def _from_name(section: ModelSection, kind: str) -> PreTrainedModel:
    """Builds the full model of a name with its weights, for models that cannot be read tensor by tensor."""
    checkpoint = checkpoint_in(section.name)
    if checkpoint is not None:
        model: PreTrainedModel = _random_by_name(section, kind)
        values: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        source = checkpoint_source(_opened(checkpoint), model, values.__getitem__)
        with torch.no_grad():
            for name, tensor in values.items():
                tensor.copy_(source(name))
        return model
    folder = pretrained_folder(section.name or "", "model.name", weights=True, code=section.trust_remote_code)
    try:
        with without_progress_bars():
            model, info = _auto(kind).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=section.attention,
                trust_remote_code=section.trust_remote_code,
                use_safetensors=True,
                **({"num_labels": 1} if kind == "reward_model" else {}),
                **(section.config or {}),
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: {section.name!r} can't be loaded: {one_line(error)}") from None
    # transformers initializes missing tensors randomly and only logs a warning.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("score."))
    if missing:
        raise ConfigError(
            f"model.name: {section.name!r} lacks {len(missing)} tensors of the model, such as {missing[0]}"
        )
    return model


def save_architecture(model: nn.Module, section: ModelSection, folder: Path) -> None:
    """Writes the config of a wrapped transformers model, so that another run can start from the checkpoints.

    The `dtype` in the config is that of the weights that training started from. For other models nothing is written.

    Args:
        model: The wrapped model.
        section: The section `model` of the config.
        folder: The folder to write to, next to the run's checkpoints.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    config = copy.deepcopy(config)
    if section.name is not None:
        config.dtype = config_of(section).dtype
    config.save_pretrained(folder)


def _check_fit(model: PreTrainedModel, tokenizer: Any, sequence_length: int) -> None:
    rows = int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])
    if rows < len(tokenizer):
        raise ConfigError(_TOO_FEW.format(rows, len(tokenizer)))
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise ConfigError(f"data.sequence_length={sequence_length} exceeds the model's maximum of {limit} positions")
