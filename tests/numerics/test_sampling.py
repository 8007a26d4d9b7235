"""Sampling: independent of the cache, a function of the seeds, and distributed as the model says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rl_helpers import CONFIG, tiny
from test_losses import tiny as tiny_of
from torch import Tensor

from myllm_ray.config.trainers import RolloutSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.generate import HFSampler
from myllm_ray.ops.rollouts import answer_tokens, training_rows
from myllm_ray.trainers.scoring import score_tokens

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [2, 3]]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    mask = torch.tensor([[i < len(r) for i in range(width)] for r in rows])
    return torch.tensor([r + [0] * (width - len(r)) for r in rows]), mask


def sampler(end: int = 1, **settings: object) -> HFSampler:
    return HFSampler(byte_tokenizer(), RolloutSection.model_validate({"max_new_tokens": 12, **settings}), (end,))


def slowly(model: CausalLM, prompt: list[int], draws: list[float], end: int, temperature: float) -> list[int]:
    """Samples token by token, without a cache and without a batch."""
    tokens: list[int] = []
    for draw in draws:
        logits = model.model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        cumulated = torch.softmax(logits.float() / temperature, -1).double().cumsum(-1)
        tokens.append(min(int((cumulated <= draw * cumulated[-1]).sum()), len(logits) - 1))
        if tokens[-1] == end:
            break
    return tokens


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma3_text"])
def test_the_cache_and_the_batch_change_nothing(kind: str) -> None:
    model = tiny_of(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    ids, mask = padded(PROMPTS)
    seeds = list(range(100, 112))
    first = sampler(temperature=0.9)(model, ids, mask, 3, seeds)
    end = next(
        int(t) for t in first.tokens[0, 3:] if 0 < (first.tokens == t).any(1).sum() < len(seeds)
    )  # some answers end with it
    found = sampler(end, temperature=0.9)(model, ids, mask, 3, seeds)
    for i, seed in enumerate(seeds):
        draws = np.random.Generator(np.random.PCG64(seed)).random(12).tolist()
        wanted = slowly(model, PROMPTS[i // 3], draws, end, 0.9)
        assert found.tokens[i, : found.lengths[i]].tolist() == wanted
        assert bool(found.ended[i]) == (wanted[-1] == end)
    assert found.ended.any()
    assert not found.ended.all()
    # The training forward pass gives the answers the probabilities with which they were drawn.
    rows = training_rows(ids, mask, found)
    places = answer_tokens(rows)
    scores = score_tokens(model, rows, places.predictors, places.targets, 0.9)
    assert len(scores.log_probs) == int(found.lengths.sum())
    assert torch.isfinite(scores.log_probs).all()


def test_an_answer_depends_on_its_seed_alone() -> None:
    model = tiny(1).eval()
    ids, mask = padded(PROMPTS)
    whole = sampler()(model, ids, mask, 2, list(range(8)))
    for i in range(4):
        alone = sampler()(model, *padded(PROMPTS[i : i + 1]), 2, [2 * i, 2 * i + 1])
        for k in range(2):
            n = int(whole.lengths[2 * i + k])
            assert whole.tokens[2 * i + k, :n].tolist() == alone.tokens[k, : alone.lengths[k]].tolist()


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Applies a chi-square test to the first token of 4000 answers."""
    model = tiny(2).eval()
    ids, mask = padded([[3, 4, 5]])
    found = sampler(max_new_tokens=1, temperature=1.3)(model, ids, mask, 4000, list(range(4000)))
    p = torch.softmax(model.model(input_ids=ids).logits[0, -1].detach() / 1.3, -1)
    counts = torch.bincount(found.tokens[:, 0], minlength=CONFIG["vocab_size"])
    statistic = float(((counts - 4000 * p) ** 2 / (4000 * p)).sum())
    freedom = CONFIG["vocab_size"] - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_top_k_top_p_and_min_p() -> None:
    model = tiny(3).eval()
    ids, mask = padded([[3, 4, 5]])
    p = torch.softmax(model.model(input_ids=ids).logits[0, -1].detach(), -1)
    ordered, order = p.sort(descending=True)
    allowed = {
        "top_k": set(order[:3].tolist()),
        "min_p": set((p >= 0.3 * p.max()).nonzero().flatten().tolist()),
        "top_p": set(order[: int((ordered.cumsum(0) < 0.6).sum()) + 1].tolist()),
    }
    for name, value in (("top_k", 3), ("min_p", 0.3), ("top_p", 0.6)):
        found = sampler(max_new_tokens=1, **{name: value})(model, ids, mask, 300, list(range(300)))
        assert set(found.tokens[:, 0].tolist()) <= allowed[name], name
        assert len(set(found.tokens[:, 0].tolist())) > 1


def test_stop_texts_end_an_answer() -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", **{**CONFIG, "vocab_size": len(tokenizer)})
    model = CausalLM(AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():  # a and b are the likely tokens after any prefix
        model.model.transformer.ln_f.weight.zero_()
        model.model.transformer.ln_f.bias.fill_(1.0)
        model.model.lm_head.weight.zero_()
        model.model.lm_head.weight[[97, 98]] = 0.4
    made = HFSampler(tokenizer, RolloutSection(max_new_tokens=16, stop=["ab"]))
    ids, mask = padded([[99, 100]])
    found = made(model, ids, mask, 16, list(range(16)))
    texts = [tokenizer.decode(t[:n].tolist()) for t, n in zip(found.tokens, found.lengths, strict=True)]
    stopped = [text for text, ended in zip(texts, found.ended, strict=True) if ended and "<|endoftext|>" not in text]
    assert stopped
    for text in stopped:
        assert text.endswith("ab")
        assert text.count("ab") == 1
    assert all("ab" not in made.decode(t[:n].tolist()) for t, n in zip(found.tokens, found.lengths, strict=True))
