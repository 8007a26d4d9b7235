"""The table in docs/models-supported.md: which causal language models of transformers isolate packed documents.

    python tests/models_table.py            write the table (`make models-supported`)
    python tests/models_table.py mamba lfm2 print these rows only

Every model type is probed in a separate process, which is ended when it computes for too long.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models-supported.md"
BEGIN, END = "<!-- table: make models-supported -->\n", "<!-- end of table -->\n"
SECONDS = 120
_SLOW = 5.0
"""CPU seconds of a first probe after which the other probes are skipped.

Models with large image towers, which are not shrunk, exceed it.
"""
BY_POSITION, NOT_CAUSAL, NO, UNKNOWN = (
    "by position ids",
    "refused: looks ahead",
    "no: one document a row",
    "could not be built",
)

NEEDED: dict[str, dict[str, Any]] = {
    # Types whose defaults build no model, or omit the kind of layer that characterizes them.
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "modernbert-decoder": {"pad_token_id": 0},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "xlm": {"causal": True},
}


def probe(model_type: str) -> dict[str, Any]:
    """Returns the content of a table row as plain data."""
    from myllm_ray.config.sections import ModelSection
    from myllm_ray.models.isolation import probe_isolation

    begun = time.process_time()
    for attention in ("sdpa", "eager"):
        section = ModelSection(config={"model_type": model_type, **NEEDED.get(model_type, {})}, attention=attention)
        found = probe_isolation(section)
        if found.isolated is not None or "scaled_dot" not in found.reason:
            break
    row = {"attention": attention, "leak": found.leak, "reason": found.reason}
    if found.isolated is None:
        return {**row, "verdict": UNKNOWN}
    if not found.causal:
        return {**row, "verdict": NOT_CAUSAL}
    if time.process_time() - begun < _SLOW:
        row["padded"] = probe_isolation(section, "causal_lm", "padded").isolated
        row["rollouts"] = probe_isolation(section, "actor_own_critic", "rollouts").isolated
    return {**row, "verdict": BY_POSITION if found.isolated else NO}


def probe_all(names: list[str]) -> dict[str, dict[str, Any]]:
    """Probes each type in a fork of this process, so that a hang or crash ends only that fork."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            path = Path(folder) / f"{number}.json"
            child = os.fork()
            if child == 0:
                resource.setrlimit(
                    resource.RLIMIT_CPU, (SECONDS, SECONDS)
                )  # CPU time, which does not depend on other load of the machine
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                path.write_text(json.dumps(probe(name)))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            why = (
                f"ended by signal {os.WTERMSIG(status)} after at most {SECONDS} s of computing"
                if os.WIFSIGNALED(status)
                else "its process failed"
            )
            found[name] = (
                json.loads(path.read_text()) if path.exists() else {"verdict": UNKNOWN, "attention": "", "reason": why}
            )
            print(row_of(name, found[name]), file=sys.stderr, flush=True)
    return found


def row_of(name: str, row: dict[str, Any]) -> str:
    verdict, reason = row["verdict"], str(row["reason"])
    note = ""
    if verdict == UNKNOWN:
        note = re.sub(r"^it could not be tried on a small model \((.*)\)$", r"\1", reason).replace("|", "/")
        note = re.sub(r"^model\.config: transformers can't build this [^:]*: ", "", note)[:110]
    elif verdict == NO:
        kernels = re.search(r"CUDA kernels of ([^,]*),", reason)
        note = f"{row['leak']:.1g} nats" + (f"; sequence boundaries: kernels of {kernels[1]}" if kernels else "")
    if row.get("padded") is False:
        note += "; padding changes its document: refused"
    if row.get("rollouts") is not None and row["rollouts"] != (verdict == BY_POSITION):
        note += "; rollouts: " + ("several a row" if row["rollouts"] else "one a row")
    return f"| `{name}` | {row['attention']} | {verdict} | {note.removeprefix('; ')} |"


def all_names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table(found: dict[str, dict[str, Any]]) -> str:
    import torch
    import transformers

    counts = {
        verdict: sum(row["verdict"] == verdict for row in found.values())
        for verdict in (BY_POSITION, NO, NOT_CAUSAL, UNKNOWN)
    }
    head = (
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}: {len(found)} model types; "
        + ", ".join(f"{verdict}: {count}" for verdict, count in counts.items())
        + ".\n\n"
        "| model type | attention | keeps packed documents apart | |\n|---|---|---|---|\n"
    )
    return head + "".join(f"{row_of(name, row)}\n" for name, row in found.items())


def written() -> dict[str, str]:
    """Returns the verdicts in the page, by model type."""
    rows = re.findall(r"^\| `([^`]+)` \| \w* \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.M)
    return {name: verdict.strip() for name, verdict in rows}


def main() -> None:
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    import myllm_ray.models.isolation  # noqa: F401  (once, not in each fork)

    torch.set_num_threads(1)  # a process with threads can't be forked safely
    transformers.logging.set_verbosity_error()
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    found = probe_all(names or all_names())
    if "--json" in sys.argv:
        print(json.dumps(found))
    elif not names:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
