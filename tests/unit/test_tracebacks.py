"""A user's exception in one line: type, message, file, line and function of the user's code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig

from myllm_ray.common.tracebacks import describe
from myllm_ray.config import TrainingError, UserError
from myllm_ray.orchestration.failures import RemoteError, clearly, explain, portable
from myllm_ray.trainers.rewards import FunctionReward
from myllm_ray.worker import run_local


def caught(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def mine() -> None:
    raise ValueError("mine\nand more")


def in_torch() -> None:
    torch.zeros(2) @ torch.zeros(3)


HERE = Path(__file__).name


@pytest.mark.parametrize(
    ("call", "said"), [(mine, "ValueError: mine and more"), (in_torch, "RuntimeError: .*tensor size.*")]
)
def test_the_users_line_is_named(call: Callable[[], Any], said: str) -> None:
    """The user's line is also named if a library raises."""
    line = call.__code__.co_firstlineno + 1
    assert re.fullmatch(rf"{said} \(.*{HERE}:{line} in {call.__name__}\)", describe(caught(call)))


def test_the_error_is_kept_through_pickling_and_wrapping_by_ray_train(tmp_path: Path) -> None:
    class Wrapped(Exception):
        worker_failures: dict[int, Exception]

    sent = pickle.loads(pickle.dumps(portable(caught(mine))))
    assert isinstance(sent, RemoteError)
    wrapped = Wrapped()
    lost = RuntimeError("gloo/transport: Connection closed by peer")
    wrapped.worker_failures = {0: lost, 1: sent}
    failure = explain(wrapped).kept(tmp_path)
    (path,) = (tmp_path / "errors").iterdir()
    assert failure.reason.startswith("worker 1 of 2 that failed: ValueError: mine and more (")
    assert str(failure.error) == failure.reason
    assert failure.reason.endswith(f"; the whole traceback: {path}")
    assert 'raise ValueError("mine\\nand more")' in path.read_text()
    assert portable(lost) is lost, "that another worker is gone is no error of its own"
    users = UserError("x")
    assert portable(users) is users
    with pytest.raises(TrainingError, match=r"^ValueError: mine and more \(.*; the whole traceback: "):
        clearly(lambda: (_ for _ in ()).throw(sent), tmp_path)


def test_a_reward_function_names_its_line() -> None:
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        raise KeyError("answer")

    judge = FunctionReward(FunctionReward.Config(function="x:y"), reward)
    with pytest.raises(
        TrainingError, match=rf"raised KeyError: 'answer' \(.*{HERE}:{reward.__code__.co_firstlineno + 1} in reward\)"
    ):
        judge(["a"], ["b"], {})


def broken_format(row: dict[str, Any]) -> Any:
    return row["nothing"]


def test_in_process_a_users_error_keeps_the_python_traceback(make_config: MakeConfig) -> None:
    config = make_config(f"data.train.format={__name__}:broken_format")
    with pytest.raises(KeyError) as found:
        run_local(config)
    assert found.traceback[-1].name == "broken_format"
    assert re.search(
        rf"KeyError: 'nothing' \(.*{HERE}:\d+ in broken_format\), in the row at .*rows.json: row 0$",
        describe(found.value),
    )
