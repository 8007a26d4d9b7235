"""Synthetic tasks with verifiable answers, for trying out trainers without a download and for tests of learning.

Each task is a data source of the same name (`data.train.source`), with the fields of the formats prompt_completion,
preference, unpaired and prompt, and a reward function:

    arithmetic  "3+5="   -> "8"                    myllm_ray.data.builtin.tasks:arithmetic_reward
    brackets    "([{}"   -> "])"                   myllm_ray.data.builtin.tasks:brackets_reward
    snippets    function signature -> its body     myllm_ray.data.builtin.tasks:snippets_reward

The functions of `snippets` are from Python's standard library.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from myllm_ray.common.seeds import generator
from myllm_ray.data.builtin import stdlib

VERSION = 1
"""Part of the cache key. Change it when the rows of a task change."""
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_OPEN_BRACKETS, _MOST_OPEN, _PROMPTS = 6, 3, 600
_FILES = 60


def rows(task: str, format_name: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a task, with the fields of a format.

    Format "prompt" has only `prompt` and `answer`, which is passed to reward functions.
    """
    for row in _TASKS[task]():
        if format_name == "prompt":
            yield {"prompt": row["prompt"], "answer": row["chosen"]}
        elif format_name == "unpaired":
            yield {**row, "completion": row["chosen"] if row["label"] else row["rejected"]}
        else:
            yield row


def _arithmetic() -> Iterator[dict[str, Any]]:
    """Yields all sums of two digits. The rejected answer differs from the sum by 1 to 5."""
    random = generator("arithmetic")
    for first in range(10):
        for second in range(10):
            total = first + second
            wrong = int(random.choice([n for n in range(max(0, total - 5), total + 6) if n != total]))
            yield from _row(f"{first}+{second}=", str(total), str(wrong), random)


def _brackets() -> Iterator[dict[str, Any]]:
    """Yields prefixes of bracket sequences. The rejected answer has one bracket missing, added or replaced."""
    random, seen = generator("brackets"), set[str]()
    while len(seen) < _PROMPTS:
        prompt, depth, stack = "", int(random.integers(1, _OPEN_BRACKETS + 1)), ""
        for _ in range(depth):
            if stack and random.random() < 0.3:
                prompt, stack = prompt + _PAIRS[stack[-1]], stack[:-1]
            elif len(stack) < _MOST_OPEN:
                kind = str(random.choice(list(_PAIRS)))
                prompt, stack = prompt + kind, stack + kind
        if not stack or prompt in seen:
            continue
        seen.add(prompt)
        right = "".join(_PAIRS[kind] for kind in reversed(stack))
        at = int(random.integers(len(right)))
        other = str(random.choice([close for close in _PAIRS.values() if close != right[at]]))
        wrong = str(
            random.choice([right[:at] + other + right[at + 1 :], right + other, right[:at] + right[at + 1 :] or other])
        )
        yield from _row(prompt, right, wrong, random)


def _snippets() -> Iterator[dict[str, Any]]:
    """Yields short functions of the standard library. The rejected body lacks one bracket, quote or colon."""
    random = generator("snippets")
    for path in stdlib.files()[:_FILES]:
        for _, row in stdlib.functions(path):
            if isinstance(row, dict) and len(row["completion"]) <= 200:
                places = [i for i, char in enumerate(row["completion"]) if char in "()[]{}:\"'"]
                at = int(random.choice(places)) if places else 0
                wrong = row["completion"][:at] + row["completion"][at + 1 :]
                if wrong.strip() and not _parses(row["prompt"] + wrong):
                    yield from _row(row["prompt"], row["completion"], wrong, random)


def _row(prompt: str, right: str, wrong: str, random: Any) -> Iterator[dict[str, Any]]:
    label = bool(random.integers(2))
    yield {"prompt": prompt, "chosen": right, "rejected": wrong, "completion": right, "label": label}


_TASKS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "arithmetic": _arithmetic,
    "brackets": _brackets,
    "snippets": _snippets,
}
NAMES = tuple(_TASKS)


def arithmetic_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Returns 1 for each completion that is the sum in its prompt, else 0."""
    sums = [sum(int(n) for n in prompt.rstrip("=").split("+")) for prompt in prompts]
    return [float(completion.strip() == str(total)) for completion, total in zip(completions, sums, strict=True)]


def brackets_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Returns 1 for each completion that balances the brackets of its prompt, else 0."""
    return [float(balanced(prompt + completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def balanced(text: str) -> bool:
    """Returns whether a text consists only of brackets, correctly nested and closed."""
    stack: list[str] = []
    for char in text:
        if char in _PAIRS:
            stack.append(_PAIRS[char])
        elif not stack or stack.pop() != char:
            return False
    return not stack


def snippets_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Returns 1 for each completion that forms valid Python together with its prompt, else 0."""
    return [float(_parses(prompt + completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
