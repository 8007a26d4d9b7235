"""Helpers for tests of preferences and reinforcement learning: fp64 models, micro-batches, a scripted sampler."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from myllm_ray.common.types import IGNORE, Batch, Micro, Position, Samples
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.heads import ActorCritic, RewardModel

VOCAB, END = 23, 1
CONFIG: dict[str, Any] = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": VOCAB,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": END,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def tiny(seed: int, kind: str = "causal_lm") -> Any:
    """Returns a tiny GPT-2 in fp64 (Llama's norms compute in fp32).

    Its random weights are large enough that the token distributions are not flat.
    """
    torch.manual_seed(seed)
    auto: Any = AutoModelForSequenceClassification if kind == "reward_model" else AutoModelForCausalLM
    extra = {"num_labels": 1} if kind == "reward_model" else {}
    model = auto.from_config(AutoConfig.for_model("gpt2", **CONFIG, **extra), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    wrapped: nn.Module = {"causal_lm": CausalLM, "reward_model": RewardModel, "actor_critic": ActorCritic}[kind](model)
    return wrapped.double().train()


def pairs(rows: list[tuple[list[int], list[int], list[int]]], extra: dict[str, list[float]] | None = None) -> Micro:
    """Returns a micro-batch of pairs from (prompt, first answer, second answer); an empty prompt makes a fill row."""
    width = max(8, max(len(p) + len(a) + len(b) for p, a, b in rows))
    ids, positions = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    segments, labels = torch.full((len(rows), width), -1), torch.full((len(rows), width), IGNORE)
    for i, parts in enumerate(rows):
        at = 0
        for number, part in enumerate(parts if parts[0] else ()):
            end = at + len(part)
            ids[i, at:end], segments[i, at:end] = torch.tensor(part), number
            first = len(parts[0]) if number else 0
            positions[i, at:end] = torch.arange(first, first + len(part))
            at = end
    numbers = {name: torch.tensor(values, dtype=torch.float32)[:, None] for name, values in (extra or {}).items()}
    documents = torch.arange(len(rows))[:, None]
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "segment_ids": segments,
        "documents": documents,
        **numbers,
    }


def log_prob(model: CausalLM, prompt: list[int], answer: list[int], temperature: float = 1.0) -> list[Tensor]:
    """Returns log p of each token of an answer after its prompt, from the logits of the unfused model."""
    logits = model.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    return [torch.log_softmax(logits[len(prompt) - 1 + t] / temperature, -1)[token] for t, token in enumerate(answer)]


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradient of every parameter, zero for a parameter without one."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    assert found.keys() == wanted.keys()
    assert any(float(g.abs().max()) > 1e-6 for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * max(1.0, float(gradient.abs().max())), name


class Scripted:
    """A sampler that returns the given answers in order."""

    temperature, end_tokens = 0.7, (END,)

    def __init__(self, answers: list[list[int]], max_new_tokens: int):
        self.answers, self.max_new_tokens = list(answers), max_new_tokens

    def __call__(self, model: nn.Module, prompts: Tensor, mask: Tensor, group: int, seeds: list[int]) -> Samples:
        taken, self.answers = self.answers[: len(seeds)], self.answers[len(seeds) :]
        tokens = torch.full((len(seeds), self.max_new_tokens), END)
        for row, answer in zip(tokens, taken, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        return Samples(tokens, torch.tensor([len(a) for a in taken]), torch.tensor([a[-1] == END for a in taken]))

    def decode(self, tokens: list[int]) -> str:
        return " ".join(str(t) for t in tokens)


class Given:
    """A reward function that returns the given numbers in order."""

    failures = 0

    def __init__(self, values: list[float], name: str = "given", weight: float = 1.0):
        self.values, self.name, self.weight = list(values), name, weight

    def __call__(self, prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        taken, self.values = self.values[: len(prompts)], self.values[len(prompts) :]
        return taken


def prompts(rows: list[list[int]]) -> Micro:
    """Returns a micro-batch of prompts; an empty prompt makes a fill row."""
    width = max(8, max(map(len, rows)))
    ids, segments = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -1)
    for i, row in enumerate(rows):
        ids[i, : len(row)], segments[i, : len(row)] = torch.tensor(row, dtype=torch.long), 0
    numbers = torch.arange(len(rows))[:, None]
    return {"input_ids": ids, "segment_ids": segments, "documents": numbers, "places": numbers}


LONGEST = 6


TEMPERATURE = Scripted.temperature


ZERO = torch.zeros((), dtype=torch.float64)


def made_up(seed: int, count: int, group: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Returns (prompts, `group` answers to each, rewards); some answers end with the end token."""
    made = random.Random(seed)
    questions = [[made.randrange(3, VOCAB) for _ in range(made.randint(1, 4))] for _ in range(count)]
    answers = []
    for i in range(count * group):
        long = i % 3 == 2
        length = LONGEST if long else made.randint(1, LONGEST - 1)
        answers.append([made.randrange(3, VOCAB) for _ in range(length - (not long))] + ([] if long else [END]))
    return questions, answers, [made.uniform(-1, 1) for _ in answers]


def shaken(model: torch.nn.Module, seed: int) -> None:
    """Perturbs the weights, which makes a slightly different policy."""
    with torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def loss_of(trainer: Any, micros: list[Micro]) -> Tensor:
    """Returns the loss of one optimizer step, computed as in the engine."""
    weight = sum(trainer.batch_weight(m) for m in micros)
    return sum((trainer.train_step(m).loss_sum for m in micros), ZERO) / weight


def cut(rows: list[list[int]], size: int) -> Batch:
    made = [prompts(rows[i : i + size]) for i in range(0, len(rows), size)]
    for number, micro in enumerate(made):
        micro["places"] = micro["places"] + number * size
    return Batch(made, Position(), Position(), 0)


def entropies(model: Any, prompt: list[int], answer: list[int]) -> list[Tensor]:
    logits = model.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    log_p = [torch.log_softmax(logits[len(prompt) - 1 + t] / TEMPERATURE, -1) for t in range(len(answer))]
    return [-(lp.exp() * lp).sum() for lp in log_p]
