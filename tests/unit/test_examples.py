"""Records: formats of preferences and prompts, their tokens, their micro-batches, and the synthetic tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig

from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.data import formats
from myllm_ray.data.builtin import tasks
from myllm_ray.data.collate import to_arrow, to_tensors
from myllm_ray.data.examples import (
    LengthLimits,
    PromptRow,
    columns_of,
    join,
    prompt_of,
    prompt_row,
    split,
    tokenize_example,
)
from myllm_ray.data.formats import BadRow, Labelled, Messages, Preference, Prompt
from myllm_ray.data.prepare import prepare
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.ops.pairs import answers, last_tokens, one_answer_per_row, shared_prompt_mask
from myllm_ray.preparation import absolute, check_model

END = byte_tokenizer().eos_token_id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, "are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "x"}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": "x", "rejected": "  "}, "'rejected' is empty"),
        ({"chosen": "x", "rejected": "y"}, "no field 'prompt'"),
        ({"prompt": "a", "chosen": "x", "rejected": [{"role": "assistant", "content": "y"}]}, "must all be texts"),
        ({"prompt": "a", "chosen": "x", "rejected": "y", "margin": float("nan")}, "'margin' is nan"),
        ({"prompt": [{"role": "user"}], "chosen": "x", "rejected": "y"}, r"prompt\[0\] has no text content"),
        (
            {"chosen": [{"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]},
            "need messages in common",
        ),
    ],
)
def test_bad_preferences(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        formats.preference(row)


def test_formats() -> None:
    talk = [{"role": "user", "content": "q"}]
    full = formats.preference(
        {
            "chosen": [*talk, {"role": "assistant", "content": "x"}],
            "rejected": [*talk, {"role": "assistant", "content": "y"}],
        }
    )
    assert full == Preference(
        Messages(talk),
        Messages([{"role": "assistant", "content": "x"}]),
        Messages([{"role": "assistant", "content": "y"}]),
    )
    assert formats.unpaired({"prompt": "a", "completion": "b", "label": 1}) == Labelled("a", "b", True)
    with pytest.raises(BadRow, match="'label' is 'yes'"):
        formats.unpaired({"prompt": "a", "completion": "b", "label": "yes"})
    assert formats.prompt({"prompt": "a", "answer": 3}) == Prompt("a", {"answer": 3})


def test_tokens_of_records() -> None:
    tokenizer = byte_tokenizer()
    document, cut = tokenize_example(Preference("ab", "cd", "e", 0.5), tokenizer, LengthLimits(16))
    prompt, chosen, rejected, margin = split(document)
    assert (prompt.tolist(), chosen.tolist(), rejected.tolist()) == ([97, 98], [99, 100, END], [101, END])
    assert margin.view(np.float32)[0] == 0.5
    assert not cut
    document, cut = tokenize_example(Preference("ab", "cdef", "e"), tokenizer, LengthLimits(4))
    assert (split(document)[1].tolist(), cut) == ([99, 100], True)
    with pytest.raises(BadRow, match=r"5 tokens, more than data\.sequence_length=4"):
        tokenize_example(Preference("ab", "cd", "e"), tokenizer, LengthLimits(4, "error"))
    with pytest.raises(BadRow, match="the prompt has 4 tokens, at most 3 are allowed"):
        tokenize_example(Preference("abcd", "c", "e"), tokenizer, LengthLimits(4))
    with pytest.raises(BadRow, match="up to the length to which they are cut off"):
        tokenize_example(Preference("ab", "cdX", "cdY"), tokenizer, LengthLimits(4))
    with pytest.raises(BadRow, match="the prompt is empty"):
        tokenize_example(Prompt(""), tokenizer, LengthLimits(4))
    chat = Preference(
        Messages([{"role": "user", "content": "q"}]),
        Messages([{"role": "assistant", "content": "x"}]),
        Messages([{"role": "assistant", "content": "y"}]),
    )
    prompt, chosen, *_ = split(tokenize_example(chat, tokenizer, LengthLimits(64))[0])
    assert tokenizer.decode(prompt) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chosen) == "x<|im_end|>"


def test_parts_come_back() -> None:
    parts = [np.array([1, 2]), np.array([], np.int32), np.array([2**31 - 2, 5])]
    assert [p.tolist() for p in split(join(parts))] == [p.tolist() for p in parts]


def preferences(make_config: MakeConfig, path: Path, *overrides: str) -> Any:
    return make_config(
        "trainer=dpo",
        "data.validation=null",
        f"data.train.path={path}",
        "data.train.format=preference",
        "data.sequence_length=24",
        "data.shuffle=none",
        *overrides,
    )


def test_a_micro_batch_of_pairs(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "ab", "chosen": "cd", "rejected": "e"},
        {"prompt": "f", "chosen": "g", "rejected": "hij", "margin": 2},
    ]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    spec = prepare(absolute(preferences(make_config, path, "batch.global_size=2"))).train
    micro = to_tensors(spec.micro_at(0, 0))
    assert micro["segment_ids"].tolist() == [[0, 0, 1, 1, 1, 2, 2, -1], [0, 1, 1, 2, 2, 2, 2, -1]]
    assert micro["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0], [0, 1, 2, 1, 2, 3, 4, 0]]
    assert micro["margins"].tolist() == [[0], [2]]
    found = answers(micro["input_ids"], micro["segment_ids"])
    assert found.answer.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert found.predictors.tolist() == [1, 2, 3, 1, 5, 8, 9, 8, 11, 12, 13]
    ends, numbers = last_tokens(micro["segment_ids"])
    assert (ends.tolist(), numbers.tolist()) == ([4, 6, 10, 14], [0, 1, 2, 3])
    mask = shared_prompt_mask(micro["segment_ids"])[0, 0]
    assert mask[6].tolist() == [True, True, False, False, False, True, True, False]
    assert mask[7].tolist() == [False] * 7 + [True]
    plain = one_answer_per_row(micro)
    assert plain["segment_ids"][:2].tolist() == [[0, 0, 1, 1, 1, -1, -1, -1], [0, 0, 1, 1, -1, -1, -1, -1]]
    assert torch.equal(answers(plain["input_ids"], plain["segment_ids"], 1).answer, found.answer)
    table = to_arrow(spec.micro_at(0, 0), 0, 0)
    assert table.column("margins")[0].as_py() == [0, 2]
    last = to_tensors(spec.micro_at(0, 2))
    assert last["documents"].tolist() == [[2], [-1]]
    assert (last["segment_ids"][1] == -1).all()


def test_unpaired_rows_get_an_answer_of_another_prompt(make_config: MakeConfig) -> None:
    overrides = (
        "trainer=dpo",
        "dpo.loss=kto",
        "data.validation=null",
        "data.train={source: arithmetic, format: unpaired, limit: 6}",
        "data.sequence_length=24",
        "batch.global_size=4",
        "batch.micro_size=2",
    )
    spec = prepare(absolute(make_config(*overrides))).train

    def second_answers(epoch: int, row: int) -> list[list[int]]:
        micro = to_tensors(spec.micro_at(epoch, row))
        return [
            [ids[s == n].tolist() for n in (1, 2)]
            for ids, s in zip(micro["input_ids"], micro["segment_ids"], strict=True)
        ]

    (a, b), (c, d) = second_answers(0, 0), second_answers(0, 2)
    assert [x[1] for x in (a, b, c, d)] == [x[0] for x in (b, c, d, a)]
    e, f = second_answers(0, 4)  # the last batch has two rows
    assert [x[1] for x in (e, f)] == [f[0], e[0]]
    assert set(to_tensors(spec.micro_at(0, 0))["desirable"].flatten().tolist()) <= {0.0, 1.0}


def test_prompts_carry_their_fields(make_config: MakeConfig) -> None:
    spec = prepare(
        absolute(
            make_config(
                "trainer=grpo",
                "grpo.reward=myllm_ray.data.builtin.tasks:arithmetic_reward",
                "rollout.max_new_tokens=4",
                "data.validation=null",
                "data.train={source: arithmetic, format: prompt}",
                "data.sequence_length=16",
                "data.shuffle=none",
            )
        )
    ).train
    micro = to_tensors(spec.micro_at(0, 2))
    assert micro["places"].tolist() == [[2], [3]]
    assert columns_of(spec.plan.store, int(micro["documents"][0])) == {"answer": "2"}
    assert prompt_row(spec.plan.store, int(micro["documents"][0])) == PromptRow("0+2=", "0+2=", None, {"answer": "2"})


def test_prompts_of_messages_come_back_as_messages_with_their_text(make_config: MakeConfig, tmp_path: Path) -> None:
    path, messages = tmp_path / "rows.jsonl", [{"role": "user", "content": "Say gamma:"}]
    path.write_text(json.dumps({"prompt": messages, "text": "a column of that name", "answer": "gamma"}))
    store = prepare(
        absolute(
            make_config(
                "trainer=grpo",
                "grpo.reward=helpers:variety",
                "rollout.max_new_tokens=4",
                "data.validation=null",
                f"data.train.path={path}",
                "data.train.format=prompt",
                "data.sequence_length=64",
            )
        )
    ).train.plan.store
    assert prompt_of(store, 0) == messages
    assert prompt_row(store, 0).text == "<|im_start|>user\nSay gamma:<|im_end|>\n<|im_start|>assistant\n"
    assert columns_of(store, 0) == {"text": "a column of that name", "answer": "gamma"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.train.format=instruction",), "gives tokens, trainer dpo reads pairs: use the format preference"),
        (("dpo.loss=kto",), "gives pairs, trainer dpo reads labelled: use the format unpaired"),
        (("trainer=sft",), "gives pairs, which this trainer can't use"),
        (
            ("dpo.label_smoothing=0.1", "dpo.loss=hinge"),
            "label_smoothing belongs to the losses sigmoid, robust, simpo; loss is hinge",
        ),
        (("dpo.loss=simpo", "dpo.reference_model=x"), "simpo has no reference"),
        (("trainer=ppo",), "ppo is missing"),
        (("trainer=ppo", "ppo={}"), "give reward .a function. or reward_model"),
        (
            ("trainer=grpo", "grpo.reward=nowhere:fn", "rollout.max_new_tokens=4", "data.train.format=prompt"),
            "no module 'nowhere'",
        ),
        (
            ("trainer=grpo", "grpo.reward=helpers:half", "rollout.max_new_tokens=24"),
            "leaves no tokens for a prompt in data.sequence_length=24",
        ),
        (
            ("trainer=grpo", "grpo={reward: 'helpers:half', minibatches: 3}", "rollout.max_new_tokens=4"),
            "can't be cut into 3 minibatches",
        ),
        (
            ("trainer=ppo", "ppo={reward: 'helpers:half', epochs: 4}", "rollout.max_new_tokens=4"),
            "run.max_steps=6 is not a multiple of the 4",
        ),
        (
            (
                "trainer=ppo",
                "ppo.epochs=2",
                "ppo.reward_model=/nowhere",
                "rollout.max_new_tokens=4",
                "data.train.format=prompt",
            ),
            "no folder '/nowhere'",
        ),
    ],
)
def test_incompatible_settings_are_reported(
    make_config: MakeConfig, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(
        json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c", "instruction": "a", "output": "b"}] * 9)
    )

    def start() -> None:
        config = absolute(preferences(make_config, path, *overrides))
        check_model(config, prepare(config))

    with pytest.raises((ConfigError, DataError), match=message) as caught:
        start()
    assert "\n" not in str(caught.value)


def test_tasks() -> None:
    rows = list(tasks.rows("arithmetic", "preference"))
    assert len(rows) == 100
    for task, reward in (
        ("arithmetic", tasks.arithmetic_reward),
        ("brackets", tasks.brackets_reward),
        ("snippets", tasks.snippets_reward),
    ):
        rows = list(tasks.rows(task, "preference"))
        assert rows == list(tasks.rows(task, "preference"))
        assert len(rows) >= 100
        prompts = [row["prompt"] for row in rows]
        assert reward(prompts, [row["chosen"] for row in rows]) == [1.0] * len(rows)
        assert reward(prompts, [row["rejected"] for row in rows]) == [0.0] * len(rows)
    assert tasks.balanced("([]{})")
    assert not tasks.balanced("([)]")
    assert not tasks.balanced("(")
