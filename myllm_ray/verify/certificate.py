"""The certificate of `myllm-ray verify`.

A shrunk config runs on several backends and with several splits of the batch. Each run is compared with the reference:
one process that computes the global batch as one micro-batch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import AcceleratorSection
from myllm_ray.data.tokenizer import tokenizer_section
from myllm_ray.models.shrink import small_model, without_dropout
from myllm_ray.verify.compare import TOLERANCE, distances, held_too_much
from myllm_ray.verify.diagnose import KINDS, Finding, diagnose, end_tokens_finding, leak_finding
from myllm_ray.verify.end_tokens import check_end_tokens
from myllm_ray.verify.packing import PackingCheck, check_packing
from myllm_ray.verify.runs import Runner, Variant

BACKENDS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("single", "ddp", "fsdp", "accelerate")},
    **{f"deepspeed-{stage}": {"name": "deepspeed", "stage": stage} for stage in range(4)},
}
_PLAIN: dict[str, Any] = {**AcceleratorSection().model_dump(mode="json"), "precision": "fp32", "device": "cpu"}
"""The accelerator section of the reference and of the plain backends: default values, not those of the config."""


@dataclass
class Certificate:
    """The compared runs and the result of the comparison.

    `shrunk` describes the shrunk config. `tolerance` is the largest relative difference of loss and gradient norm that
    is accepted.
    """

    shrunk: str
    tolerance: float
    rows: list[tuple[Variant, dict[str, float]]] = field(default_factory=list)
    """The compared runs, each with the largest difference of every quantity."""
    left_out: list[tuple[Variant, str]] = field(default_factory=list)
    """The runs that failed, each with its error."""
    findings: list[Finding] = field(default_factory=list)
    packing: str = ""
    """Which documents share a row, and why.

    In `rows`, `packing` is the largest relative difference between the loss and gradient norm of the first step and
    those of the same documents in separate rows. It is absent if no documents share a row, with dropout, and with a
    router loss.
    """
    end_tokens: str = ""
    """The tokens at which sampling stops, and the number of documents that train on one of them."""

    @property
    def holds(self) -> bool:
        """Whether at least one run was compared and no difference was found."""
        return bool(self.rows) and not self.findings

    def as_json(self) -> dict[str, Any]:
        """Returns the certificate as data that can be written as JSON."""
        return {
            "holds": self.holds,
            "shrunk": self.shrunk,
            "tolerance": self.tolerance,
            "packing": self.packing,
            "end_tokens": self.end_tokens,
            "runs": [
                {"backend": v.backend, "workers": v.workers, "micro_size": v.micro_size, **d} for v, d in self.rows
            ],
            "left_out": [{"run": str(v), "reason": reason} for v, reason in self.left_out],
            "findings": [
                {
                    "run": str(f.variant),
                    "step": f.difference.step,
                    "quantity": f.difference.quantity,
                    "kind": f.kind,
                    "text": str(f),
                }
                for f in self.findings
            ],
        }


def verify(
    config: TrainerConfig,
    steps: int = 5,
    backends: Iterable[str] | None = None,
    workers: int = 2,
    tell: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """Runs a shrunk config on several backends with several splits of its batch, and compares the runs.

    Args:
        config: The config, as for training.
        steps: Optimizer steps of each run.
        backends: Names of `BACKENDS`, or `own` for the config's accelerator section. Default: all backends, and `own`
            if that section is not equivalent to one of them.
        workers: The number of workers of the distributed runs; each backend also runs with one worker.
        tell: Is called with a status line before long operations.

    Returns:
        The certificate.

    Raises:
        ConfigError: A backend is unknown, or the reference can't be run.
    """
    small, shrunk = shrink(config, steps)
    with tempfile.TemporaryDirectory(prefix="myllm-ray-verify-") as folder:
        small.data.cache = str(Path(folder) / "data")
        # The first run measures the gradient norms. Its folder is separate, since the threshold of clipping may change.
        small = _biting_clip(Runner(small, Path(folder) / "first"), small)
        runner = Runner(small, Path(folder) / "runs")
        certificate = Certificate(shrunk, TOLERANCE["fp32"])
        own = config.accelerator.model_dump(mode="json")
        names = list(backends) if backends is not None else [*BACKENDS, *(["own"] if _is_special(own) else [])]
        unknown = [name for name in names if name not in BACKENDS and name != "own"]
        if unknown:
            raise ConfigError(f"--backend {unknown[0]}: choose from {', '.join(BACKENDS)}, own (that of the config)")
        sections = {name: BACKENDS.get(name, own) for name in names}
        plain = _PLAIN
        reference = Variant("single", 1, small.batch.global_size, _text({**plain, "name": "single"}))
        cuts = [replace(reference, micro_size=m) for m in (1, 2) if m < small.batch.global_size]
        variants = cuts + [
            Variant(name, w, m, _text({**plain, **section, "precision": "fp32", "device": "cpu"}))
            for name, section in sections.items()
            if name != "single"
            for w, m in dict.fromkeys(((1, 2), (workers, 1), (workers, 2)))
            if small.batch.global_size % (w * m) == 0 and (w == 1 or _is_distributed(section))
        ]
        _, dropout = without_dropout(small.model)
        off = _dropout_off(small) if dropout else ()
        packing = check_packing(small)
        certificate.packing = packing.text
        if packing.leaks:
            certificate.findings.append(leak_finding(reference, packing))
        ends = check_end_tokens(small)
        certificate.end_tokens = str(ends)
        if ends.wrong:
            certificate.findings.append(end_tokens_finding(reference, ends))
        tell(f"{len(variants) + 1} runs of {steps} steps")
        _compare(runner, certificate, reference, variants, off, None if dropout or packing.has_router_loss else packing)
        # A lower precision needs a larger tolerance, which hides small errors. It is compared only if fp32 agrees.
        if config.accelerator.precision != "fp32" and not certificate.findings:
            certificate.tolerance = TOLERANCE[config.accelerator.precision]
            precise = [
                replace(
                    v,
                    accelerator=_text({**json.loads(v.accelerator), "precision": config.accelerator.precision}),
                    backend=f"{v.backend} {config.accelerator.precision}",
                    changes=off,
                )
                for v in [reference, *variants]
                if v is reference or v.micro_size == 2
            ]
            _compare(runner, certificate, precise[0], precise[1:], ())
    return certificate


def _compare(
    runner: Runner,
    certificate: Certificate,
    reference: Variant,
    variants: list[Variant],
    off: tuple[str, ...],
    packing: PackingCheck | None = None,
) -> None:
    """Compares each variant with the reference and adds the results to the certificate.

    Args:
        off: Overrides that turn the model's dropout off.
        packing: The check of packing to add to the rows, or None.

    Raises:
        ConfigError: The reference can't be run.
    """
    expected, *traces = runner.run([reference, *variants])
    if expected.error:
        raise ConfigError(expected.error)
    for variant, trace in zip(variants, traces, strict=True):
        if trace.error:
            certificate.left_out.append((variant, trace.error))
            continue
        held = max((sum(held for held, _ in models.values()) for models in trace.parameter_bytes), default=0)
        apart = packing.distance(trace.rows[0]) if packing is not None and trace.rows else None
        certificate.rows.append(
            (
                variant,
                {
                    **distances(trace, expected),
                    "bytes_per_rank": float(held),
                    **({} if apart is None else {"packing": apart}),
                },
            )
        )
        if (unsharded := held_too_much(trace)) is not None:
            certificate.findings.append(Finding(variant, unsharded, "sharding", KINDS["sharding"]))
            continue
        finding = diagnose(runner, reference, variant, certificate.tolerance, off)
        if finding:
            certificate.findings.append(finding)


def shrink(config: TrainerConfig, steps: int) -> tuple[TrainerConfig, str]:
    """Returns the config with a small model, short rows, few documents and a small batch, and a description of it.

    Args:
        config: The config, which is not modified.
        steps: Optimizer steps of the small run.
    """
    small = config.model_copy(deep=True)
    small.tokenizer = tokenizer_section(config)
    small.model = small_model(config.model)
    small.data.sequence_length = min(config.data.sequence_length, 512)
    small.data.validation = None
    small.data.overflow = "truncate" if config.data.overflow == "error" else config.data.overflow
    for source in small.data.sources:
        source.limit = min(source.limit or 128, 128)
    small.batch.micro_size = 1
    small.batch.global_size = 4 if config.batch.global_size < 8 else 8
    small.run.epochs, small.run.max_steps, small.run.amendments, small.run.budget = None, steps, [], None
    # Within a few steps a long warm-up would never end, and the rest of the schedule would not be compared.
    if (config.scheduler.warmup_steps or 0) > 2:
        small.scheduler.warmup_steps = 2
    # A checkpoint of every step, because the weights are compared after each step.
    small.checkpoint = small.checkpoint.model_copy(
        update={
            "every_steps": 1,
            "keep_last": None,
            "keep_best": None,
            "resume": "never",
            "async_": False,
            "at_end": True,
        }
    )
    never: dict[str, Any] = {"every_steps": None, "at_start": False, "at_end": False, "tasks": []}
    small.evaluation = small.evaluation.model_copy(update=never)
    small.logging.every_steps = 1
    small.callbacks, small.tracking = ["jsonl"], []
    small.scaling = small.scaling.model_copy(update={"workers": 0, "gpus_per_worker": 0.0})
    kind = "the factory's model as it is" if config.model.factory else "a model of 2 layers"
    return small, (
        f"{kind}, rows of {small.data.sequence_length} tokens, batches of {small.batch.global_size}, {steps} steps"
    )


def _biting_clip(runner: Runner, small: TrainerConfig) -> TrainerConfig:
    """Returns the config with a clipping threshold below the smallest gradient norm, if the config clips gradients.

    With a higher threshold, clipping would not take effect in every step, and an error in it could remain undetected.

    Raises:
        ConfigError: The run fails, or no step has a gradient.
    """
    (trace,) = runner.run([Variant("single", 1, small.batch.global_size, _text({**_PLAIN, "name": "single"}))])
    if trace.error:
        raise ConfigError(trace.error)
    norms = [float(row["grad_norm"]) for row in trace.rows if row.get("grad_norm")]
    if not norms:
        raise ConfigError(
            f"no gradient in {len(trace.rows)} steps: rows of {small.data.sequence_length} tokens contain no "
            "trained token (`myllm-ray data CONFIG` shows the rows); raise data.sequence_length"
        )
    if small.gradient_clip is not None and min(norms) <= small.gradient_clip:
        small = small.model_copy(update={"gradient_clip": 0.5 * min(norms)})
    return small


def _dropout_off(config: TrainerConfig) -> tuple[str, ...]:
    """Returns the overrides that set every dropout of the model's config and of its adapters to 0."""
    before, after = config.model.config or {}, without_dropout(config.model)[0].config or {}
    adapters = ("model.lora.dropout=0.0",) if config.model.lora is not None and config.model.lora.dropout else ()
    return (*(f"model.config.{k}=0.0" for k, v in after.items() if before.get(k) != v), *adapters)


def _is_special(section: Mapping[str, Any]) -> bool:
    """Whether the accelerator section differs from every entry of `BACKENDS` in more than precision and device."""
    return (
        section["name"] not in {b["name"] for b in BACKENDS.values()}
        or bool(section["options"])
        or any(section[key] != "none" for key in ("activation_checkpointing", "compile"))
        or any(section["offload"][key] != "none" for key in ("optimizer", "parameters"))
    )


def _is_distributed(section: Mapping[str, Any]) -> bool:
    return bool(resolve("accelerators", section["name"], "accelerator.name").distributed)


def _text(section: Mapping[str, Any]) -> str:
    return json.dumps(section, sort_keys=True)
