"""The command `export`: every form, its verification, the model card, and the upload; errors leave nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from conftest import LLAMA, instruction_rows
from fake_hub import FakeHub
from run_folders import with_averages
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from e2e.test_cli import call
from myllm_ray.config import validate
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models import export as weights
from myllm_ray.models import verification
from myllm_ray.models.gguf import file as gguf_file
from myllm_ray.trained_model import open_trained
from myllm_ray.worker import run_local

IDS = torch.arange(24).view(2, 12)
Export = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def make_run(home: Path) -> Callable[..., Path]:
    """Returns a function that trains a tiny model for three steps and returns the run's folder."""
    (home / "rows.json").write_text(json.dumps(instruction_rows()))

    def make(name: str, **changes: Any) -> Path:
        raw = {
            "trainer": "sft",
            "model": {"config": dict(LLAMA)},
            "tokenizer": {"kind": "bytes"},
            "data": {"train": {"path": str(home / "rows.json"), "format": "instruction"}, "sequence_length": 160},
            "batch": {"global_size": 4},
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "run": {"name": name, "storage": str(home / "runs"), "max_steps": 3},
            "callbacks": ["jsonl", "report"],
            **changes,
        }
        raw["data"]["cache"] = str(home / "cache")
        return Path(run_local(validate(raw))["folder"])

    return make


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    """A base model in bf16, with a card and a generation config."""
    given, tokenizer = dict(LLAMA, vocab_size=260), byte_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    (home / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    return home / "base"


@pytest.fixture(scope="module")
def plain(make_run: Callable[..., Path]) -> Path:
    return make_run("plain")


@pytest.fixture(scope="module")
def adapted(make_run: Callable[..., Path], base: Path) -> Path:
    return make_run("adapted", model={"name": str(base), "lora": {"rank": 4, "alpha": 8}})


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Export:
    return lambda *arguments: call(capsys, monkeypatch, "export", *arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def trained(run: Path) -> torch.Tensor:
    return logits(open_trained(run).model.model)


def loaded(folder: Path, **settings: Any) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings))


def test_hf_in_shards(export: Export, plain: Path, tmp_path: Path) -> None:
    code, out, err = export(plain, tmp_path / "o", "--max-shard-size", "100KB")
    assert code == 0, err
    assert "weights in float32" in out
    assert "verified: the same logits as the run" in out
    assert len(list((tmp_path / "o").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(loaded(tmp_path / "o"), trained(plain), rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "o")("a b")["input_ids"] == [97, 32, 98]
    assert GenerationConfig.from_pretrained(tmp_path / "o").eos_token_id == [256, 259]
    assert [p.name for p in tmp_path.iterdir()] == ["o"], "the temporary folder is gone"


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("check", ["logits", "tensors", "none"])
def test_dtypes_and_verifications(
    export: Export, plain: Path, tmp_path: Path, name: str, dtype: torch.dtype, check: str
) -> None:
    code, out, err = export(plain, tmp_path / "o", "--dtype", name, "--verify", check)
    assert code == 0, err
    assert ("not verified" in out) == (check == "none")
    with safe_open(tmp_path / "o" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(n).dtype for n in file.keys()} == {dtype}  # noqa: SIM118
    torch.testing.assert_close(loaded(tmp_path / "o"), trained(plain), rtol=0, atol=0.05)


def test_merged(export: Export, adapted: Path, tmp_path: Path) -> None:
    code, _, err = export(adapted, tmp_path / "o", "--to", "merged", "--dtype", "fp32")
    assert code == 0, err
    torch.testing.assert_close(loaded(tmp_path / "o"), trained(adapted), rtol=0, atol=1e-5)
    assert not torch.allclose(trained(adapted), loaded(Path(adapted.parent.parent / "base")), atol=1e-3)


@pytest.mark.parametrize("check", ["logits", "tensors"])
def test_adapter(export: Export, adapted: Path, base: Path, tmp_path: Path, check: str) -> None:
    peft = pytest.importorskip("peft")
    code, out, err = export(adapted, tmp_path / "o", "--to", "adapter", "--verify", check)
    assert code == 0, err
    assert "weights in float32" in out
    assert {p.name for p in (tmp_path / "o").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(model)
    with verification.quiet():  # PEFT calls what transformers has deprecated
        found = logits(peft.PeftModel.from_pretrained(model, str(tmp_path / "o")))
    torch.testing.assert_close(found, trained(adapted), rtol=0, atol=1e-6)
    assert not torch.allclose(found, before, atol=1e-3)
    code, out, err = export(adapted, tmp_path / "half", "--to", "adapter", "--dtype", "bf16", "--verify", check)
    assert (code, "weights in bfloat16" in out) == (0, True), err
    assert {t.dtype for t in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_the_adapter_of_a_reward_model_has_its_head(
    export: Export, make_run: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    run = make_run(
        "reward",
        trainer="reward",
        model={"name": str(base), "lora": {"rank": 2}},
        data={"train": {"source": "brackets", "format": "preference"}, "sequence_length": 32},
    )
    code, _, err = export(run, tmp_path / "o", "--to", "adapter")  # the verification loads the head from the adapter
    assert code == 0, err
    assert "base_model.model.score.weight" in load_file(tmp_path / "o" / "adapter_model.safetensors")
    code, _, err = export(run, tmp_path / "hf")
    assert code == 0, err
    code, _, err = export(run, tmp_path / "g", "--to", "gguf")
    assert (code, "needs a causal language model" in err) == (2, True)
    assert {p.name for p in tmp_path.iterdir()} == {"o", "hf"}


def test_gguf(export: Export, adapted: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    code, _, err = export(adapted, tmp_path / "o", "--to", "gguf", "--dtype", "fp32")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"adapted-F32.gguf", "README.md"}
    found = loaded(tmp_path / "o", gguf_file="adapted-F32.gguf")
    torch.testing.assert_close(found, trained(adapted), rtol=0, atol=1e-5)
    code, _, err = export(adapted, tmp_path / "b", "--to", "gguf", "--verify", "tensors")
    assert code == 0, err
    assert (tmp_path / "b" / "adapted-BF16.gguf").is_file(), "the dtype of the base model"


def test_averages(export: Export, plain: Path, tmp_path: Path) -> None:
    run = with_averages(plain, tmp_path / "averaged")
    code, _, err = export(run, tmp_path / "ema", "--to", "ema")
    assert code == 0, err
    code, _, err = export(run, tmp_path / "hf")
    assert code == 0, err
    twice = load_file(tmp_path / "ema" / "model.safetensors")
    once = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(twice[name], 2 * once[name]) for name in once)


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("plain", ("--to", "zip"), "--to zip: unknown; give one of hf, merged, adapter, gguf, ema"),
        ("plain", ("--dtype", "int8"), "--dtype int8: unknown; give one of fp32, bf16, fp16"),
        ("plain", ("--verify", "maybe"), "--verify maybe: unknown"),
        ("plain", ("--max-shard-size", "big"), "give a size such as 500MB or 5GB"),
        ("plain", ("--to", "gguf", "--max-shard-size", "1GB"), "--to gguf writes one file"),
        ("plain", ("--license", "All Rights"), "give an identifier of the hub"),
        ("plain", ("--private",), "--private applies to --push REPO"),
        ("plain", ("--push", "a/b/c"), "--push a/b/c: not a name of a repository"),
        ("plain", ("--push", "me/model"), "--push needs the hub, and HF_HUB_OFFLINE is set"),
        ("plain", ("--to", "merged"), "has no adapters (model.lora); use --to hf"),
        ("plain", ("--to", "adapter"), "has no adapters (model.lora); use --to hf"),
        ("plain", ("--to", "ema"), "contains no averaged weights: the run was not trained with ema"),
        ("random", ("--to", "adapter"), "has random weights, which only this run has; use --to merged"),
        ("staged", ("--to", "adapter"), "is a run, which PEFT can't load"),
        ("olmo", ("--to", "gguf"), "does not support the architecture olmo2"),
    ],
)
def test_what_is_refused(
    request: pytest.FixtureRequest,
    make_run: Callable[..., Path],
    export: Export,
    home: Path,
    tmp_path: Path,
    run: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    plain = request.getfixturevalue("plain")
    if run != "plain" and not (home / "runs" / run).exists():
        model = {
            "random": {"config": dict(LLAMA), "lora": {"rank": 2}},
            "staged": {"name": str(plain), "lora": {"rank": 2}},
            "olmo": {"config": {**LLAMA, "model_type": "olmo2"}},
        }[run]
        make_run(run, model=model, **({"tokenizer": None} if run == "staged" else {}))
    code, _, err = export(home / "runs" / run, tmp_path / "o", *arguments)
    assert (code, message in err, err.count("\n")) == (2, True, 1), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["hf", "gguf", "adapter"])
def test_a_difference_leaves_nothing(
    export: Export, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A writer that loses a value is found, by logits and by tensors."""
    if form == "hf":
        given = weights.write_model

        def lossy(inner: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
            given(inner, tokenizer, folder, *rest)
            found = load_file(folder / "model.safetensors")
            found["model.layers.1.mlp.up_proj.weight"][2, 3] += 0.5
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr("myllm_ray.runs.export.write_model", lossy)
    elif form == "gguf":
        pytest.importorskip("gguf")
        stored = gguf_file._stored
        monkeypatch.setattr(gguf_file, "_stored", lambda w, d: stored(w * 1.01 if w.numel() and w.dim() > 1 else w, d))
    else:
        pytest.importorskip("peft")
        monkeypatch.setattr(
            "myllm_ray.models.adapter_export.save_file",
            lambda tensors, path, metadata: save_file(
                {n: t * 1.1 for n, t in tensors.items()}, path, metadata=metadata
            ),
        )
    for check, message in (
        ("logits", "computes other logits than the run's model"),
        ("tensors", "has other values of"),
    ):
        code, _, err = export(adapted, tmp_path / "o", "--to", form, "--dtype", "fp32", "--verify", check)
        assert (code, message in err, err.count("\n")) == (2, True, 1), err
        assert not list(tmp_path.iterdir())


def test_large_models_are_verified_by_tensors(
    export: Export, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("myllm_ray.runs.export.LARGE", 10)
    monkeypatch.setattr(verification, "load_folder", lambda *_: pytest.fail("a second model was loaded"))
    code, out, err = export(plain, tmp_path / "o")
    assert (code, "verified: the same tensors as the run" in out) == (0, True), err


def test_a_place_that_cannot_be_written(export: Export, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = export(plain, tmp_path / "file" / "o")
    assert (code, "can't be written" in err, err.count("\n")) == (2, True, 1), err


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_card(
    export: Export,
    adapted: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    (home / "held_out.txt").write_text("a text that the run has not seen")
    code, out, err = call(capsys, monkeypatch, "evaluate", run, "--data", home / "held_out.txt", "--json")
    assert code == 0, err
    (measured,) = json.loads(out)
    other = {**measured, "identity": "of another checkpoint", "metrics": {"loss": 1.25}}
    (run / "evaluations" / "a.json").write_text(json.dumps(other))
    (run / "evaluations" / "broken.json").write_text("{")
    environment = json.loads((run / "environment.json").read_text())
    secret = "hf_" + "a" * 30
    environment["command"] = [
        str(home / "bin" / "x.py"),
        "train",
        str(home / "c.yaml"),
        f"data.train.path={home}/r.json",
    ]
    environment["command"] += [f"run.note={secret}"]
    (run / "environment.json").write_text(json.dumps(environment))
    code, _, err = export(run, tmp_path / "o", "--to", "merged")
    assert code == 0, err
    card = (tmp_path / "o" / "README.md").read_text()
    assert front(card)["license"] == "apache-2.0", "of the base model's card"
    assert front(card)["library_name"] == "transformers"
    assert front(card)["tags"] == ["myllm_ray", "sft", "lora"]
    assert "base_model" not in front(card), "a local folder is no hub id"
    assert "trained from the local model `base`" in card
    assert json.loads((run / "data_summary.json").read_text())["sources"][0]["name"] == "rows"
    assert "| rows | 48 |" in card
    assert environment["data"]["tokens"] in card
    digest = measured["settings"]["data"]["sha256"][:12]
    assert f"| held_out.txt | {digest} | loss | {measured['metrics']['loss']:.6g} |" in card
    assert "| 1.25 |" not in card, "a result of another checkpoint"
    assert "\n| 3 | " in card, "the curve ends at the exported step"
    assert "myllm-ray train c.yaml data.train.path=r.json" in card
    assert f"torch {torch.__version__}" in card
    assert environment["code"]["myllm_ray"]["hash"] in card
    for private in (str(home), str(tmp_path), str(Path.home()), secret, "/tmp"):
        assert private not in card, private
    code, _, err = export(run, tmp_path / "p", "--to", "merged", "--license", "mit")
    assert (code, front((tmp_path / "p" / "README.md").read_text())["license"]) == (0, "mit"), err


def test_the_card_of_a_model_without_a_license(export: Export, plain: Path, tmp_path: Path) -> None:
    code, _, err = export(plain, tmp_path / "o")
    assert code == 0, err
    card = (tmp_path / "o" / "README.md").read_text()
    assert "license" not in front(card)
    assert "No license is stated for this model." in card
    code, _, err = export(tmp_path / "o", tmp_path / "again", "--dtype", "bf16")
    assert code == 0, err
    assert "An exported copy of a model" in (tmp_path / "again" / "README.md").read_text()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


# huggingface_hub passes a file to httpx as `data`.
_OWN_WARNING = "ignore:Use 'content=<...>' to upload:DeprecationWarning"


@pytest.mark.filterwarnings(_OWN_WARNING)
def test_push(export: Export, plain: Path, tmp_path: Path, hub: FakeHub) -> None:
    code, out, err = export(plain, tmp_path / "o", "--push", "me/model", "--private")
    assert code == 0, err
    assert f"pushed to {hub.url}/me/model" in out
    (created,) = hub.repositories
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "model", "private")
    assert hub.tokens == {"Bearer hf_test"}
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}


@pytest.mark.filterwarnings(_OWN_WARNING)
def test_a_failed_push_keeps_the_folder(
    export: Export, plain: Path, adapted: Path, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fails_at = "/commit/"
    code, _, err = export(plain, tmp_path / "o", "--push", "me/model")
    assert (code, "--push me/model: the upload failed:" in err, err.count("\n")) == (2, True, 1), err
    assert "403" in err
    assert f"{tmp_path / 'o'} is complete" in err
    torch.testing.assert_close(loaded(tmp_path / "o"), trained(plain), rtol=0, atol=1e-6)
    code, _, err = export(adapted, tmp_path / "a", "--to", "adapter", "--push", "me/model")
    assert (code, "which others can't load: push the merged model" in err) == (2, True), err
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = export(plain, tmp_path / "a", "--push", "me/model")
    assert (code, "--push needs a login to the hub: set HF_TOKEN" in err) == (2, True), err
    assert not (tmp_path / "a").exists()
