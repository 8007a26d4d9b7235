"""The sections that every config has, one pydantic model per section.

They define the structure of the YAML file. This module does not import torch or ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from myllm_ray.config.lora_section import LoraSection, check_pattern
from myllm_ray.config.mixture_section import MixtureStage, check_mixture, refuse_share
from myllm_ray.config.offload_section import OffloadSection
from myllm_ray.config.section import Section


def _exactly_one(section: Section, names: tuple[str, ...]) -> None:
    """Raises ValueError unless exactly one of the keys has a value."""
    given = [n for n in names if getattr(section, n) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)} (got {', '.join(given) or 'none'})")


class ModelSection(Section):
    """The source of the model: a name, a config (random weights) or a custom factory."""

    name: str | None = Field(
        None,
        description="hub id (optionally with @revision), local folder with weights, GGUF file, or folder of a run or "
        "of one of its checkpoints, whose weights are the starting point",
    )
    config: dict[str, Any] | None = Field(
        None, description="a transformers config with `model_type`; the weights are random"
    )
    factory: str | None = Field(
        None, description="import path of a function that builds the model: my_pkg.my_mod:build"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for the factory")
    attention: Literal["auto", "sdpa", "per_document", "flex", "flash2", "flash3", "eager"] = Field(
        "auto",
        description="sdpa, eager: attention with a mask; per_document, flex, flash2, flash3: a kernel that computes "
        "each document of a packed row by itself; auto: the fastest that the model, the rows and the device support",
    )
    resize_vocabulary: bool = Field(
        False, description="if the tokenizer has more tokens than the named model: add embeddings, equal to their mean"
    )
    lora: LoraSection | None = None
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4: hold the frozen linear layers in 4 bits (QLoRA); needs model.lora"
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="regular expressions (`re.search`); parameters whose names match one of them are not trained",
    )
    router_loss_weight: float | None = Field(
        None,
        ge=0,
        description="mixture of experts: weight of the loss that balances the load of the "
        "experts; default: router_aux_loss_coef of the model; 0: no such loss",
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model's folder or hub repository")

    @model_validator(mode="after")
    def _one(self) -> ModelSection:
        _exactly_one(self, ("name", "config", "factory"))
        if self.lora is not None and self.factory is not None:
            raise ValueError(
                "model.lora requires model.name or model.config; with model.factory, add the adapters in the factory"
            )
        if self.quantize is not None and self.lora is None:
            raise ValueError("model.quantize freezes the linear layers: add adapters (model.lora: {rank: 16})")
        if self.quantize is not None and self.lora is not None:
            other = "dora" if self.lora.dora else "initialization: pissa" if self.lora.initialization == "pissa" else ""
            if other:
                raise ValueError(f"model.lora.{other} needs weights that are not quantized: leave model.quantize out")
        for pattern in self.freeze:
            check_pattern(pattern, "freeze")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs a model_type, such as llama, qwen3, gemma3_text or gpt2")
        return self


class TokenizerSection(Section):
    """The source of the tokenizer: a folder, a hub id, training on the data, or bytes."""

    path: str | None = Field(None, description="a folder in Hugging Face format, or a GGUF file")
    name: str | None = Field(None, description="a Hugging Face hub id, optionally with @revision")
    train: Literal["bpe"] | None = Field(None, description="train a byte-level BPE tokenizer on the training data")
    kind: Literal["bytes"] | None = Field(None, description="bytes: one token per UTF-8 byte")
    vocab_size: PositiveInt = Field(4096, description="for `train`: size of the vocabulary, including special tokens")
    chat_template: str | None = Field(
        None,
        description="chatml, llama3, gemma, or a file with a template in Jinja; replaces the tokenizer's own and adds "
        "the special tokens that it needs",
    )
    add_special_tokens: list[str] = Field(
        default_factory=list, description="special tokens to add; see model.resize_vocabulary"
    )

    @model_validator(mode="after")
    def _one(self) -> TokenizerSection:
        _exactly_one(self, ("path", "name", "train", "kind"))
        return self


class SourceSection(Section):
    """A source of documents."""

    path: str | list[str] | None = Field(None, description="file, folder, glob or URL (s3://, gs://, hf://), or a list")
    source: Literal["python-stdlib", "arithmetic", "brackets", "snippets"] | None = Field(
        None, description="a built-in source instead of a path"
    )
    format: str = Field(
        "text",
        description="text, instruction, chat, prompt_completion, preference, unpaired, prompt, tokens, or "
        "my_pkg.my_mod:fn",
    )
    name: str | None = Field(None, description="name under which the loss of this source is logged")
    weight: float = Field(
        1.0, gt=0, description="number of passes over this source per epoch; 0.5: a different random half per epoch"
    )
    share: float | None = Field(
        None, gt=0, le=1, description="share of the tokens of the run, in place of weight; passes begin as needed"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the format, by its Config")
    fields: dict[str, str] = Field(
        default_factory=dict, description="renamed columns: {field of the format: column of the data}"
    )
    split_text: Literal["file", "paragraph", "line"] = Field(
        "file", description="unit of a text file that is one document; long files are split at blank lines"
    )
    limit: PositiveInt | None = Field(None, description="use at most this many documents, from the start")

    @model_validator(mode="after")
    def _one(self) -> SourceSection:
        _exactly_one(self, ("path", "source"))
        return self


class ValidationSection(SourceSection):
    """Held-out documents: a share of the training data, or a separate source."""

    split: float | None = Field(None, gt=0, lt=1, description="share of the training documents held out")

    @model_validator(mode="after")
    def _one(self) -> ValidationSection:
        _exactly_one(self, ("split", "path", "source"))
        refuse_share(self)
        return self


class DataSection(Section):
    """The training and validation data, their order, and the layout of documents in rows."""

    train: SourceSection | list[SourceSection]
    validation: ValidationSection | None = None
    mixture: list[MixtureStage] | None = Field(
        None, description="shares of the sources that change in the run: a list of stages, in place of train.share"
    )
    sequence_length: int = Field(1024, ge=2, description="number of tokens per row")
    packing: bool | Literal["required"] = Field(
        True,
        description="put several documents into one row, with attention restricted to each document. If the model does "
        "not support this, true uses one document per row, and required is an error",
    )
    shuffle: Literal["full", "window", "none"] = Field("full", description="order of documents, by seed and epoch")
    shuffle_window: PositiveInt = Field(65536, description="for `window`: documents shuffled together")
    shuffle_in_memory: NonNegativeInt | None = Field(
        2**22,
        description="for `full`: up to this number of documents in an epoch, a list is shuffled; above it, the order "
        "is a permutation by formula without a list. The two orders differ. null: always a list",
    )
    overflow: Literal["truncate", "split", "error"] | None = Field(
        None, description="treatment of documents longer than a row; default: split for pretraining, truncate otherwise"
    )
    on_bad_row: Literal["error", "skip"] = "error"
    cache: str | None = Field(
        None, description="folder of prepared data that all nodes share, or its URL; default: <run.storage>/.data"
    )
    local_cache: str | None = Field(
        None,
        description="local folder for what is read from data at a URL, on each node; default: in the folder of "
        "temporary files",
    )
    local_cache_gb: PositiveFloat = Field(64.0, description="largest size of the tokens in local_cache, in GB")
    prefetch_batches: NonNegativeInt = Field(
        2, description="global batches that a thread prepares and copies to the device in advance; 0: no thread"
    )
    feed: Literal["auto", "ray", "worker"] = Field(
        "auto",
        description="what reads the rows of a run on Ray. worker: each worker reads its own; ray: tasks of Ray Data, "
        "which need a free CPU; auto: worker. The batches are the same. Without Ray the process reads its own",
    )

    @property
    def sources(self) -> list[SourceSection]:
        """The sources of the training data, as a list."""
        return self.train if isinstance(self.train, list) else [self.train]

    @model_validator(mode="after")
    def _some(self) -> DataSection:
        if not self.sources:
            raise ValueError("data.train is an empty list: name at least one source")
        check_mixture(self.sources, self.mixture)
        return self

    @property
    def has_shares(self) -> bool:
        """Whether the sources have shares of the tokens, instead of passes per epoch."""
        return self.mixture is not None or self.sources[0].share is not None


class BatchSection(Section):
    """Number of rows per optimizer step over all workers, and per forward pass of one worker."""

    global_size: PositiveInt = 8
    micro_size: Annotated[
        PositiveInt, WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"const": "auto"}]})
    ] = Field(1, description="auto: the largest size that fits in memory, determined before the run and recorded")
    find_micro_size: bool = Field(
        False, description="set by `micro_size: auto`: micro_size is determined before the first step"
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return (
            {**value, "micro_size": 1, "find_micro_size": True}
            if isinstance(value, dict) and value.get("micro_size") == "auto"
            else value
        )


class ParameterGroup(Section):
    """Settings for the parameters whose name matches a pattern (regular expression, `re.search`)."""

    pattern: str
    lr: PositiveFloat | None = None
    weight_decay: float | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class OptimizerSection(Section):
    """An optimizer of torch.optim by name, ignoring case, or by import path."""

    name: str = "adamw"
    lr: PositiveFloat = 3e-4
    weight_decay: float = Field(
        0.0, ge=0, description="applied to parameters with at least 2 dimensions, not to norms and biases"
    )
    betas: tuple[float, float] | None = None
    eps: PositiveFloat | None = None
    momentum: float | None = None
    fused: bool | None = Field(None, description="use the fused kernel; default: if it is available")
    groups: list[ParameterGroup] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict, description="additional keyword arguments of the optimizer")


class EMASection(Section):
    """The exponential moving average of the weights, which is saved, evaluated and can be exported."""

    decay: float = Field(0.999, gt=0, lt=1, description="share of the average that an update keeps")
    every_steps: PositiveInt = Field(1, description="optimizer steps between two updates")
    start_step: NonNegativeInt = Field(0, description="up to this optimizer step, the average is the weights")


class AcceleratorSection(Section):
    """The backend, its device, and the precision of the computation. Master weights are always fp32."""

    name: str = Field("single", description="single, ddp, fsdp, accelerate, deepspeed, or an import path")
    stage: Literal[0, 1, 2, 3] | None = Field(None, description="for deepspeed: ZeRO stage; default: 2")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of the sums of gradients over micro-batches and workers; bf16: docs/accelerators.md"
    )
    tf32: bool = Field(False, description="compute fp32 matrix products on a GPU in TF32: faster, rounded to 10 bits")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    offload: OffloadSection = Field(default_factory=OffloadSection)
    activation_checkpointing: Literal["none", "full"] | PositiveInt = Field(
        "none", description="recompute activations in the backward pass, for all blocks (full) or for every n-th block"
    )
    compile: Literal["none", "model", "blocks"] = Field(
        "none", description="torch.compile for the whole model, or for each block"
    )
    peak_tflops: PositiveFloat | None = Field(
        None,
        description="peak TFLOP/s of one device in the precision of the run, for the metric mfu; default: from a table "
        "of GPUs",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="backend options: docs/accelerators.md")

    @model_validator(mode="after")
    def _gradients(self) -> AcceleratorSection:
        if self.gradient_dtype == "bf16" and self.precision != "bf16":
            what = f"gradient_dtype: bf16 needs gradients that are computed in bf16, and precision is {self.precision}"
            raise ValueError(f"{what}: set accelerator.precision=bf16, or leave gradient_dtype out")
        return self


class ScalingSection(Section):
    """The number of worker processes.

    0: train in this process, without Ray. [least, most]: the number that the cluster has resources for at the time.
    """

    workers: NonNegativeInt | tuple[PositiveInt, PositiveInt] = 0
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    max_failures: int = Field(0, ge=-1, description="how many times failed workers are restarted; -1: without limit")
    resources_per_worker: dict[str, float] = Field(default_factory=dict, description="custom Ray resources")
    timeout_seconds: PositiveFloat = Field(
        7200,
        description="timeout of torch's process group; it must exceed the time that rank 0 needs to prepare data "
        "(torchrun), or to check or upload a checkpoint, while the other ranks wait",
    )

    @property
    def least(self) -> int:
        """The smallest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The largest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _range(self) -> ScalingSection:
        if self.least > self.most:
            raise ValueError(
                f"workers is [least, most]: write [{self.most}, {self.least}] instead of [{self.least}, {self.most}]"
            )
        return self


class CheckpointSection(Section):
    """When to save checkpoints, which ones to keep, and which one to resume from."""

    every_steps: PositiveInt | None = None
    at_end: bool = True
    keep_last: PositiveInt | None = Field(2, description="number of newest checkpoints to keep; null keeps all")
    keep_best: str | None = Field(None, description="also keep the checkpoint with the lowest value of this metric")
    keep_every: PositiveInt | None = Field(
        None, description="also keep the checkpoints whose step is a multiple of this"
    )
    mirror: str | None = Field(
        None, description="URL of a folder (s3://, gs://, ...) to which every checkpoint is also copied"
    )
    async_: bool = Field(False, alias="async", description="write in the background while training continues")
    resume: str = Field(
        "never",
        description="auto: the newest checkpoint of this run, if any; never; or the folder of a checkpoint or run",
    )


class LoggingSection(Section):
    """How often metrics and samples are written."""

    every_steps: PositiveInt = 1
    samples_every_steps: PositiveInt | None = Field(
        10, description="ppo, grpo: interval at which some answers and their rewards are written to samples.jsonl"
    )
    profile: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="[first, last]: steps that rank 0 profiles, into the folder `profile` of the run"
    )

    @model_validator(mode="after")
    def _ascending(self) -> LoggingSection:
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: the first step {self.profile[0]} is after the last one, {self.profile[1]}")
        return self
