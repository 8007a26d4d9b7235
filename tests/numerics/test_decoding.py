"""Decoding token by token: the same tokens as the sampler, with kept keys and values, alone and in a changing batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from test_losses import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.config import ConfigError
from myllm_ray.config.trainers import RolloutSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.decoding import BatchDecoder, SequenceDecoder, check_decodable, choose_one, stream
from myllm_ray.models.generate import HFSampler

KINDS = ["gpt2", "llama", "qwen3", "gemma3_text"]


def model_of(kind: str) -> CausalLM:
    """A tiny model whose token distributions are not flat; Gemma's window of attention is shorter than the prompts."""
    model = tiny(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def sampler_of(end: int = 1, **settings: object) -> HFSampler:
    return HFSampler(byte_tokenizer(), RolloutSection.model_validate({"max_new_tokens": 40, **settings}), (end,))


def sampled(model: CausalLM, sampler: HFSampler, prompt: list[int], seed: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = sampler(model, ids, torch.ones_like(ids), 1, [seed])
    return found.tokens[0, : int(found.lengths[0])].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 1}, {"temperature": 1.5, "top_k": 9, "min_p": 0.02}]
)
def test_a_streamed_answer_has_the_tokens_of_the_sampler(kind: str, settings: dict[str, float]) -> None:
    model = model_of(kind)
    prompts = [random.Random(seed).choices(range(50), k=3 + 5 * seed) for seed in range(6)]
    end = sampled(model, sampler_of(-1, **settings), prompts[0], 0)[7]
    sampler, decoder, lengths = sampler_of(end, **settings), SequenceDecoder(model), set()
    for seed, prompt in enumerate(prompts):
        wanted = sampled(model, sampler, prompt, seed)
        assert list(stream(decoder, sampler, prompt, seed)) == wanted
        lengths.add(len(wanted))
    assert min(lengths) <= 8, "an answer ends at the end token"


@pytest.mark.parametrize("kind", KINDS)
def test_kept_keys_and_values_change_no_logits(kind: str) -> None:
    model = model_of(kind)
    decoder = SequenceDecoder(model)
    first = [3, 4, 5, 6, 7, 8, 9, 10]
    decoder.start(first)
    for token in (20, 21, 22):
        decoder.extend(token)
    assert decoder.tokens == [*first, 20, 21, 22]
    for prompt, reused in (
        ([*first, 20, 21, 22, 30, 31], 11),  # the next turn
        ([*first, 20, 40], 9),  # another answer was recorded
        ([*first, 20, 40], 9),  # the same again: the last token is computed
        ([3, 9, 5], 1),
        ([11, 4, 5], 0),
    ):
        found = decoder.start(prompt)
        assert decoder.reused == reused
        torch.testing.assert_close(found, SequenceDecoder(model).start(prompt), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found, model.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5
        )


def test_an_interrupted_forward_pass_leaves_no_wrong_keys() -> None:
    model = model_of("llama")
    decoder = SequenceDecoder(model)
    decoder.start([3, 4, 5])
    last = model.model.model.layers[1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(interrupt)  # the first layer has the new keys, the second has not
    with pytest.raises(KeyboardInterrupt):
        decoder.extend(6)
    handle.remove()
    assert decoder.tokens == []
    torch.testing.assert_close(decoder.start([3, 4, 5, 6, 7]), SequenceDecoder(model).start([3, 4, 5, 6, 7]))


def test_the_cache_grows() -> None:
    model = model_of("llama")
    decoder = SequenceDecoder(model)
    decoder.start([1, 2])
    tokens = random.Random(0).choices(range(50), k=600)
    for token in tokens:
        logits = decoder.extend(token)
    torch.testing.assert_close(logits, SequenceDecoder(model).start([1, 2, *tokens]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_a_changing_batch_are_those_of_each_alone(kind: str) -> None:
    """Answers start at different steps with prompts of different lengths, and end in another order."""
    model = model_of(kind)
    draw = random.Random(1)
    prompts = [draw.choices(range(50), k=k) for k in (4, 17, 1, 9, 30, 6)]
    samplers = [sampler_of(max_new_tokens=n, temperature=0.9) for n in (25, 4, 13, 30, 7, 1)]
    alone = [
        list(stream(SequenceDecoder(model), s, p, 50 + i))
        for i, (p, s) in enumerate(zip(prompts, samplers, strict=True))
    ]
    batch, active, made = BatchDecoder(model), list[int](), [list[int]() for _ in prompts]
    randoms = [np.random.Generator(np.random.PCG64(50 + i)) for i in range(len(prompts))]
    starts, step, sizes = [0, 0, 3, 5, 6, 20], 0, set()
    logits: dict[int, torch.Tensor] = {}
    while step < 21 or active:
        for i, start in enumerate(starts):
            if start == step:
                logits[i] = batch.add(prompts[i])
                active.append(i)
        kept = []
        for row, i in enumerate(active):
            made[i].append(choose_one(samplers[i], logits[i], randoms[i]))
            if made[i][-1] not in samplers[i].end_tokens and len(made[i]) < samplers[i].max_new_tokens:
                kept.append(row)
        sizes.add(len(active))
        if len(kept) < len(active):
            batch.keep(kept)
            active = [active[row] for row in kept]
        if active:
            together = batch.step([made[i][-1] for i in active])
            logits = {i: together[row : row + 1] for row, i in enumerate(active)}
        step += 1
    assert made == alone
    assert max(sizes) >= 3


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50},
        {
            "model_type": "lfm2",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "full_attention"],
            "vocab_size": 50,
        },
    ],
)
def test_models_with_recurrent_layers_are_refused(config: dict[str, object]) -> None:
    given = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    with pytest.raises(ConfigError, match="recurrent layers"):
        check_decodable(CausalLM(model))
