"""`myllm-ray evaluate`: the losses of runs and exports, answers, win rates, kept results, and mistakes."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, instruction_rows
from report_pages import page_data, points

from e2e.test_cli import call
from myllm_ray.config import validate
from myllm_ray.config.sections import SourceSection
from myllm_ray.data.cache import DataCache
from myllm_ray.data.collate import to_tensors
from myllm_ray.data.collate_examples import build_pairs
from myllm_ray.data.evaluation_rows import rows_of
from myllm_ray.data.examples import LengthLimits
from myllm_ray.data.plan import Packing
from myllm_ray.data.prepare import token_store
from myllm_ray.data.tokenize import TokenizeOptions
from myllm_ray.engine.reporting.run_page import write_run_page
from myllm_ray.evaluate.answers import Answer
from myllm_ray.evaluate.win_rate import Judge
from myllm_ray.trainers.reward import RewardTrainer
from myllm_ray.worker import run_local

PROMPTS = [{"prompt": f"say {word} ", "answer": word, "number": i} for i, word in enumerate(["red", "green", "blue"])]


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "trainer": "sft",
        "model": {"config": dict(LLAMA)},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(folder / "rows.json"), "format": "instruction"},
            "validation": {"path": str(folder / "held.json"), "format": "instruction"},
            "sequence_length": 160,
        },
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"name": name, "storage": str(folder / "runs"), "max_steps": 4},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 2},
        "callbacks": ["jsonl"],
        **changes,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, two runs of a language model, an export, and a run of a reward model."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "rows.json").write_text(json.dumps(instruction_rows()))
    (folder / "held.json").write_text(json.dumps(instruction_rows(7, seed=5)))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("hé llo", "worlds apart")))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    pairs = [{"prompt": f"say {i} ", "chosen": "aa", "rejected": "b" * (i + 1)} for i in range(4)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    run_local(validate(settings(folder, "own")))
    run_local(
        validate(
            settings(folder, "other", run={"name": "other", "storage": str(folder / "runs"), "max_steps": 2, "seed": 3})
        )
    )
    data = {"train": {"path": str(folder / "pairs.json"), "format": "preference"}, "sequence_length": 160}
    run_local(validate(settings(folder, "judge", trainer="reward", data=data)))
    return folder


def evaluated(capsys: Any, monkeypatch: Any, *arguments: Any) -> list[dict[str, Any]]:
    code, out, err = call(capsys, monkeypatch, "evaluate", *arguments, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


def validation(folder: Path, step: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == step and "validation_loss" in row)


def test_every_checkpoint_has_the_validation_metrics_of_the_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place / "runs" / "own"
    arguments = ("--data", place / "held.json", "--format", "instruction", "--all-checkpoints")
    found = evaluated(capsys, monkeypatch, run, *arguments, "--batch-size", 3)
    assert [result["step"] for result in found] == [2, 4]
    for result in found:
        recorded = validation(run, result["step"])
        for name in ("loss", "perplexity", "token_accuracy", "bits_per_byte"):
            assert result["metrics"][name] == pytest.approx(recorded[f"validation_{name}"], rel=1e-6), name
    assert found[0]["metrics"]["loss"] != found[1]["metrics"]["loss"]
    # The report has the results as curves over the checkpoints; step 2 is also a logged step.
    steps, values = points(page_data(write_run_page(run)), "evaluate/held.json/loss")
    assert steps == [2, 4]
    assert values == pytest.approx([result["metrics"]["loss"] for result in found], rel=1e-6)
    packed = evaluated(capsys, monkeypatch, run, *arguments[:4], "--packing")
    assert packed[0]["metrics"]["loss"] == pytest.approx(found[1]["metrics"]["loss"], rel=1e-6)
    code, out, err = call(capsys, monkeypatch, "evaluate", run, place / "runs" / "other", *arguments[:4])
    assert code == 0, err
    assert "read from" in out
    assert "perplexity" in out
    assert "runs/other" in out


def test_bits_per_byte_counts_the_bytes_of_the_scored_tokens(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares with the logits of the model. A byte tokenizer has one token per byte, and an end-of-text token."""
    from myllm_ray.trained_model import open_run

    model, tokenizer = open_run(place / "runs" / "own")
    nll, scored, size, correct = 0.0, 0, 0, 0
    for text in ("hé llo", "worlds apart"):
        ids = torch.tensor([[*text.encode(), tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model.eval().model(input_ids=ids).logits[0, :-1].double()
        nll += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        scored, size = scored + len(ids[0]) - 1, size + len(text.encode()) - 1
        correct += int((logits.argmax(-1) == ids[0, 1:]).sum())
    result = evaluated(capsys, monkeypatch, place / "runs" / "own", "--data", place / "text.jsonl")[0]
    assert result["counts"] == {"documents": 2, "tokens": scored, "bytes": size}
    assert result["metrics"]["loss"] == pytest.approx(nll / scored, rel=1e-6)
    assert result["metrics"]["perplexity"] == pytest.approx(math.exp(nll / scored), rel=1e-6)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-6)
    assert result["metrics"]["token_accuracy"] == correct / scored
    cut = evaluated(
        capsys,
        monkeypatch,
        place / "runs" / "own",
        "--data",
        place / "text.jsonl",
        "--limit",
        1,
        "--sequence-length",
        4,
    )[0]
    assert cut["counts"] == {"documents": 1, "tokens": 3, "bytes": 3, "cut": 1}, "the document is cut to a row"


def test_an_export_has_the_results_of_its_run_and_chats_their_masks(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, exported = place / "runs" / "own", tmp_path / "hf"
    assert call(capsys, monkeypatch, "export", run, exported)[0] == 0
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    arguments = ("--data", tmp_path / "chats.json", "--format", "chat")
    first, second = evaluated(capsys, monkeypatch, run, exported, *arguments)
    assert first["metrics"] == second["metrics"]
    assert first["counts"]["tokens"] == len("yes") + 1, "the answer and the token that ends its turn"
    assert second["step"] is None
    assert Path(second["file"]).parent == exported / "evaluations"
    prompts = evaluated(capsys, monkeypatch, run, *arguments, "--score-prompts")[0]
    assert prompts["counts"]["tokens"] > first["counts"]["tokens"]


def test_results_are_kept_by_checkpoint_data_and_settings(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "text.jsonl"
    shutil.copy(place / "text.jsonl", data)
    arguments = (place / "runs" / "own", "--data", data, "--output", tmp_path / "kept")
    first = evaluated(capsys, monkeypatch, *arguments)[0]
    path = Path(first["file"])
    assert path.name.startswith("00000004-")
    saved = json.loads(path.read_text())
    assert saved["settings"]["data"]["sha256"]
    path.write_text(json.dumps({**saved, "metrics": {"loss": 42.0}}))
    assert evaluated(capsys, monkeypatch, *arguments)[0]["metrics"] == {"loss": 42.0}, "read back"
    assert evaluated(capsys, monkeypatch, *arguments, "--batch-size", 1)[0]["metrics"] == {"loss": 42.0}
    assert evaluated(capsys, monkeypatch, *arguments, "--again")[0]["metrics"] == first["metrics"]
    assert evaluated(capsys, monkeypatch, *arguments, "--limit", 1)[0]["file"] != first["file"]
    data.write_text(data.read_text().replace("worlds", "words"))
    changed = evaluated(capsys, monkeypatch, *arguments)[0]
    assert changed["file"] != first["file"]
    assert changed["metrics"]["loss"] != first["metrics"]["loss"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    unkept = evaluated(capsys, monkeypatch, *arguments[:3], "--output", blocked / "kept")[0]
    assert (unkept["file"], unkept["metrics"]) == (None, changed["metrics"]), "a computed result is not lost"
    path.write_text("not JSON")
    data.write_text((place / "text.jsonl").read_text())
    assert evaluated(capsys, monkeypatch, *arguments)[0]["metrics"] == first["metrics"]


def shorter(prompts: list[str], completions: list[str], number: list[int], **_: Any) -> list[float]:
    """A metric of the user: minus the length, and the number of the row."""
    assert prompts == [row["prompt"] for row in PROMPTS]
    return [n - len(c) for n, c in zip(number, completions, strict=True)]


def broken(completions: list[str]) -> list[float]:
    return [0.0]


def test_answers_are_scored_and_compared(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other, judge = (place / "runs" / name for name in ("own", "other", "judge"))
    arguments = ("--data", place / "prompts.jsonl", "--format", "prompt", "--max-new-tokens", 6)
    name = "e2e.test_evaluate:shorter"
    result = evaluated(
        capsys,
        monkeypatch,
        run,
        *arguments,
        "--metric",
        "exact_match",
        "--metric",
        name,
        "--win-rate",
        judge,
        "--against",
        other,
    )[0]
    metrics, counts = result["metrics"], result["counts"]
    assert metrics["exact_match"] == 0.0
    assert metrics["shorter"] <= 1.0
    low, high = result["intervals"]["exact_match"]
    assert low == 0.0
    assert 0.5 < high < 0.6, "Wilson's interval of 0 of 3"
    assert counts["prompts"] == 3 == counts["wins"] + counts["ties"] + counts["losses"]
    assert metrics["win_rate"] == (counts["wins"] + counts["ties"] / 2) / 3
    turned = evaluated(
        capsys, monkeypatch, other, *arguments, "--win-rate", judge, "--against", run, "--batch-size", 2
    )[0]
    assert turned["metrics"]["win_rate"] == pytest.approx(1 - metrics["win_rate"])
    assert turned["metrics"]["reward"] == pytest.approx(metrics["reward_of_other"], abs=1e-5)
    same = evaluated(capsys, monkeypatch, run, *arguments, "--win-rate", judge, "--against", run)[0]
    assert same["counts"] == {"prompts": 3, "wins": 0, "ties": 3, "losses": 0}
    assert same["metrics"]["win_rate"] == 0.5


def test_the_judge_gives_the_rewards_of_its_trainer(place: Path) -> None:
    """The rewards of `build_pairs` rows by the reward trainer, and of the same prompts and answers by the judge."""
    from myllm_ray.trained_model import open_run

    model, tokenizer = open_run(place / "runs" / "judge")
    model.eval()
    pairs = SourceSection(path=str(place / "pairs.json"), format="preference")
    prompts = SourceSection(path=str(place / "pairs.json"), format="prompt")
    cache, folder = place / "cache", place / "runs" / "judge" / "tokenizer"
    stores = [
        token_store(DataCache(cache), folder, [(source, "data")], TokenizeOptions({}, limits=LengthLimits(100)))
        for source in (pairs, prompts)
    ]
    trainer = RewardTrainer(model)
    rows = rows_of(stores[0], Packing("record", 100)).rows(0, 0, 4)
    with torch.no_grad():
        expected, _ = trainer.rewards(to_tensors(build_pairs(stores[0], rows, 0)))
    judge = Judge(model, tokenizer, torch.device("cpu"), nullcontext, batch_size=3)
    for column, field in enumerate(("chosen", "rejected")):
        texts = [row[field] for row in json.loads((place / "pairs.json").read_text())]
        answers = [Answer(i, text, [], [], True) for i, text in enumerate(texts)]
        assert judge(answers, stores[1]) == pytest.approx(expected[:, column].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to evaluate: give --data FILE or --task NAME"),
        (("--data", "missing.jsonl"), "--data: nothing found at 'missing.jsonl'"),
        (("--data", "{place}/prompts.jsonl"), "no field 'text'; the row has answer, number, prompt"),
        (("--data", "{place}/prompts.jsonl", "--format", "prompt"), "prompts have no answers to score: give --metric"),
        (("--data", "{place}/text.jsonl", "--metric", "exact_match"), "--metric and --win-rate need prompts to answer"),
        (("--data", "{place}/pairs.json", "--format", "preference"), "not preferences"),
        (("--data", "{place}/text.jsonl", "--metric", "exactmatch"), "unknown metric 'exactmatch'"),
        (("--data", "{place}/text.jsonl", "--metric", "e2e.test_evaluate:nothing"), "nothing"),
        (("--data", "{place}/text.jsonl", "--format", "txt"), "unknown"),
        (("--data", "{place}/text.jsonl", "--win-rate", "{place}/runs/judge"), "--against MODEL belong together"),
        (("--data", "{place}/text.jsonl", "--few-shot", "1"), "belong to --task NAME"),
        (("--data", "{place}/text.jsonl", "--device", "tpu"), "--device: unknown device 'tpu'"),
        (("--data", "{place}/text.jsonl", "--sequence-length", "99999"), "exceeds the maximum of"),
        (("--data", "{place}/text.jsonl", "--field", "text"), "write NAME=COLUMN"),
        (
            ("--data", "{place}/pairs.json", "--format", "prompt", "--metric", "exact_match"),
            "exact_match needs the field 'answer' in each row; row 0 has, in addition to its prompt, chosen",
        ),
        (
            ("--data", "{place}/prompts.jsonl", "--format", "prompt", "--metric", "e2e.test_evaluate:broken"),
            "must return one number for each of the 3 completions, returned 1",
        ),
        (
            (
                "--data",
                "{place}/prompts.jsonl",
                "--format",
                "prompt",
                "--metric",
                "exact_match",
                "--max-new-tokens",
                "4096",
            ),
            "leaves no tokens for a prompt in 2048",
        ),
        (
            (
                "--data",
                "{place}/prompts.jsonl",
                "--format",
                "prompt",
                "--win-rate",
                "{place}/runs/own",
                "--against",
                "{place}/runs/own",
            ),
            "is not a reward model",
        ),
    ],
)
def test_mistakes_are_one_line(
    place: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    given = [argument.format(place=place) for argument in arguments]
    code, _, err = call(capsys, monkeypatch, "evaluate", place / "runs" / "own", *given, "--output", tmp_path / "kept")
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "kept").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("runs/judge", "is a reward model, which predicts no tokens"),
        ("rows.json", "is a file: give the folder of a run"),
        ("runs", "contains no complete checkpoint and no config.json"),
        ("runs/absent/model", "no folder"),
    ],
)
def test_what_is_no_language_model(
    place: Path, model: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = call(capsys, monkeypatch, "evaluate", place / model, "--data", place / "text.jsonl")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
