"""The config of a run: one pydantic model a section. The shape of the YAML file, and nothing else.

No torch and no ray here: validating a config takes milliseconds. What a trainer adds stands in its own section under
its own name (`sft: {...}`), in a subclass of `TrainerConfig`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, WithJsonSchema, model_validator


class Section(BaseModel):
    """A part of the config. Unknown keys are refused: a misspelt key must not train at a default."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), serialize_by_alias=True)


def _exactly_one(section: Section, names: tuple[str, ...]) -> None:
    given = [n for n in names if getattr(section, n) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(names)} (got {', '.join(given) or 'none'})")


class LoraSection(Section):
    """Train small matrices beside frozen ones (needs the extra `lora`)."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = Field("all-linear", description="last parts of the names of the layers, such as [q_proj, v_proj]")


class ModelSection(Section):
    """Where the model comes from: a name, a config (trained from scratch) or a factory of your own."""

    name: str | None = Field(None, description="hub id, a local folder with weights, or a run's folder (or one of its checkpoints): a new "
                             "stage begins from its weights")
    config: dict[str, Any] | None = Field(None, description="a transformers config, `model_type` included: random weights")
    factory: str | None = Field(None, description="import path of a function that builds the model: my_pkg.my_mod:build")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for the factory")
    attention: Literal["sdpa", "eager"] = "sdpa"
    lora: LoraSection | None = None
    router_loss_weight: float | None = Field(None, ge=0, description="mixture of experts: weight of the loss that balances the experts' "
                                             "load; default: the model's own (router_aux_loss_coef); 0: none")
    trust_remote_code: bool = Field(False, description="run Python code that the hub folder brings along")

    @model_validator(mode="after")
    def _one(self) -> ModelSection:
        _exactly_one(self, ("name", "config", "factory"))
        if self.lora is not None and self.factory is not None:
            raise ValueError("model.lora is for models by name or config; put adapters into your own model in its factory")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs a model_type, such as llama, qwen3, gemma3_text or gpt2")
        return self


class TokenizerSection(Section):
    """Where the tokenizer comes from: a folder, a hub id, trained on the data, or the 256 bytes."""

    path: str | None = Field(None, description="a folder in Hugging Face format")
    name: str | None = Field(None, description="a Hugging Face hub id")
    train: Literal["bpe"] | None = Field(None, description="train a byte-level BPE tokenizer on the training data")
    kind: Literal["bytes"] | None = Field(None, description="bytes: one token per UTF-8 byte")
    vocab_size: PositiveInt = Field(4096, description="for `train`: size of the vocabulary, special tokens included")

    @model_validator(mode="after")
    def _one(self) -> TokenizerSection:
        _exactly_one(self, ("path", "name", "train", "kind"))
        return self


class SourceSection(Section):
    """One source of documents."""

    path: str | list[str] | None = Field(None, description="file, folder, glob or URL (s3://, gs://, hf://), or a list")
    source: Literal["python-stdlib", "arithmetic", "brackets", "snippets"] | None = Field(
        None, description="a built-in source instead of a path")
    format: str = Field("text", description="text, instruction, chat, prompt_completion, preference, unpaired, prompt, or "
                        "my_pkg.my_mod:fn")
    name: str | None = Field(None, description="the name under which this source's loss is logged")
    weight: float = Field(1.0, gt=0, description="passes over this source per epoch; 0.5 takes a new random half each time")
    fields: dict[str, str] = Field(default_factory=dict, description="rename: {field of the format: column in the data}")
    split_text: Literal["file", "paragraph", "line"] = Field(
        "file", description="what one document of a text file is; long files are cut at blank lines")
    limit: PositiveInt | None = Field(None, description="use only the first so many documents")

    @model_validator(mode="after")
    def _one(self) -> SourceSection:
        _exactly_one(self, ("path", "source"))
        return self


class ValidationSection(SourceSection):
    """Held-out documents: a share of the training data, or a source of their own."""

    split: float | None = Field(None, gt=0, lt=1, description="share of the training documents held out")

    @model_validator(mode="after")
    def _one(self) -> ValidationSection:
        _exactly_one(self, ("split", "path", "source"))
        return self


class DataSection(Section):
    """What is trained on, in which order, and how documents become rows."""

    train: SourceSection | list[SourceSection]
    validation: ValidationSection | None = None
    sequence_length: int = Field(1024, ge=2, description="tokens in a row")
    packing: bool | Literal["required"] = Field(
        True, description="put several documents in one row; none attends to another. Where the model does not keep them apart, "
                          "true has one document a row, and required is an error")
    shuffle: Literal["full", "window", "none"] = Field("full", description="order of documents, by seed and epoch")
    shuffle_window: PositiveInt = Field(65536, description="for `window`: documents shuffled together")
    overflow: Literal["truncate", "split", "error"] | None = Field(
        None, description="a document longer than a row; default: split for pretraining, truncate otherwise")
    on_bad_row: Literal["error", "skip"] = "error"
    cache: str | None = Field(None, description="folder of prepared data; default: <run.storage>/.data")

    @property
    def sources(self) -> list[SourceSection]:
        return self.train if isinstance(self.train, list) else [self.train]

    @model_validator(mode="after")
    def _some(self) -> DataSection:
        if not self.sources:
            raise ValueError("data.train is an empty list: name at least one source")
        return self


class BatchSection(Section):
    """Rows in one optimizer step (all workers together), and in one forward pass of one worker."""

    global_size: PositiveInt = 8
    micro_size: Annotated[PositiveInt, WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"const": "auto"}]})] = Field(
        1, description="auto: the largest that fits, found before the run and recorded")
    find_micro_size: bool = Field(False, description="what micro_size: auto sets; micro_size is then found before the first step")

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {**value, "micro_size": 1, "find_micro_size": True} if isinstance(value, dict) and value.get("micro_size") == "auto" else value


class ParameterGroup(Section):
    """Settings of their own for the parameters whose name matches a pattern (regular expression, `re.search`)."""

    pattern: str
    lr: PositiveFloat | None = None
    weight_decay: float | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class OptimizerSection(Section):
    """An optimizer of torch.optim by name (any case), or an import path."""

    name: str = "adamw"
    lr: PositiveFloat = 3e-4
    weight_decay: float = Field(0.0, ge=0, description="applied to matrices only: not to norms, biases, embeddings' biases")
    betas: tuple[float, float] | None = None
    eps: PositiveFloat | None = None
    momentum: float | None = None
    fused: bool | None = Field(None, description="default: where the optimizer and the device have it")
    groups: list[ParameterGroup] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments of the optimizer")


class SchedulerSection(Section):
    """The learning rate as a pure function of the optimizer step."""

    name: str = Field("constant", description="constant, linear, cosine, cosine_with_restarts, wsd, polynomial, "
                      "inverse_sqrt, or an import path of fn(progress: float) -> multiplier")
    warmup_steps: int | None = Field(None, ge=0)
    warmup_ratio: float | None = Field(None, ge=0, le=1, description="warm-up as a share of all steps")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="the multiplier at the end of the decay")
    decay_steps: PositiveInt | None = Field(None, description="step at which the decay ends; default: the run's last")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="wsd: share of all steps that decays")
    cycles: PositiveInt = Field(1, description="cosine_with_restarts: number of cycles")
    power: PositiveFloat = Field(1.0, description="polynomial: the exponent")

    @model_validator(mode="after")
    def _one_warmup(self) -> SchedulerSection:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class OffloadSection(Section):
    """What moves out of the device's memory between its uses: fsdp (parameters: cpu) and deepspeed."""

    optimizer: Literal["none", "cpu", "disk"] = Field("none", description="deepspeed, stage 1 to 3")
    parameters: Literal["none", "cpu", "disk"] = Field("none", description="deepspeed stage 3; fsdp: cpu, optimizer state too")
    path: str | None = Field(None, description="folder on a fast local disk, for `disk`")

    @model_validator(mode="after")
    def _where(self) -> OffloadSection:
        if "disk" in (self.optimizer, self.parameters) and self.path is None:
            raise ValueError("disk needs a folder: give accelerator.offload.path")
        return self


class AcceleratorSection(Section):
    """Where the tensors live, and in which precision the model computes. Master weights are always fp32."""

    name: str = Field("single", description="single, ddp, fsdp, accelerate, deepspeed, or an import path")
    stage: Literal[0, 1, 2, 3] | None = Field(None, description="deepspeed: what ZeRO shards; default 2")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    offload: OffloadSection = Field(default_factory=OffloadSection)
    activation_checkpointing: Literal["none", "full"] | PositiveInt = Field(
        "none", description="recompute activations in the backward pass: of all blocks (full), or of every n-th")
    compile: Literal["none", "model", "blocks"] = Field("none", description="torch.compile: the whole model, or each block")
    options: dict[str, Any] = Field(default_factory=dict, description="of the backend: docs/accelerators.md")

    @model_validator(mode="after")
    def _stage(self) -> AcceleratorSection:
        if self.stage is not None and self.name in ("single", "ddp", "fsdp", "accelerate"):
            raise ValueError(f"stage belongs to deepspeed, accelerator.name is {self.name}")
        return self


class ScalingSection(Section):
    """How many worker processes. 0: this very process, without Ray. [least, most]: as many as the cluster holds at the time."""

    workers: NonNegativeInt | tuple[PositiveInt, PositiveInt] = 0
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    max_failures: int = Field(0, ge=-1, description="how often workers that died are started again; -1: always")
    resources_per_worker: dict[str, float] = Field(default_factory=dict, description="custom Ray resources")
    timeout_seconds: PositiveFloat = Field(
        7200, description="timeout of torch's process group: longer than the others ever wait for rank 0, which prepares data "
                          "(torchrun), checks a checkpoint, or uploads one")

    @property
    def least(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _range(self) -> ScalingSection:
        if self.least > self.most:
            raise ValueError(f"workers: [least, most], so [{self.most}, {self.least}] instead of [{self.least}, {self.most}]")
        return self


class RunSection(Section):
    """The run's name, its folder `<storage>/<name>`, its length and its seed."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: str = "runs"
    max_steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    seed: int = Field(0, ge=0)
    determinism: Literal["default", "strict"] = Field(
        "default", description="strict: deterministic algorithms of torch only; without it, runs on CUDA agree within rounding")
    overwrite: bool = Field(False, description="replace an earlier run of the same name")


class CheckpointSection(Section):
    """When to save, what to keep, and what to go on from."""

    every_steps: PositiveInt | None = None
    at_end: bool = True
    keep_last: PositiveInt | None = Field(2, description="null keeps all")
    keep_best: str | None = Field(None, description="also keep the checkpoint with the lowest value of this metric")
    keep_every: PositiveInt | None = Field(None, description="also keep the checkpoints whose step is a multiple of this")
    mirror: str | None = Field(None, description="URL of a folder (s3://, gs://, ...) that every checkpoint is copied to as well")
    async_: bool = Field(False, alias="async", description="write in the background while training goes on")
    resume: str = Field("never", description="auto: the newest checkpoint of this run, if there is one; never; or a folder")


class StabilitySection(Section):
    """What is done about numbers that are none, about spikes, and about workers that hang."""

    on_spike: Literal["ignore", "skip", "rewind", "stop"] = Field(
        "ignore", description="a loss or gradient norm far above the last ones, or not finite (which `ignore` stops at, too)")
    zscore: PositiveFloat = Field(6.0, description="how many standard deviations above the mean of the last steps a spike is")
    history: int = Field(128, ge=2, description="number of steps that a spike is measured by")
    min_history: int = Field(16, ge=2, description="steps at the start without a judgement on spikes")
    window: PositiveInt = Field(1, description="rewind: batches that are stepped over, up to the bad one and with it")
    max_interventions: PositiveInt = Field(10, description="skips and rewinds, after which the run stops")
    hang_seconds: PositiveFloat | None = Field(
        1800, description="a worker that stays in one phase of a step for so long hangs: stacks of all are saved, and it is "
                          "started again; null: never")


class EvaluationSection(Section):
    every_steps: PositiveInt | None = None
    at_start: bool = False
    at_end: bool = True
    max_batches: PositiveInt | None = Field(None, description="global batches per evaluation; default: all")


class LoggingSection(Section):
    every_steps: PositiveInt = 1
    samples_every_steps: PositiveInt | None = Field(10, description="ppo, grpo: write some answers with their rewards to samples.jsonl")


def _default_callbacks() -> list[str | dict[str, dict[str, Any]]]:
    return ["print", "jsonl"]


class TrainerConfig(Section):
    """The config of any run. Trainers of the package extend it by a section of their own."""

    trainer: str = Field("pretrain", description="pretrain, sft, reward, dpo, ppo, grpo, or an import path: my_lab.simpo:SimPOTrainer")
    model: ModelSection
    tokenizer: TokenizerSection | None = Field(None, description="left out: the model's own, for a model by name")
    data: DataSection
    batch: BatchSection = Field(default_factory=BatchSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection)
    accelerator: AcceleratorSection = Field(default_factory=AcceleratorSection)
    scaling: ScalingSection = Field(default_factory=ScalingSection)
    run: RunSection = Field(default_factory=RunSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    stability: StabilitySection = Field(default_factory=StabilitySection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    callbacks: list[str | dict[str, dict[str, Any]]] = Field(
        default_factory=_default_callbacks,
        description="names or import paths; with options as {early_stopping: {metric: validation_loss, patience: 3}}")
    gradient_clip: PositiveFloat | None = Field(1.0, description="largest norm of the gradient; null: no clipping")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for a trainer of your own")

    @model_validator(mode="after")
    def _consistent(self) -> TrainerConfig:
        if self.tokenizer is None and self.model.name is None:
            raise ValueError("tokenizer is missing: only a model by name brings its own; give tokenizer.kind, train, path or name")
        if (self.run.max_steps is None) == (self.run.epochs is None):
            raise ValueError("run: give max_steps or epochs (exactly one): they say when the run is done")
        scaling, batch = self.scaling, self.batch
        if not self.worker_counts():
            workers = f"{max(1, scaling.least)}" if scaling.least == scaling.most else f"({scaling.least} to {scaling.most})"
            raise ValueError(
                f"batch.global_size={batch.global_size} is not divisible by scaling.workers × batch.micro_size "
                f"= {workers} × {batch.micro_size}: change one of them so that every worker gets equally many micro-batches")
        if self.accelerator.name == "single" and scaling.most > 1:
            raise ValueError(f"accelerator.name=single trains on one worker, scaling.workers={scaling.most}: "
                             "use ddp, fsdp, accelerate or deepspeed")
        return self

    @property
    def room(self) -> int | None:
        """Tokens that a prompt and one answer may have together; for prompts that are yet to be answered, the prompt alone."""
        return self.data.sequence_length

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that the trainer makes of a global batch."""
        return 1

    def worker_counts(self) -> list[int]:
        """Numbers of workers that `scaling.workers` allows and that cut the global batch into equal parts, ascending."""
        micros, rest = divmod(self.batch.global_size, self.batch.micro_size)
        return [] if rest else [n for n in range(max(1, self.scaling.least), max(1, self.scaling.most) + 1) if micros % n == 0]
