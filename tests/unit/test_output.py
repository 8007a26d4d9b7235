"""Output of the user's code in a worker is forwarded up to a limit; output of libraries is not."""

from __future__ import annotations

import io
import logging
import pprint
import sys
from contextlib import redirect_stdout

import pytest

from myllm_ray.orchestration import output
from myllm_ray.orchestration.output import forwarded_output


def test_only_the_users_lines_are_sent() -> None:
    lines: list[str] = []
    under = io.StringIO()
    with redirect_stdout(under), forwarded_output(lines.append):
        print("step", 1, end="")
        print(": loss", 0.5)
        pprint.pprint({"a": 1})
        sys.stdout.write("two\nlines")
        for place in ("/x/site-packages/torch/nn.py", "/x/site-packages/deepspeed/utils/logging.py"):
            exec(compile("print('noise')", place, "exec"))
        handler = logging.StreamHandler(sys.stdout)
        exec(
            compile("logger.handle(record)", "/x/site-packages/ray/train.py", "exec"),
            {"logger": handler, "record": logging.makeLogRecord({"msg": "noise"})},
        )
        assert sys.stdout.encoding == under.encoding
    assert lines == ["step 1: loss 0.5", "{'a': 1}", "two", "lines"]
    assert under.getvalue().count("noise") == 3, "the worker's own log has everything"


def test_rays_own_print_is_the_users() -> None:
    """Ray Train and the progress bars of Ray Data replace `print` in their workers."""
    from ray.experimental.tqdm_ray import safe_print
    from ray.train.v2._internal.logging.patch_print import redirected_print

    lines: list[str] = []
    with redirect_stdout(io.StringIO()), forwarded_output(lines.append):
        redirected_print("step", 1)
        safe_print("step", 2)
    assert lines == ["step 1", "step 2"]


def test_the_output_rate_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(output, "_MOST_LINES", 5)
    with redirect_stdout(io.StringIO()), forwarded_output(lines.append):
        for number in range(1000):
            print(number)
    assert lines[:5] == ["0", "1", "2", "3", "4"]
    assert lines[-1] == "(995 more lines of output, over 5 a second: see them with --verbose)"
    assert len(lines) == 6


def test_nothing_changes_without_a_receiver() -> None:
    before = sys.stdout
    with forwarded_output(None):
        assert sys.stdout is before
