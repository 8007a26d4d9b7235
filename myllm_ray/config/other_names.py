"""Names of other training tools and the corresponding keys and names of this package, for error messages.

The tools are transformers' TrainingArguments, TRL, axolotl, LLaMA-Factory, torchtitan and DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import get_args, get_origin

from pydantic import BaseModel

_GLOBAL_SIZE = "batch.global_size (rows of one optimizer step, over all workers)"
_ACCUMULATION = (
    "batch.global_size (rows of one optimizer step, over all workers, split into micro-batches of batch.micro_size)"
)
_BY_KEY = {
    "run.max_steps": "max_train_steps training_steps num_train_steps total_steps num_steps steps train_steps",
    "run.epochs": "num_train_epochs num_epochs n_epochs",
    "run.name": "run_name experiment_name job_name",
    "run.storage (the run's folder is <run.storage>/<run.name>)": "output_dir dump_folder save_dir out_dir "
    "checkpoint_dir",
    "run.seed": "data_seed random_seed",
    "run.overwrite": "overwrite_output_dir overwrite_cache",
    "optimizer.lr": "learning_rate base_lr max_lr peak_lr",
    "optimizer.name": "optim optimizer_name optimizer_type",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "scheduler.name": "lr_scheduler_type lr_scheduler scheduler_type lr_schedule decay_type",
    "scheduler.warmup_steps": "lr_warmup_steps num_warmup_steps warmup",
    "scheduler.warmup_ratio": "warmup_percentage",
    "scheduler.min_lr_ratio": "min_lr min_lr_rate cosine_min_lr_ratio min_lr_factor",
    "gradient_clip": "max_grad_norm max_norm grad_clip gradient_clipping clip_grad_norm gradient_clip_val",
    "batch.micro_size": "per_device_train_batch_size per_device_eval_batch_size per_device_batch_size micro_batch_size "
    "local_batch_size train_micro_batch_size_per_gpu eval_batch_size device_batch_size",
    _GLOBAL_SIZE: "batch_size global_batch_size train_batch_size",
    _ACCUMULATION: "gradient_accumulation_steps accumulate_grad_batches grad_accum grad_accum_steps "
    "gradient_accumulation",
    "data.train.path": "dataset datasets dataset_path dataset_name dataset_dir train_file train_files train_data "
    "train_dataset data_path data_files training_data",
    "data.train.format": "template dataset_type dataset_format format_type",
    "data.train.fields": "dataset_text_field text_column column_mapping",
    "data.train.share": "proportion target_ratio ratio probability probs mixture_weight sampling_ratio",
    "data.mixture": "train_weights data_mix data_mixture mixture_schedule",
    "data.train.limit": "max_samples max_train_samples",
    "data.validation.path": "eval_dataset validation_file eval_file eval_data validation_data test_datasets",
    "data.validation.split": "val_set_size val_size test_size validation_split eval_split validation_split_percentage",
    "data.sequence_length": "max_seq_length max_seq_len max_length seq_len seq_length sequence_len cutoff_len "
    "model_max_length block_size context_length max_source_length",
    "data.packing": "sample_packing neat_packing pack_sequences",
    "model.name": "model_name_or_path model_name base_model model_id model_path pretrained_model_name_or_path "
    "hf_assets_path initial_load_path",
    "model.name (as org/model@revision)": "revision model_revision revision_of_model hf_revision",
    "model.quantize": "load_in_4bit quantization_bit quantization quantization_config bnb_4bit_quant_type "
    "use_bnb_nested_quant quantize_base",
    "model.resize_vocabulary": "resize_vocab resize_token_embeddings resize_token_embeddings_to_32x",
    "model.config": "config_name base_model_config model_config",
    "model.attention": "attn_implementation attn_impl flash_attn flash_attention use_flash_attention_2",
    "model.lora": "adapter use_lora use_peft peft peft_config finetuning_type lora_config",
    "model.lora.rank": "lora_r lora_rank r",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.targets": "lora_target lora_target_modules lora_target_linear target_modules",
    "model.lora.exclude": "exclude_modules",
    "model.lora.layers": "layers_to_transform",
    "model.lora.modules_to_save": "additional_target lora_modules_to_save",
    "model.lora.rslora": "use_rslora",
    "model.lora.dora": "use_dora",
    "model.lora.initialization": "init_lora_weights",
    "model.freeze": "freeze_layers frozen_layers freeze_trainable_modules",
    "tokenizer.name": "tokenizer_name tokenizer_name_or_path tokenizer_type",
    "tokenizer.path": "tokenizer_path",
    "tokenizer.chat_template": "chat_template chat_template_jinja chat_template_path default_chat_template",
    "tokenizer.add_special_tokens": "additional_special_tokens new_special_tokens special_tokens added_tokens",
    "accelerator.name": "deepspeed fsdp strategy distributed_type backend",
    "accelerator.stage": "zero_stage zero_optimization",
    "accelerator.precision": "torch_dtype dtype mixed_precision amp half_precision_backend model_dtype",
    "accelerator.precision=bf16": "bf16 pure_bf16",
    "accelerator.precision=fp16": "fp16",
    "accelerator.activation_checkpointing": "gradient_checkpointing activation_checkpoint use_gradient_checkpointing",
    "accelerator.compile": "torch_compile",
    "scaling.workers": "num_gpus num_processes nproc_per_node world_size num_workers n_gpu data_parallel_size "
    "data_parallel_replicate_degree",
    "scaling.gpus_per_worker": "use_gpu",
    "checkpoint.every_steps": "save_steps save_every save_strategy saves_per_epoch save_interval",
    "checkpoint.keep_last": "save_total_limit keep_latest_k max_checkpoints",
    "checkpoint.keep_best": "load_best_model_at_end metric_for_best_model",
    "checkpoint.resume": "resume_from_checkpoint resume_from auto_resume_from_checkpoints load_checkpoint",
    "evaluation.every_steps": "eval_steps eval_strategy evaluation_strategy eval_every evals_per_epoch eval_interval "
    "validation_freq",
    "evaluation.at_start": "eval_on_start",
    "logging.every_steps": "logging_steps log_every log_freq log_interval logging_strategy",
    "callbacks": "report_to logger loggers",
    "stability.on_spike": "loss_watchdog_threshold",
    "sft.train_on_prompt": "train_on_inputs completion_only_loss assistant_only_loss train_on_responses_only "
    "mask_prompt train_on_source",
    "trainer (pretrain, sft, reward, dpo, ppo, grpo); ZeRO's stage is accelerator.stage": "stage",
    "trainer": "rl training_type train_type method algorithm task_type",
    "dpo.beta": "rl_beta pref_beta dpo_beta",
    "dpo.loss": "pref_loss",
    "dpo.loss or grpo.loss": "loss_type",
    "dpo.reference_model": "ref_model ref_model_name_or_path",
    "grpo.group_size": "num_generations rollouts_per_prompt",
    "grpo.reward": "reward_funcs reward_functions",
    "ppo.reward_model": "reward_model_path reward_model_name",
    "ppo.epochs": "num_ppo_epochs ppo_epochs",
    "ppo.clip": "cliprange epsilon_clip clip_range",
    "ppo.value_weight": "vf_coef",
    "ppo.kl_weight": "kl_coef kl_coeff init_kl_coef",
    "ppo.discount": "gamma_discount",
    "ppo.gae_lambda": "lam",
    "rollout.max_new_tokens": "max_completion_length response_length max_response_length generation_max_length",
}
KEYS = {name: key for key, names in _BY_KEY.items() for name in names.split()}
"""{key of another tool: the key of this package, in some cases with an explanation}."""

NAMES: dict[str, dict[str, str]] = {
    "callbacks": dict.fromkeys(("print", "progress", "printer", "progress_bar", "rich", "tqdm", "terminal"), "console"),
    "formats": {
        **dict.fromkeys(("alpaca", "instruct", "instructions", "alpaca_chat", "input_output"), "instruction"),
        **dict.fromkeys(
            (
                "sharegpt",
                "chatml",
                "chat_template",
                "conversation",
                "conversations",
                "conversational",
                "messages",
                "openai",
                "multiturn",
                "dialog",
                "dialogue",
            ),
            "chat",
        ),
        **dict.fromkeys(("completion", "pretraining", "plain", "raw", "corpus", "txt", "language_modeling"), "text"),
        **dict.fromkeys(("prompt-completion", "prompt_response", "completions", "input-output"), "prompt_completion"),
        **dict.fromkeys(
            ("dpo", "ranking", "pairwise", "comparison", "preferences", "paired", "chosen_rejected"), "preference"
        ),
        **dict.fromkeys(("kto", "unpaired_preference", "binary"), "unpaired"),
        **dict.fromkeys(("prompt_only", "prompts", "grpo", "ppo"), "prompt"),
        **dict.fromkeys(("pretokenized", "tokenized", "input_ids", "token_ids", "megatron", "npy", "numpy"), "tokens"),
    },
    "trainers": {
        **dict.fromkeys(("pt", "pretraining", "clm", "causal_lm", "cpt"), "pretrain"),
        **dict.fromkeys(("finetune", "finetuning", "fine_tuning", "instruct", "supervised"), "sft"),
        **dict.fromkeys(("rm", "reward_model", "reward_modeling", "rmtrainer"), "reward"),
        **dict.fromkeys(("ipo", "kto", "orpo", "simpo", "cpo"), "dpo (with dpo.loss)"),
        **dict.fromkeys(("gspo", "dapo", "dr_grpo"), "grpo (with grpo.loss or grpo.importance)"),
    },
    "accelerators": {
        **dict.fromkeys(("none", "cpu", "gpu", "cuda"), "single (the device: accelerator.device)"),
        **dict.fromkeys(("dp", "data_parallel", "multi_gpu"), "ddp"),
        **dict.fromkeys(("fsdp2", "fsdp1", "fully_shard"), "fsdp"),
        **{
            f"{name}{stage}": f"deepspeed (with accelerator.stage={stage})"
            for name in ("zero", "zero-", "deepspeed-")
            for stage in range(4)
        },
    },
}
"""{kind of name in the config: {name of another tool: the name in this package}}."""


def right_key(cls: type[BaseModel], location: Sequence[int | str]) -> str | None:
    """Returns the key that corresponds to an unknown key: a key of another tool, or a key in the wrong section.

    Args:
        cls: The class of the config. Only configs of runs have suggestions.
        location: The parts of the unknown key.

    Returns:
        One or more dotted keys, in some cases with an explanation, or None.
    """
    if not _is_run(cls):
        return None
    name = str(location[-1]).lower().replace("-", "_")
    wrong = ".".join(str(part) for part in location)
    if name in KEYS and KEYS[name].split()[0] != wrong:
        return KEYS[name] + _of_trainer(cls, KEYS[name].split()[0].partition("=")[0])
    return _elsewhere(cls, name, wrong.rpartition(".")[0]) or _elsewhere_by_trainer(cls, name, wrong)


def near_key(cls: type[BaseModel], name: str) -> str | None:
    """Returns the key of another section or another tool whose name is similar, or None.

    Args:
        cls: The class of the config.
        name: The last part of the unknown key.
    """
    if not _is_run(cls):
        return None
    here = {key.rpartition(".")[2] for key in keys_of(cls)}
    close = difflib.get_close_matches(name.lower(), [*here, *KEYS], 1, cutoff=0.85)
    return right_key(cls, close) if close else None


def _elsewhere(cls: type[BaseModel], name: str, section: str = "") -> str | None:
    """Returns the keys with this name, preferably in `section`, or None if there are none or more than three."""
    found = [key for key in keys_of(cls) if key.rpartition(".")[2] == name]
    found = [key for key in found if not (key.startswith(("data.validation.", "ema.")) and len(found) > 1)]
    found = [key for key in found if key.startswith(f"{section}.")] or found
    return " or ".join(found) if 0 < len(found) <= 3 else None


def _is_run(cls: type[BaseModel]) -> bool:
    from myllm_ray.config.schema import TrainerConfig  # imports this module

    return issubclass(cls, TrainerConfig)


def _elsewhere_by_trainer(cls: type[BaseModel], name: str, wrong: str) -> str | None:
    """Returns a key with this name that only the config of another trainer has, or None."""
    from myllm_ray.config.trainers import builtin_config_classes

    for trainer, other in builtin_config_classes().items():
        if other is not cls and (found := _elsewhere(other, name)):
            return f"{found} with trainer: {trainer}" if found != wrong else f"it with trainer: {trainer}"
    return None


def _of_trainer(cls: type[BaseModel], key: str) -> str:
    """Returns a suffix that names the trainer, if only the config of another trainer has the key."""
    if key in set(keys_of(cls)) or " " in key:
        return ""
    from myllm_ray.config.trainers import builtin_config_classes

    trainer = next((name for name, other in builtin_config_classes().items() if key in set(keys_of(other))), None)
    return f" with trainer: {trainer}" if trainer else ""


def keys_of(cls: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yields all dotted keys of a config class, except those in lists of sections.

    Args:
        cls: The class.
        above: The prefix of the keys.
    """
    for name, field in cls.model_fields.items():
        key = f"{above}{field.alias or name}"
        yield key
        section = _section(field.annotation)
        if section is not None:
            yield from keys_of(section, f"{key}.")


def _section(annotation: object) -> type[BaseModel] | None:
    """Returns the section in a type annotation, or None; lists of sections are ignored."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is list:
        return None
    return next((found for arg in get_args(annotation) if (found := _section(arg))), None)
