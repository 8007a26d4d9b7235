"""Samples the answers of a server with vLLM, which decodes many answers faster than the package's own sampler.

vLLM is not a dependency. It receives token ids and returns token ids: prompts, end tokens and text are those of the
package, so that both engines have the same interface. Their random numbers differ, and so do the answers to a seed.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from myllm_ray.serving.engine import Token
from myllm_ray.serving.sampling import Sampling


def vllm_installed() -> bool:
    """Returns whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


class VLLMEngine:
    """Samples with vLLM's asynchronous engine.

    Args:
        folder: The model in Hugging Face format.
        end_tokens: The ids of the tokens that end an answer.
        dtype: The dtype of the weights and activations: `float32`, `bfloat16` or `float16`.
    """

    def __init__(self, folder: Path, end_tokens: Sequence[int], dtype: str):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read at import
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.end_tokens = list(end_tokens)
        self._active = 0
        # The package tokenizes and decodes. Without vLLM's generation config no setting is applied twice.
        arguments = AsyncEngineArgs(
            model=str(folder), dtype=dtype, skip_tokenizer_init=True, generation_config="vllm", trust_remote_code=False
        )
        self._llm: Any = AsyncLLM.from_engine_args(arguments)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, top: int | None = None
    ) -> AsyncGenerator[Token, None]:
        """Yields the tokens of an answer; see `serving.engine.Engine`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            top_k=(sampling.top_k or 0) if sampling.temperature else 0,
            min_p=sampling.min_p if sampling.temperature else 0.0,
            seed=seed,
            stop_token_ids=self.end_tokens,
            logprobs=top,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._active += 1
        # vLLM ends the request when its generator is closed.
        outputs = self._llm.generate({"prompt_token_ids": list(prompt)}, parameters, uuid.uuid4().hex)
        try:
            async for output in outputs:
                piece = output.outputs[0]
                for place, token in enumerate(piece.token_ids):
                    yield _token(int(token), piece.logprobs[place] if top is not None and piece.logprobs else None, top)
        finally:
            self._active -= 1
            with suppress(RuntimeError):  # it is closed already
                await outputs.aclose()

    def load(self) -> dict[str, int]:
        """Returns the number of answers in progress; vLLM has its own queue."""
        return {"active": self._active, "waiting": 0}

    def close(self) -> None:
        """Ends vLLM's processes."""
        self._llm.shutdown()


def _token(token: int, log_probs: Any, top: int | None) -> Token:
    """Returns a token with the log-probabilities that vLLM gives: by token id, with those of the drawn token."""
    if log_probs is None:
        return Token(token)
    ranked = sorted(((int(i), float(v.logprob)) for i, v in log_probs.items()), key=lambda pair: -pair[1])
    return Token(token, float(log_probs[token].logprob), tuple(ranked[:top]))
