"""Untrusted files execute no code: no pickle in a checkpoint, model or data set, and no path outside a folder."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeConfig, comparable

from myllm_ray import train
from myllm_ray.config import CheckpointError, ConfigError, DataError, UserError
from myllm_ray.engine.checkpointing.manager import CheckpointManager, read_tensors
from myllm_ray.engine.checkpointing.verification import manifest_checksum, sha256
from myllm_ray.trained_model import open_run


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    content = pickle.dumps(Bomb(tmp_path / "exploded"))
    pickle.loads(content)
    assert (tmp_path / "exploded").exists(), "the bomb works"
    (tmp_path / "exploded").unlink()
    return content


def sign(checkpoint: Path) -> None:
    """Recomputes all checksums, as an attacker with write access would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
        for name in manifest["files"]
        if (checkpoint / name).is_file()
    }
    manifest["checksum"] = manifest_checksum(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_pickle_in_a_checkpoint_does_not_run(make_config: MakeConfig, tmp_path: Path, bomb: bytes) -> None:
    common = ("checkpoint.every_steps=3", "checkpoint.resume=auto")
    whole = train(make_config(*common, "run.name=whole")).folder
    stopped = Path(
        train(make_config(*common, "run.name=run", callbacks=["jsonl", {"helpers:StopAt": {"step": 4}}])).folder
    )
    newest = CheckpointManager(folder=stopped / "checkpoints").latest()
    assert newest is not None
    for name in (".metadata", "optimizer.pt", "pytorch_model.bin", "rng_state.pkl", "__0_0.distcp"):
        (newest / name).write_bytes(bomb)
    train(make_config(*common, "run.name=run"))  # files that the manifest does not name are not read
    assert comparable(stopped) == comparable(whole)
    for signed in (False, True):
        for victim in sorted(p.name for p in newest.iterdir()):
            copy = tmp_path / "copies" / f"{signed}-{victim}" / "checkpoints" / newest.name
            shutil.copytree(newest, copy)
            shutil.copytree(stopped / "tokenizer", copy.parent.parent / "tokenizer")
            (copy / victim).write_bytes(bomb)
            if signed and victim != "manifest.json":
                sign(copy)
            for use in (
                lambda c=copy: read_tensors(c),
                lambda c=copy: open_run(c.parent.parent),
                lambda c=copy: CheckpointManager(folder=c.parent).latest(),
                lambda c=copy, v=victim: train(
                    make_config("run.name=from", f"checkpoint.resume={c}", "run.max_steps=5", "run.overwrite=true")
                ),
            ):
                with suppress(UserError):
                    use()
                assert not (tmp_path / "exploded").exists(), (signed, victim)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "a/../../x", "", "."])
def test_a_manifest_cannot_name_files_elsewhere(make_config: MakeConfig, name: str) -> None:
    checkpoint = Path(str(train(make_config("run.max_steps=1")).checkpoint))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    manifest["checksum"] = manifest_checksum(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"outside the checkpoint|is missing"):
        open_run(checkpoint)


def test_a_link_in_a_checkpoint_is_not_followed(make_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = Path(str(train(make_config("run.max_steps=1")).checkpoint))
    victim = next(checkpoint.glob("*.safetensors"))
    victim.rename(tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is missing"):
        open_run(checkpoint)


def test_a_pickled_model_is_refused(make_config: MakeConfig, tmp_path: Path, bomb: bytes) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 300,
            }
        )
    )
    (folder / "pytorch_model.bin").write_bytes(bomb)
    config = make_config().model_dump(mode="json")
    config["model"] = {"name": str(folder)}
    with pytest.raises(ConfigError, match=r"model\.name: .* can't be loaded"):
        train(config)
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_model_folder_does_not_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """Such code runs only when model.trust_remote_code enables it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'exploded')!r}).touch()\n")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "evil",
                "auto_map": {
                    "AutoConfig": "evil.Config",
                    "AutoModelForCausalLM": "evil.Model",
                    "AutoTokenizer": ["evil.T", "evil.T"],
                },
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    config = make_config().model_dump(mode="json")
    config["model"] = {"name": str(folder)}
    with pytest.raises(ConfigError, match=r"model\.name"):
        train(config)
    config["model"], config["tokenizer"] = make_config().model_dump(mode="json")["model"], {"path": str(folder)}
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        train(config)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_in_a_data_set_is_refused(make_config: MakeConfig, tmp_path: Path, bomb: bytes) -> None:
    """Ray Data registers an Arrow type whose values are pickles; a Parquet file may contain it."""
    path = tmp_path / "rows.parquet"
    field = pa.field(
        "output",
        pa.binary(),
        metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""},
    )
    table = pa.table(
        [pa.array(["a"] * 9), pa.array([bomb] * 9, pa.binary())],
        schema=pa.schema([pa.field("instruction", pa.string()), field]),
    )
    pq.write_table(table, path)
    with pytest.raises(DataError, match=r"column 'output' has the extension type .*; only plain types are read"):
        train(make_config(f"data.train.path={path}"))
    assert not (tmp_path / "exploded").exists()
