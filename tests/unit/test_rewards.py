"""Reward functions that raise, hang or return invalid values: a one-line error, or the counted fallback."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import pytest
import torch

from myllm_ray.config.errors import ConfigError, TrainingError
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.trainers.ppo import PPOTrainer
from myllm_ray.trainers.rewards import FunctionReward


def lengths(prompts: list[str], completions: list[str], factor: float = 1.0, **columns: Any) -> list[float]:
    return [factor * len(c) for c in completions]


async def later(prompts: list[str], completions: list[str], answer: list[str]) -> list[bool]:
    await asyncio.sleep(0.01)
    return [a == c for a, c in zip(answer, completions, strict=True)]


def tensors(prompts: list[str], completions: list[str]) -> torch.Tensor:
    return torch.ones(len(completions))


def raises(**_: Any) -> list[float]:
    raise RuntimeError("no judge today")


def hangs(**_: Any) -> list[float]:
    time.sleep(5)
    return []


def one_too_few(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_a_number(prompts: list[str], completions: list[str]) -> list[Any]:
    return [1.0, float("nan")]


def a_word(prompts: list[str], completions: list[str]) -> list[Any]:
    return [1.0, "1"]


def only_completions(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def with_ids(completions: list[str], completion_ids: list[list[int]], *, answer: list[str]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


class Judge:
    """A callable object."""

    def __call__(self, completions: list[str], prompts: list[Any]) -> list[float]:
        return [float(prompts[0] == "p")] * len(completions)


judge = Judge()


def nothing(**_: Any) -> None:
    return None


def reward(function: str, **settings: Any) -> FunctionReward:
    return FunctionReward(FunctionReward.Config(function=f"{__name__}:{function}", **settings))


def test_functions_of_every_kind() -> None:
    assert reward("lengths", options={"factor": 0.5})(["p", "q"], ["a", "bcd"], {"answer": [1, 2]}) == [0.5, 1.5]
    assert reward("later")(["p", "q"], ["a", "b"], {"answer": ["a", "x"]}) == [1.0, 0.0]
    assert reward("tensors")(["p", "q"], ["a", "b"], {}) == [1.0, 1.0]
    assert reward("lengths").name == "lengths"
    assert reward("lengths", name="size", weight=2).name == "size"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised RuntimeError: no judge today"),
        ("hangs", r"returned nothing within 0\.2 s"),
        ("one_too_few", "one number for each of the 2 completions, returned 1"),
        ("not_a_number", "nan for completion 1"),
        ("a_word", "'1' for completion 1"),
        ("nothing", "returned NoneType"),
        ("later", "missing 1 required"),
    ],
)
def test_failures(name: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        reward(name, timeout=0.2)(["p", "q"], ["a", "b"], {})
    assert f"reward {__name__}:{name}: " in str(caught.value)
    lenient = reward(name, timeout=0.2, on_error=-1)
    assert lenient(["p", "q"], ["a", "b"], {}) == [-1.0, -1.0]
    assert lenient.failures == 2


def test_a_function_gets_the_arguments_that_it_takes() -> None:
    """Only columns that a function names as parameters are passed, so new columns break no function (as in TRL)."""
    columns = {
        "answer": ["x", "y"],
        "prompt_texts": ["p", "q"],
        "prompt_ids": [[1], [2]],
        "completion_ids": [[5, 6], [7]],
    }
    assert reward("only_completions")(["p", "q"], ["a", "bcd"], columns) == [1.0, 3.0]
    assert reward("with_ids")(["p", "q"], ["a", "bcd"], columns) == [2.0, 1.0]
    assert reward("judge")(["p", "q"], ["a", "bcd"], columns) == [1.0, 1.0]
    assert reward("lengths")(["p", "q"], ["a", "bcd"], columns) == [1.0, 3.0]
    with pytest.raises(
        ConfigError,
        match=r"reward test_rewards:tensors: the function takes no factor \(options\); it takes completions, prompts",
    ):
        reward("tensors", options={"factor": 2})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "rewards.py:starts",
            "'rewards.py:starts' is not an import path: drop .py; write module:name, here rewards:starts",
        ),
        ("./my/rewards.py:starts", "drop .py; write module:name, here my.rewards:starts"),
        ("my_pkg.my_mod.fn", "write module:name, here my_pkg.my_mod:fn"),
        ("my_mod", "here my_mod:name"),
    ],
)
def test_a_path_that_is_not_an_import_path(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        FunctionReward(FunctionReward.Config(function=path))


def test_rewards_that_would_hide_each_other_in_the_log() -> None:
    with pytest.raises(ValueError, match="'fn' is the name of another reward in the log"):
        GRPOTrainer.Config.model_validate({"reward": ["a:fn", "b:fn"]})
    with pytest.raises(ValueError, match="'reward_model' is the name of another reward"):
        PPOTrainer.Config.model_validate({"reward": ["a:reward_model"]})
    GRPOTrainer.Config.model_validate({"reward": ["a:fn", {"function": "b:fn", "name": "other"}]})
