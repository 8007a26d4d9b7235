"""Imports what every test process needs.

The fork server of `spawned` imports it once, so that a process starts in tenths of a second.
"""

from __future__ import annotations

import contextlib

import accelerate  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401 # DeepSpeed's first initialize
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

from myllm_ray import worker  # noqa: F401
from myllm_ray.accelerators import ddp, deepspeed, fsdp, hf_accelerate  # noqa: F401
from myllm_ray.common.quiet import quieten
from myllm_ray.trainers import causal_lm, preference, sft  # noqa: F401

quieten(cuda=False)
with contextlib.suppress(ImportError):  # Linux only
    import deepspeed as _  # noqa: F401
