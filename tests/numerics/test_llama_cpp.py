"""llama.cpp computes the exported GGUF files: the same tokens of texts, and the same next tokens, as transformers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CONFIGS, KINDS, TEXTS, ends, model_of, tokenizers_by_name

from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, byte_tokenizer
from myllm_ray.models.gguf.file import write_gguf

pytestmark = pytest.mark.slow
pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp's bindings are not installed (pip install xllamacpp)")
_TOKENS = 20
_BANNED = torch.arange(128, 263)  # llama.cpp reports log-probabilities only of tokens that end a character


@contextmanager
def serving(path: Path) -> Iterator[Any]:
    """Starts llama.cpp's server in this process and yields a function that posts to one of its endpoints."""
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 128, 1, False, 0
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama_cpp.Server(params)  # it stops when the object is deleted
    address = server.listening_address

    def post(endpoint: str, **body: Any) -> Any:
        request = urllib.request.Request(
            address + endpoint, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    yield post
    del server


def write(folder: Path, name: str, tokenizer: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    model = model_of(name, len(tokenizer) + 3)  # rows without a token, as models with a padded vocabulary have
    path = folder / "m.gguf"
    write_gguf(model.model, tokenizer, path, ends(tokenizer), dtype, "m")
    return model.model, path


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Returns the greedy next tokens, all of them ASCII, and their log-probabilities, by transformers."""
    tokens: list[int] = []
    scores: list[float] = []
    for _ in range(_TOKENS):
        last = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        tokens.append(int(last.index_fill(-1, _BANNED, -torch.inf).argmax()))
        scores.append(float(last[tokens[-1]]))
    return tokens, scores


def complete(post: Any, ids: list[int]) -> Any:
    banned = [[i, False] for i in _BANNED.tolist()]
    return post(
        "/completion",
        prompt=ids,
        n_predict=_TOKENS,
        temperature=0,
        return_tokens=True,
        n_probs=1,
        logit_bias=banned,
        cache_prompt=False,
    )


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_next_tokens_are_the_same(tmp_path: Path, name: str) -> None:
    tokenizer = byte_tokenizer()
    model, path = write(tmp_path, name, tokenizer)
    found: list[float] = []
    with serving(path) as post:
        for text in ("The river runs", "def f(x):", "12 stones, 3"):
            ids = tokenizer(text)["input_ids"]
            expected, scores = greedy(model, ids)
            answer = complete(post, ids)
            assert answer["tokens"] == expected
            for step, score in zip(answer["completion_probabilities"], scores, strict=True):
                assert step["logprob"] == pytest.approx(score, abs=2e-3)
            found += scores
    assert max(found) - min(found) > 0.1, "the model distinguishes contexts"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tokenizer = byte_tokenizer()
    model, path = write(tmp_path, "qwen3", tokenizer, dtype)  # the weights in memory are rounded to those of the file
    ids = tokenizer("The river runs")["input_ids"]
    with serving(path) as post:
        assert complete(post, ids)["tokens"] == greedy(model, ids)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_the_same(tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizers_by_name()[kind]
    _, path = write(tmp_path, "llama", tokenizer)
    chat = f"<|im_start|>user\n{TEXTS[0]}<|im_end|>\n<|endoftext|>"
    with serving(path) as post:
        for text in [*TEXTS, chat, "x" * 50, "a\n\n\nb  \n c", "don't DON'T we'LL 12345 x1y22"]:
            answer = post("/tokenize", content=text, add_special=True, parse_special=True)
            assert answer["tokens"] == tokenizer(text)["input_ids"], text


def test_the_chat_template_renders_the_same_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    _, path = write(tmp_path, "llama", tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with serving(path) as post:
        answer = post("/apply-template", messages=messages)
    assert answer["prompt"] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
