"""The model card of an exported model: the README.md of a repository on the Hugging Face hub, made from a run.

It contains what the run's folder records: base model, data with hashes, config, curve, evaluations, and how to train
the model again. Secrets are masked. Paths are reduced to their last part, so that no folder of this machine is named.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import ModelCard

from myllm_ray.common.pretrained import checkpoint_in
from myllm_ray.common.secrets import mask, mask_text
from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.engine.reporting.curves import Curves, read_curves
from myllm_ray.engine.reporting.evaluations import read_results

_POINTS = 10
_EVALUATIONS = 50
_CURVES = ("loss", "validation_loss", "reward")
_PATH = re.compile(r"(?<![\w.:/~\-<])(?:~?/|[A-Za-z]:\\)(?:[^\s/\\'\"`,;|]+[/\\])*([^\s/\\'\"`,;|:]+)")
"""An absolute path, or one in the home folder, inside a text; the group is its last part. URLs do not match."""
_HUB_NAME = re.compile(r"[\w.\-]+(?:/[\w.\-]+)?")
_HUB_DATA = re.compile(r"hf://datasets/([\w.\-]+/[\w.\-]+)")
_LIBRARIES = {"adapter": "peft", "gguf": "gguf"}
_WHAT = {
    "hf": "The weights are those of the last step; adapters, if any, are merged.",
    "merged": "The LoRA adapters are merged into the weights.",
    "adapter": "This folder contains LoRA adapters, which PEFT loads onto the base model.",
    "gguf": "This folder contains one GGUF file, for llama.cpp and programs that use it.",
    "ema": "The weights are moving averages over the steps of training.",
}
_USE = {
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")""",
    "hf": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY")""",
}


def model_card(checkpoint: Path | None, folder: Path, form: str, dtype: str, license: str | None = None) -> str:
    """Returns the text of a model card.

    Args:
        checkpoint: the exported checkpoint of a run; None: a folder in Hugging Face format was exported.
        folder: the folder that the user named.
        form: the form of the export: `hf`, `merged`, `adapter`, `gguf` or `ema`.
        dtype: the dtype of the weights.
        license: the identifier of a license on the hub; None: that of the base model's card, if it is known here.

    Raises:
        ConfigError: the metadata is not valid.
    """
    manifest = {} if checkpoint is None else read_manifest(checkpoint)
    run = folder if checkpoint is None else checkpoint.parent.parent
    config = _portable(mask(manifest.get("config") or {}))
    base = ((manifest.get("config") or {}).get("model") or {}).get("name")
    front = _front(manifest, base, form, license)
    sections = [
        f"# {run.resolve().name}",
        _summary(manifest, config, base, form, dtype, front),
        _use(form, config),
        _data(manifest, config, run),
        _curve(read_curves(run / "metrics.jsonl", only=_CURVES), manifest.get("step")),
        _evaluations(run, manifest, form),
        _config(config),
        _reproduction(manifest, config, run),
    ]
    body = _without_paths(mask_text("\n\n".join(section for section in sections if section)))
    text = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}\n"
    try:
        ModelCard(text)  # parses the metadata, as the hub does
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"the model card has invalid metadata: {' '.join(str(error).split())[:200]}") from None
    return text


def _front(manifest: Mapping[str, Any], base: str | None, form: str, license: str | None) -> dict[str, Any]:
    """Returns the metadata of the card, in the terms of the hub."""
    config = manifest.get("config") or {}
    given = {"license": license} if license else _license_of(base)
    front: dict[str, Any] = {k: v for k, v in given.items() if v}
    if base is not None and _on_hub(base):
        front |= {"base_model": base, "base_model_relation": "adapter" if form == "adapter" else "finetune"}
    front["library_name"] = _LIBRARIES.get(form, "transformers")
    trainer = str(config.get("trainer", ""))
    front["pipeline_tag"] = "text-classification" if trainer == "reward" else "text-generation"
    lora = ["lora"] if (config.get("model") or {}).get("lora") else []
    front["tags"] = [
        "myllm_ray",
        *([trainer.rpartition(":")[2]] if trainer else []),
        *lora,
        *(["gguf"] * (form == "gguf")),
    ]
    sources = json.dumps((config.get("data") or {}).get("train"))
    if datasets := sorted(set(_HUB_DATA.findall(sources))):
        front["datasets"] = datasets
    return front


def _on_hub(name: str) -> bool:
    """Returns whether a model's name is a hub id rather than a folder."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).expanduser().exists()


def _license_of(base: str | None) -> dict[str, Any]:
    """Returns the license fields of the base model's card, if it is a folder with a card or in the hub's cache."""
    if base is None:
        return {}
    path: Any = Path(base).expanduser() / "README.md"
    if _on_hub(base):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base, "README.md")
    try:
        data = ModelCard.load(path).data.to_dict() if path and Path(str(path)).is_file() else {}
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # the card of the base model is not valid
        return {}
    return {key: data.get(key) for key in ("license", "license_name", "license_link")}


def _summary(
    manifest: Mapping[str, Any], config: Any, base: str | None, form: str, dtype: str, front: Mapping[str, Any]
) -> str:
    if not manifest:
        return f"An exported copy of a model in Hugging Face format. Weights: {dtype}."
    if base is None:
        start = "It was trained from random weights" if config["model"].get("config") else "A custom factory builds it"
    elif checkpoint_in(base) is not None:
        start = f"It was trained from the weights of the run `{_last(base)}`"
    elif _on_hub(base):
        start = f"It was trained from [{base}](https://huggingface.co/{base})"
    else:
        start = f"It was trained from the local model `{_last(base)}`"
    terms = f"License: {front['license']}." if "license" in front else "No license is stated for this model."
    trainer, step = config.get("trainer"), manifest["step"]
    return (
        f"A language model trained with myllm_ray, trainer `{trainer}`, for "
        f"{step:,} optimizer steps. {start}.\n\n{_WHAT[form]} Weights: {dtype}. {terms}"
    )


def _use(form: str, config: Any) -> str:
    if form == "gguf":
        return "## Use\n\n```bash\nllama-cli -m FILE.gguf -p 'Hello'\n```"
    code = _USE["adapter" if form == "adapter" else "hf"]
    if config.get("trainer") == "reward":
        code = code.replace("ForCausalLM", "ForSequenceClassification")
    return f"## Use\n\n```python\n{code}\n```"


def _data(manifest: Mapping[str, Any], config: Any, run: Path) -> str:
    """The sources with their sizes, and the hashes of all tokens and rows."""
    if not manifest:
        return ""
    summary = _json(run / "data_summary.json")
    identity = manifest.get("identity") or {}
    rows = [
        [source.get("name", ""), f"{source.get('documents', 0):,}", f"{source.get('tokens', 0):,}"]
        for source in summary.get("sources", [])
    ]
    lines = [_table(["source", "documents", "tokens"], rows)] if rows else []
    named = {"tokens": "all training tokens", "rows": "order and packing of the rows"}
    lines += [f"- hash of {what}: `{identity[key]}`" for key, what in named.items() if key in identity]
    return "## Training data\n\n" + "\n".join([*lines[:1], "", *lines[1:]] if rows else lines) if lines else ""


def _curve(curves: Curves, last: int | None) -> str:
    """A few points of the losses, up to the exported step."""
    names = [name for name in _CURVES if name in curves.series]
    if not names or last is None:
        return ""
    values = {name: dict(zip(*(a.tolist() for a in curves.points(name)), strict=True)) for name in names}
    steps = sorted({step for found in values.values() for step in found if step <= last})
    if not steps:
        return ""
    picked = sorted({steps[int(i)] for i in np.linspace(0, len(steps) - 1, min(_POINTS, len(steps))).round()})
    rows = [
        [f"{step:,}", *(f"{values[name][step]:.4f}" if step in values[name] else "" for name in names)]
        for step in picked
    ]
    return "## Curve\n\n" + _table(["step", *(name.replace("_", " ") for name in names)], rows)


def _evaluations(run: Path, manifest: Mapping[str, Any], form: str) -> str:
    """The results of `myllm-ray evaluate` for the weights of the exported checkpoint, not for their averages."""
    rows = [
        [result.data, result.sha256[:12], name, f"{value:.6g}"]
        for result in (read_results(run) if form != "ema" else ())
        if result.identity == manifest.get("checksum")
        for name, value in result.metrics.items()
    ]
    rows = rows[:_EVALUATIONS]
    return "## Evaluation\n\n" + _table(["data", "SHA-256", "metric", "value"], rows) if rows else ""


def _config(config: Any) -> str:
    if not config:
        return ""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return f"## Config\n\n<details>\n<summary>config.yaml</summary>\n\n```yaml\n{text}```\n\n</details>"


def _reproduction(manifest: Mapping[str, Any], config: Any, run: Path) -> str:
    """The command, the versions of packages, and the version of the code."""
    if not manifest:
        return ""
    environment = _json(run / "environment.json")
    versions = manifest.get("versions") or {}
    packages = {**versions, **(environment.get("packages") or {})}
    python = packages.pop("python", environment.get("python"))
    lines = [
        "## How to train it again",
        "A run is a function of its config and its data. Write the config above to `config.yaml`, set the paths of the "
        "data and of the base model, and run:",
        "```bash\nmyllm-ray train config.yaml\n```",
    ]
    command = environment.get("command") or []
    if len(command) > 1:
        words = ["myllm-ray", *(_portable(str(word)) for word in command[1:])]
        lines += ["The run was started with:", f"```bash\n{shlex.join(words)}\n```"]
    listed = ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
    lines.append(f"Packages: {f'python {python}, ' if python else ''}{listed}.")
    for name, code in sorted((environment.get("code") or {}).items()):
        git = code.get("git") or {}
        commit = f", commit {git['commit']}{' with changes' if git.get('modified') else ''}" if git else ""
        lines.append(f"Code of `{name}`: hash `{code.get('hash')}`{commit}.")
    return "\n\n".join(lines)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *(line(row) for row in rows)])


def _json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file; empty if it is missing or not valid."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _portable(value: Any) -> Any:
    """Returns a copy of a nested value in which absolute paths are reduced to their last part."""
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return _last(value) if value.startswith(("/", "~")) else _without_paths(value)


def _last(path: str) -> str:
    """Returns the last part of a path; a name without separators is returned as it is."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if "://" not in path else path


def _without_paths(text: str) -> str:
    return _PATH.sub(lambda found: found[1], text)
