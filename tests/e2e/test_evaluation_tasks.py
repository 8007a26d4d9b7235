"""Tasks of lm-evaluation-harness on local data, and `evaluation.tasks` during training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, comparable, instruction_rows
from spawned import BACKENDS, run_all

from e2e.test_cli import call
from e2e.test_evaluate import evaluated
from myllm_ray.config.load import validate
from myllm_ray.engine.checkpointing.manager import read_tensors
from myllm_ray.evaluate import harness
from myllm_ray.preparation import absolute, prepare_run
from myllm_ray.trained_model import open_run

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'myllm_ray[eval]'")
QUESTIONS = [
    {"question": f"The colour of number {i} is", "choices": ["red", "blueish", "a dark green"], "answer": i % 3}
    for i in range(5)
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/questions.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean}}, {{metric: acc_norm, aggregation: mean}}]
metadata: {{version: 1}}
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/questions.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean}}]
metadata: {{version: 1}}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    harness._manager.cache_clear()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks, their questions, prompts and held-out rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "choice.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "written.yaml").write_text(WRITTEN.format(folder=folder))
    (folder / "held.json").write_text(json.dumps(instruction_rows(7, seed=5)))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "answer": ""}) + "\n" for i in range(3))
    )
    return folder


def task_overrides(folder: Path, limit: int = 3) -> list[str]:
    data = json.dumps({"path": str(folder / "held.json"), "format": "instruction"})
    prompts = json.dumps({"path": str(folder / "prompts.jsonl"), "format": "prompt"})
    return [
        f"evaluation.tasks=[{{name: again, data: {data}}}, "
        f"{{data: {prompts}, metrics: [exact_match], max_new_tokens: 5}}, "
        f"{{task: '{folder}/choice.yaml'}}, {{task: tiny_written, task_folder: '{folder}', limit: {limit}}}]",
        f"data.validation={data}",
    ]


def expected_accuracies(folder: Path) -> tuple[float, float]:
    """Returns acc and acc_norm of `tiny_choice`, from the logits of the model."""
    model, _ = open_run(folder)
    right = [0, 0]
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            context, continuation = str(row["question"]).encode(), f" {choice}".encode()
            ids = torch.tensor([[*context, *continuation]])
            with torch.no_grad():
                scores = model.eval().model(input_ids=ids).logits[0].log_softmax(-1)
            sums.append(sum(float(scores[len(context) + i - 1, b]) for i, b in enumerate(continuation)))
        normed = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]  # type: ignore[call-overload]
        right[0] += sums.index(max(sums)) == row["answer"]
        right[1] += normed.index(max(normed)) == row["answer"]
    return right[0] / len(QUESTIONS), right[1] / len(QUESTIONS)


@pytest.mark.promise
def test_a_task_of_the_harness(
    make_config: MakeConfig, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = run_all(1, [make_config("run.max_steps=2")])
    arguments = ("--task", tasks / "choice.yaml", "--task", "tiny_written", "--task-folder", tasks, "--batch-size", 2)
    result = evaluated(capsys, monkeypatch, run, *arguments)[0]
    acc, acc_norm = expected_accuracies(run)
    assert result["metrics"]["tiny_choice/acc"] == pytest.approx(acc)
    assert result["metrics"]["tiny_choice/acc_norm"] == pytest.approx(acc_norm)
    assert result["metrics"]["tiny_choice/acc_stderr"] == pytest.approx((acc * (1 - acc) / 4) ** 0.5)
    assert result["metrics"]["tiny_written/exact_match"] == 0.0
    again = evaluated(capsys, monkeypatch, run, *arguments)[0]
    assert again["time"] == result["time"], "read back"
    (tasks / "questions.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    other = evaluated(capsys, monkeypatch, run, *arguments)[0]
    assert other["file"] != result["file"], "the data of the task has changed"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        pytest.param("tiny_choise", "has no task 'tiny_choise': did you mean tiny_choice", marks=pytest.mark.slow),
        ("missing.yaml", "missing.yaml can't be read"),
        ("{folder}/held.yaml", "it has no key `task` or `group`"),
        pytest.param("{folder}/broken.yaml", "the data of task 'broken' can't be loaded", marks=pytest.mark.slow),
        pytest.param("{folder}/hub.yaml", "nothing is downloaded", marks=pytest.mark.slow),
    ],
)
def test_tasks_that_can_not_be_evaluated(
    make_config: MakeConfig,
    tasks: Path,
    task: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tasks / "held.yaml").write_text("a: 1")
    text = CHOICE.format(folder=tasks)
    (tasks / "broken.yaml").write_text(text.replace("tiny_choice", "broken").replace("questions", "absent"))
    hub = text.replace("tiny_choice", "hub").replace("dataset_path: json", "dataset_path: absent/from-the-cache")
    (tasks / "hub.yaml").write_text("\n".join(line for line in hub.splitlines() if "dataset_kwargs" not in line))
    (run,) = run_all(1, [make_config("run.max_steps=1")])
    code, _, err = call(
        capsys, monkeypatch, "evaluate", run, "--task", task.format(folder=tasks), "--task-folder", tasks
    )
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (run / "evaluations").exists()


def own_metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("evaluation/")} for row in comparable(folder)]


@pytest.mark.slow
def test_tasks_do_not_change_the_run(
    make_config: MakeConfig, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    when = ["evaluation.every_steps=2", "run.max_steps=4", "evaluation.at_start=true"]
    given, validation = task_overrides(tasks)
    first, second = run_all(
        1, [make_config(*when, validation, "run.name=plain"), make_config(*when, validation, given, "run.name=tasks")]
    )
    assert own_metrics(first) == own_metrics(second)
    tensors = [read_tensors(folder / "checkpoints" / "step-00000004") for folder in (first, second)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    rows = {row["step"]: row for row in comparable(second) if "validation_loss" in row}
    assert sorted(rows) == [0, 2, 4]
    for row in rows.values():
        assert row["evaluation/again/loss"] == pytest.approx(row["validation_loss"], rel=1e-6)
        assert row["evaluation/again/bits_per_byte"] == pytest.approx(row["validation_bits_per_byte"], rel=1e-6)
        assert {"evaluation/prompts/exact_match", "evaluation/prompts/answer_length"} <= row.keys()
        assert {"evaluation/tiny_choice/acc", "evaluation/tiny_written/exact_match"} <= row.keys()
    result = evaluated(capsys, monkeypatch, second, "--task", tasks / "choice.yaml")[0]
    assert rows[4]["evaluation/tiny_choice/acc_norm"] == result["metrics"]["tiny_choice/acc_norm"]


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("fsdp", marks=pytest.mark.promise),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "accelerate", "deepspeed-3")),
    ],
)
def test_tasks_have_the_same_results_on_every_backend(make_config: MakeConfig, tasks: Path, backend: str) -> None:
    """The requests are divided over two ranks. The evaluation at the start precedes every other forward pass."""
    given, _ = task_overrides(tasks, limit=3 if backend == "ddp" else 1)  # 1: fewer documents than ranks
    when = ["evaluation.at_start=true", "run.max_steps=2", "data.validation=null", given]
    options = ['accelerator.options={"zero_optimization": {"stage3_param_persistence_threshold": 0}}']
    chosen = [*BACKENDS[backend], *(options if backend == "deepspeed-3" else [])]
    (single,) = run_all(1, [make_config(*when, "run.name=single")])
    (several,) = run_all(2, [make_config(*when, *chosen, "run.name=several")])
    expected, found = comparable(single), comparable(several)
    assert [row["step"] for row in found] == [0, 1, 2]
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (row["step"], name)
    assert sum(name.startswith("evaluation/") for name in found[0]) >= 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.tasks=[tiny_choise]"],
            "evaluation.tasks.0.task: lm-evaluation-harness has no task 'tiny_choise'",
        ),
        (["evaluation.tasks=[{data: {path: absent.json}}]"], "evaluation.tasks.0.data.path: nothing found"),
        (
            ["evaluation.tasks=[{data: {path: FOLDER/held.json, format: instruction}, metrics: [exact_match]}]"],
            "evaluation.tasks.0.metrics: they score answers to prompts",
        ),
        (
            ["evaluation.tasks=[{data: {path: FOLDER/prompts.jsonl, format: prompt}, max_new_tokens: 9}]"],
            "give metrics",
        ),
        (
            ["evaluation.tasks=[{data: {path: FOLDER/prompts.jsonl, format: prompt}, metrics: [exact_match]}]"],
            "evaluation.tasks.0.max_new_tokens=256 leaves no tokens for a prompt in data.sequence_length=160",
        ),
        (
            [
                "accelerator={name: fsdp, options: {reshard_after_forward: 2}}",
                "evaluation.tasks=[{data: {path: FOLDER/prompts.jsonl, format: prompt}, metrics: [exact_match], "
                "max_new_tokens: 9}]",
            ],
            "reshard_after_forward",
        ),
        (
            [
                "trainer=reward",
                "data={train: {source: brackets, format: preference}, sequence_length: 32}",
                "evaluation.tasks=[{data: {path: FOLDER/held.json, format: instruction}}]",
            ],
            "trains a reward model, which predicts no tokens",
        ),
    ],
)
def test_tasks_are_checked_before_the_run(
    make_config: MakeConfig, tasks: Path, overrides: list[str], message: str
) -> None:
    from myllm_ray.config.errors import UserError

    config = make_config(*(text.replace("FOLDER", str(tasks)) for text in overrides))
    with pytest.raises(UserError) as error:
        prepare_run(absolute(config))
    assert message in str(error.value)
    assert not (Path(config.run.storage) / config.run.name).exists()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("[{}]", "give exactly one of data"),
        ("[{task: a, metrics: [exact_match]}]", "name and metrics belong to data"),
        ("[{data: {path: x.json}, few_shot: 1}]", "few_shot and task_folder belong to task"),
        ("[{data: {path: x.json}}, {data: {path: y/x.json}}]", "two tasks have the name 'x'"),
    ],
)
def test_tasks_that_contradict_themselves(make_config: MakeConfig, tasks: str, message: str) -> None:
    from myllm_ray.config.errors import ConfigError

    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make_config(f"evaluation.tasks={tasks}")
    assert validate(make_config("evaluation.tasks=[arc_easy]").model_dump()).evaluation.tasks[0].title == "arc_easy"


@pytest.mark.slow
def test_the_command_line_of_the_harness_has_the_same_numbers(
    make_config: MakeConfig,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (run,) = run_all(1, [make_config("run.max_steps=2")])
    assert call(capsys, monkeypatch, "export", run, tmp_path / "hf")[0] == 0
    own = evaluated(capsys, monkeypatch, run, "--task", "tiny_choice", "--task-folder", tasks)[0]["metrics"]
    command = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'hf'}", "--include_path", tasks]
    command += ["--tasks", "tiny_choice", "--device", "cpu", "--batch_size", "8", "--output_path", tmp_path / "out"]
    subprocess.run([sys.executable, "-m", "lm_eval", *map(str, command)], check=True, capture_output=True)
    (path,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(path.read_text())["results"]["tiny_choice"]
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert own[f"tiny_choice/{name}"] == pytest.approx(theirs[f"{name},none"], abs=1e-9), name
