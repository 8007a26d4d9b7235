"""Chats: keys and parts of messages, the loss mask of every kind of template, and the tokens that end a turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from myllm_ray.data import formats
from myllm_ray.data.chat import tokenize_answer, tokenize_chat, tokenize_prompt
from myllm_ray.data.chat_template import ChatTemplate, end_tokens
from myllm_ray.data.formats import BadRow
from myllm_ray.data.messages import Messages, read_messages
from myllm_ray.data.tokenize import decode, tokenize_one
from myllm_ray.data.tokenizer import byte_tokenizer

LOOP = "{%- for m in messages %}"
GEMMA = (
    LOOP + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' "
    "+ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA = (
    LOOP + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson + '<|eom_id|>' }}"
    "{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    LOOP + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    LOOP + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (
    LOOP + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
MARKED = (
    LOOP + "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IN_PIECES = MARKED.replace("{% generation %}", "{% generation %}{{ '>' }}{% endgeneration %}{% generation %}")
PLAIN = (
    LOOP
    + "{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PARTS = (
    LOOP + "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% for part in m.content %}{{ part.text if part.type == 'text' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML = (
    LOOP + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
    }
]


def tokenizer_with(template: str | None, eos: str = "<|endoftext|>", *added: str) -> Any:
    made = byte_tokenizer()
    extra = [
        t
        for t in (
            "<start_of_turn>",
            "<end_of_turn>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "[INST]",
            "[/INST]",
            "<|user|>",
            "<|assistant|>",
            "<|end|>",
            "<|pad|>",
            "<|im_start|>",
            "<|im_end|>",
            *added,
        )
        if t in (template or "") or "|im_" in t
    ]
    made.add_special_tokens({"eos_token": eos, "additional_special_tokens": [*extra, "<|user|>", "<|assistant|>"]})
    made.chat_template = template or made.chat_template
    return made


def trained(messages: list[dict[str, Any]], tokenizer: Any, tools: Any = None) -> list[str]:
    """Returns the text of each contiguous span of trained tokens."""
    chat = tokenize_chat(read_messages(messages, "messages", tools), tokenizer)
    runs: list[list[int]] = []
    for i, (token, on) in enumerate(zip(chat.ids.tolist(), chat.trained.tolist(), strict=True)):
        if on and (i == 0 or not chat.trained[i - 1]):
            runs.append([])
        if on:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "eos", "ends", "turns"),
    [
        (None, "<|endoftext|>", ["<|im_end|>"], ["a1<|im_end|>", "a2<|im_end|>"]),
        (CHATML, "<|endoftext|>", ["<|im_end|>"], ["a1<|im_end|>", "a2<|im_end|>"]),
        (CHATML, "<|im_end|>", [], ["a1<|im_end|>", "a2<|im_end|>"]),
        (LLAMA, "<|end_of_text|>", ["<|eot_id|>", "<|eom_id|>"], ["a1<|eot_id|>", "a2<|eot_id|>"]),
        (GEMMA, "<eos>", ["<end_of_turn>"], ["a1<end_of_turn>", "a2<end_of_turn>"]),
        (MISTRAL, "</s>", [], [" a1</s>", " a2</s>"]),
        (PHI, "<|endoftext|>", ["<|end|>"], ["a1<|end|>", "a2<|end|>\n<|endoftext|>"]),
        (THINKING, "<|endoftext|>", ["<|im_end|>"], ["a1<|im_end|>", "\n</think>\na2<|im_end|>"]),
        (MARKED, "<|endoftext|>", ["<|im_end|>"], ["a1<|im_end|>", "a2<|im_end|>"]),
        (IN_PIECES, "<|endoftext|>", ["<|im_end|>"], [">a1<|im_end|>", ">a2<|im_end|>"]),
        (PARTS, "<|endoftext|>", ["<|im_end|>"], ["a1<|im_end|>", "a2<|im_end|>"]),
        (PLAIN, "</s>", [], ["a1", "a2", "</s>"]),
    ],
    ids=[
        "built-in",
        "chatml",
        "chatml-eos",
        "llama",
        "gemma",
        "mistral",
        "phi",
        "thinking",
        "marked",
        "pieces",
        "parts",
        "plain",
    ],
)
def test_end_tokens_and_mask_of_every_kind_of_template(
    template: str | None, eos: str, ends: list[str], turns: list[str]
) -> None:
    tokenizer = tokenizer_with(template, eos)
    assert tokenizer.convert_ids_to_tokens(list(end_tokens(tokenizer))) == [eos, *ends]
    assert trained(TALK, tokenizer) == turns
    quiet = [TALK[0], {**TALK[1], "train": False}, *TALK[2:]]
    assert trained(quiet, tokenizer) == turns[1:]
    assert trained([*TALK[:3], {**TALK[3], "weight": 1}], tokenizer) == turns
    if template not in (THINKING,):  # the tokens of an answer continue those of its prompt
        prompt, _ = tokenize_prompt(Messages(TALK[:3]), tokenizer)
        answer = tokenize_answer(Messages(TALK[:3]), Messages(TALK[3:]), tokenizer)
        assert [answer[-1]] == [i for i in answer if i in end_tokens(tokenizer)][-1:]
        whole = tokenize_chat(Messages(TALK), tokenizer).ids.tolist()
        assert whole[: len(prompt)] == prompt
        # The line break of PLAIN precedes the end token.
        assert whole[len(prompt) :][: len(answer)] == answer or template == PLAIN


def test_the_base_models_end_tokens_are_added_if_they_are_special_tokens_of_this_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(tokenizer, [pad, 2]) == (tokenizer.eos_token_id, end, pad)


def test_generation_blocks_that_leave_out_the_end_token_are_reported() -> None:
    for template, eos, note in (
        (MARKED, "<|endoftext|>", "leaves out the token that ends a turn (<|im_end|>)"),
        (PLAIN, "</s>", "writes no token that ends the assistant's turns"),
        (CHATML + "{% if 0 %}{{ strftime_now('%d') }}{% endif %}", "<|endoftext|>", "today's date"),
    ):
        tokenizer = tokenizer_with(template, eos)
        (found,) = ChatTemplate.of(tokenizer).notes()
        assert note in found
    built_in = byte_tokenizer()
    assert ChatTemplate.of(built_in).notes() == []


def test_tools_calls_results_reasoning_and_several_systems() -> None:
    tokenizer = byte_tokenizer()
    messages = [
        {"role": "system", "content": "one"},
        {"role": "system", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
        CALL,
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"},
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "easy"},
    ]
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert trained(messages, tokenizer, tools) == [
            '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
            "<think>\neasy\n</think>\n\nIt is 2.<|im_end|>",
        ]
    text = tokenizer.decode(tokenize_chat(read_messages(messages, "messages", TOOLS), tokenizer).ids)
    assert text.startswith("<|im_start|>system\none\n\nYou may call")
    assert '"description": "Adds."' in text
    assert "<|im_start|>system\ntwo<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>" in text
    assert "<tool_response>\n2\n</tool_response>" in text
    # `thinking` is another name of `reasoning_content` that this template does not read; it is passed under both names.
    assert (
        trained([*messages[:5], {"role": "assistant", "content": "2", "thinking": "x"}], tokenizer, TOOLS)[1]
        == "<think>\nx\n</think>\n\n2<|im_end|>"
    )


def test_sharegpt_rows() -> None:
    row = {
        "system": "be brief",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2"},
        ],
    }
    messages = formats.chat(row)
    assert isinstance(messages, Messages)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert (messages.tools, messages.trained) == (TOOLS, [False, False, True, False, True])
    plain = formats.chat({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    assert plain == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pair = formats.preference(
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        }
    )
    assert pair == formats.preference(
        {"prompt": [plain[0]], "chosen": [plain[1]], "rejected": [{"role": "assistant", "content": "b"}]}
    )  # type: ignore[index]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\] has a part of type 'image_url': only text",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "no images, audio or video"),
        ([{"role": "assistant", "content": " "}], r"messages\[0\]: the assistant's content is empty"),
        ([{"role": "assistant", "content": None}], "no text content"),
        ([{"role": "user", "content": None}], "no text content"),
        ([{"role": "user", "content": "x"}], "no message of the assistant"),
        ([{"role": "assistant", "content": "x", "train": False}], "every message of the assistant has train: false"),
        ([{"role": "user", "content": "x", "train": True}], "has role user: only assistant messages"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "weight is 0.5"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}],
            "the arguments is not valid JSON",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], "needs the name of a function"),
        ([{"from": "function_call", "value": "f(x)"}], "the function call is not valid JSON"),
        ([{"content": "x"}], "has no role"),
        (["x"], "is str, not a message"),
    ],
)
def test_what_can_not_be_trained_on_is_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as caught:
        formats.chat({"messages": messages})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reason"),
    [
        (CHATML, TALK, TOOLS, "does not write tool definitions"),
        (CHATML, [TALK[0], CALL], None, "does not write tool calls"),
        (
            CHATML,
            [TALK[0], {**TALK[1], "reasoning_content": "hm"}],
            None,
            r"messages\[1\]: the chat template leaves out its reasoning_content",
        ),
        (
            THINKING,
            [TALK[0], {**TALK[1], "reasoning_content": "hm"}, *TALK[2:]],
            None,
            r"messages\[1\]: the chat template leaves out its reasoning_content",
        ),
        (
            LOOP
            + "{% if not (m.role == 'system' and loop.index0) %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
            [{"role": "system", "content": "one"}, {"role": "system", "content": "two"}, *TALK],
            None,
            r"messages\[1\]: the chat template leaves out its content",
        ),
        (
            LOOP + "{{ raise_exception('roles must alternate') if m.role == 'tool' else m.content + '<|im_end|>' }}"
            "{% endfor %}",
            [*TALK[:2], {"role": "tool", "content": "x"}, TALK[1]],
            None,
            "the chat template refuses the messages: roles must alternate",
        ),
        ("{{ messages[-1].content + '<|im_end|>' }}", TALK, None, "leaves out its content"),
        (
            LOOP + "{{ m.content if loop.last else m.content | upper }}{{ '<|im_end|>' if loop.last }}{% endfor %}",
            [
                {"role": "user", "content": "1"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "2"},
                {"role": "assistant", "content": "3"},
            ],
            None,
            "the chat template changes what it wrote before",
        ),
    ],
)
def test_what_a_template_would_silently_leave_out_is_refused(
    template: str, messages: list[Any], tools: Any, reason: str
) -> None:
    with pytest.raises(BadRow, match=reason):
        tokenize_chat(read_messages(messages, "messages", tools), tokenizer_with(template))


def test_an_answer_of_a_preference_is_the_assistants() -> None:
    with pytest.raises(BadRow, match="chosen must be messages of the assistant"):
        formats.preference({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[3:]})
    row = formats.preference({"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[3:], "tools": TOOLS})
    with pytest.raises(BadRow, match="does not write tool definitions"):
        tokenize_prompt(row.prompt, tokenizer_with(CHATML))  # type: ignore[union-attr, arg-type]


def test_instructions_use_the_chat_template_of_the_tokenizer() -> None:
    row = {"instruction": "Add", "input": "1 1", "output": "2"}
    tokenizer = tokenizer_with(GEMMA, "<eos>")
    ids, on = decode(tokenize_one(formats.instruction(row), tokenizer))
    assert (
        tokenizer.decode(ids) == "<start_of_turn>user\nAdd\n\n1 1<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n"
    )
    assert tokenizer.decode(ids[on]) == "2<end_of_turn>"
    alpaca, _ = decode(tokenize_one(formats.instruction(row), byte_tokenizer()))
    assert byte_tokenizer().decode(alpaca).startswith("### Instruction:\nAdd\n\n### Input:\n1 1")
