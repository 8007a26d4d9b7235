"""Sources, formats, tokenisation, packing, order, plan and stream."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeConfig, instruction_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from myllm_ray.common.types import IGNORE, Position
from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.config.sections import SourceSection, TokenizerSection
from myllm_ray.data import formats, sources
from myllm_ray.data.collate import build_micro, to_tensors
from myllm_ray.data.inspect import describe, rows_of_step
from myllm_ray.data.prepare import PreparedData, prepare
from myllm_ray.data.stream import LocalStream
from myllm_ray.data.tokenize import TokenizeOptions, decode, encode, tokenize_one, tokenize_rows
from myllm_ray.data.tokenizer import byte_tokenizer, bytes_per_token, load_tokenizer, open_tokenizer, train_bpe

TEXTS = ["first document\n", "zweites, mit Umlauten: äöü\n", "third"]


def read_all(section: SourceSection) -> list[dict[str, Any]]:
    units = sources.list_units(section, "data.train.path")
    return [row for unit in units for _, row in sources.read_unit(unit, section)]  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_file_types_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = [{"text": t, "n": str(i)} for i, t in enumerate(TEXTS)]
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_text("text,n\n" + "".join(f'"{r["text"]}",{r["n"]}\n' for r in rows))
    found = read_all(SourceSection(path=str(path)))
    assert [r["text"] for r in found] == TEXTS


def test_folder_glob_and_remote_paths(tmp_path: Path) -> None:
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("ignored.bin", "x")):
        (tmp_path / name).write_text(text)
    assert [r["text"] for r in read_all(SourceSection(path=str(tmp_path)))] == ["one", "two"]
    assert [r["text"] for r in read_all(SourceSection(path=str(tmp_path / "b*")))] == ["two"]
    with fsspec.open("memory://bucket/x.jsonl", "w") as file:
        file.write('{"text": "from afar"}\n')
    assert read_all(SourceSection(path="memory://bucket/x.jsonl")) == [{"text": "from afar"}]


def test_remote_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match=r"needs gcsfs: pip install 'gcsfs'"):
        sources.list_units(SourceSection(path="gs://bucket/x.jsonl"), "data.train.path")


def test_jsonl_in_byte_ranges_has_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RANGE_BYTES", 37)  # cuts in the middle of lines and exactly at line ends
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * (i % 40), "n": i}) + "\n" for i in range(50)))
    section = SourceSection(path=str(path))
    assert len(sources.list_units(section, "k")) > 10
    assert [r["n"] for r in read_all(section)] == list(range(50))


def test_bad_jsonl_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": oops}\n{"txt": "b"}\n{"text": "c"}\n')
    unit = sources.list_units(SourceSection(path=str(path)), "k")[0]
    rows = list(sources.read_unit(unit, SourceSection(path=str(path))))
    with pytest.raises(DataError, match=rf"{path}:3: not valid JSON.*data.on_bad_row=skip"):
        tokenize_rows(rows, formats.text, byte_tokenizer(), TokenizeOptions({}))
    batch = tokenize_rows(rows, formats.text, byte_tokenizer(), TokenizeOptions({}, on_bad_row="skip"))
    assert batch.num_rows == 2
    assert batch.schema.metadata[b"skipped"] == b"2"
    with pytest.raises(DataError, match=rf"{path}:4: no field 'text'; the row has txt"):
        tokenize_rows([rows[0], rows[2]], formats.text, byte_tokenizer(), TokenizeOptions({}))
    renamed = tokenize_rows([rows[2]], formats.text, byte_tokenizer(), TokenizeOptions({"text": "txt"}))
    assert renamed.num_rows == 1


def test_text_is_split_as_configured(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a\nb\n\nc\n\n\nd\n")
    texts = {
        how: [r["text"] for r in read_all(SourceSection(path=str(path), split_text=how))]  # type: ignore[arg-type]
        for how in ("file", "paragraph", "line")
    }
    assert texts == {
        "file": ["a\nb\n\nc\n\n\nd\n"],
        "paragraph": ["a\nb\n\n", "c\n\n", "d\n"],
        "line": ["a\n", "b\n", "c\n", "d\n"],
    }


def test_long_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    text = "".join(f"line {i}\n" + ("\n" if i % 100 == 0 else "") for i in range(30000))
    path.write_text(text)
    pieces = [r["text"] for r in read_all(SourceSection(path=str(path)))]
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(p.endswith("\n\n") for p in pieces[:-1])


def test_stdlib_as_text_and_as_functions() -> None:
    section = SourceSection(source="python-stdlib", format="text")
    units = sources.list_units(section, "k")
    assert len(units) > 100
    functions = SourceSection(source="python-stdlib", format="prompt_completion")
    unit = next(u for u in units if u.path.endswith("textwrap.py"))
    rows = [row for _, row in sources.read_unit(unit, functions)]
    wrap = next(r for r in rows if r["name"] == "wrap")  # type: ignore[index]
    assert wrap["prompt"].startswith("def wrap(")  # type: ignore[index]
    assert '"""' in wrap["prompt"]  # type: ignore[index]
    ast.parse(wrap["prompt"] + wrap["completion"])  # type: ignore[index]


def test_instruction_mask_covers_the_response_and_its_end() -> None:
    tokenizer = byte_tokenizer()
    row = {"instruction": "Add", "input": "1 1", "output": "2"}
    ids, trained = decode(tokenize_one(formats.instruction(row), tokenizer))
    assert tokenizer.decode(ids[trained]) == "2<|endoftext|>"
    assert tokenizer.decode(ids[~trained]) == "### Instruction:\nAdd\n\n### Input:\n1 1\n\n### Response:\n"
    _, everything = decode(tokenize_one(formats.instruction(row), tokenizer, train_on_prompt=True))
    assert everything.all()


def test_chat_mask_covers_every_assistant_turn() -> None:
    tokenizer = byte_tokenizer()
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "ciao"},
    ]
    ids, trained = decode(tokenize_one(formats.chat({"messages": messages}), tokenizer))
    assert tokenizer.decode(ids[trained]) == "hello<|im_end|>ciao<|im_end|>"
    assert "user\nbye" in tokenizer.decode(ids[~trained])


def test_default_template_ends_turns_with_a_token_the_tokenizer_has(tmp_path: Path) -> None:
    tokenizer = train_bpe(["hello there"], 270)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|other|>"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|im_end|>", "<|other|>"))
    opened = open_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ids, trained = decode(tokenize_one(formats.chat({"messages": messages}), opened))
    assert opened.decode(ids[trained]) == "hello<|endoftext|>"
    assert ids[trained][-1] == opened.eos_token_id


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": [{"content": "x"}]},
        {"messages": "x"},
        {"messages": [{"role": "user", "content": "x"}]},
    ],
)
def test_bad_chats_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(formats.BadRow):
        formats.chat(row)


def test_byte_tokenizer_is_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "aé\n\x00"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    sizes = bytes_per_token(tokenizer)
    assert sizes[:256] == [1] * 256
    assert sum(sizes[256:]) == 0


def test_a_byte_token_of_sentencepiece_is_one_byte() -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "▁hello": 3, "ö": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert bytes_per_token(tokenizer) == [0, 0, 1, 6, 2]


def test_bpe_is_deterministic_and_counts_bytes() -> None:
    one, two = (train_bpe(["hello hello wörld"] * 20, 300) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    ids = one("hello wörld")["input_ids"]
    sizes = bytes_per_token(one)
    assert sum(sizes[i] for i in ids) == len("hello wörld".encode())
    with pytest.raises(ConfigError, match="too small"):
        train_bpe(["x"], 100)
    with pytest.raises(ConfigError, match=r"tokenizer.path: no folder"):
        load_tokenizer(TokenizerSection(path="nowhere"))


@given(st.lists(st.tuples(st.integers(0, 2**31 - 2), st.booleans())))
def test_mask_encoding_round_trips(tokens: list[tuple[int, bool]]) -> None:
    ids = np.asarray([t for t, _ in tokens], np.int64)
    trained = np.asarray([m for _, m in tokens], bool)
    back, mask = decode(encode(ids, trained))
    assert (back == ids).all()
    assert (mask == trained).all()


def micro_rows(prepared: PreparedData, steps: int, micro: int = 2, world: int = 1) -> list[list[int]]:
    """Returns the fingerprints of the micro-batches by step and rank."""
    spec = prepared.train
    spec.micro_size = micro
    streams = [LocalStream(spec, rank, world).batches(Position(), steps) for rank in range(world)]
    return [[b.fingerprint for b in batches] for batches in zip(*streams, strict=True)]


def test_steps_do_not_depend_on_micro_batches_and_world_size(make_config: MakeConfig) -> None:
    prepared = prepare(make_config())
    seen = {
        (micro, world): [sum(f) % 2**64 for f in micro_rows(prepared, 9, micro, world)]
        for micro, world in itertools.product((1, 2, 4), (1, 2))
        if 8 % (micro * world) == 0
    }
    assert len({tuple(v) for v in seen.values()}) == 1
    first = next(iter(seen.values()))
    assert len(set(first[:3])) == 3, "every step of an epoch holds other rows"
    assert first[0] != first[4], "the next epoch has another order"


@pytest.mark.parametrize("shuffle", ["full", "window", "none"])
@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_contains_every_document_once(make_config: MakeConfig, shuffle: str, packing: bool) -> None:
    prepared = prepare(make_config(f"data.shuffle={shuffle}", "data.shuffle_window=16", f"data.packing={packing}"))
    plan = prepared.train.plan
    orders = []
    for epoch in (0, 1):
        rows = plan.rows(epoch, 0, plan.rows_in_epoch(epoch))
        orders.append([s.document for row in rows for s in row])
        held_out = {s.document for row in prepared.validation.plan.rows(0, 0, 100) for s in row}  # type: ignore[union-attr]
        assert sorted(orders[-1]) == sorted(set(range(48)) - held_out)
        assert len(held_out) == 5
    assert (orders[0] == orders[1]) == (shuffle == "none")


def test_a_custom_format(make_config: MakeConfig) -> None:
    spec = prepare(make_config("data.train.format=helpers:question_and_answer")).train
    ids, trained = decode(spec.plan.store.read(0))
    row = instruction_rows()[0]
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(ids[~trained]) == f"Q: {row['instruction']}\nA: "
    assert tokenizer.decode(ids[trained]) == row["output"] + "<|endoftext|>"


def test_weights_repeat_and_thin_out_sources(make_config: MakeConfig, tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 20)):
        (tmp_path / f"{name}.json").write_text(json.dumps(instruction_rows(count, seed=ord(name))))
    config = make_config()
    config.data.train = [
        SourceSection(path=str(tmp_path / "a.json"), format="instruction", weight=2),
        SourceSection(path=str(tmp_path / "b.json"), format="instruction", weight=0.5),
    ]
    config.data.validation = None
    plan = prepare(config).train.plan
    halves = []
    for epoch in (0, 1):
        documents = [s.document for row in plan.rows(epoch, 0, plan.rows_in_epoch(epoch)) for s in row]
        assert sorted(d for d in documents if d < 20) == sorted([*range(20)] * 2)
        halves.append({d for d in documents if d >= 20})
        assert len(halves[-1]) == 10
    assert halves[0] != halves[1]


def test_resume_position_gives_the_rest(make_config: MakeConfig) -> None:
    spec = prepare(make_config()).train
    whole = list(LocalStream(spec, 0, 1).batches(Position(), 9))
    assert whole[-1].position.epoch >= 1
    for at in (1, 4, 8):
        rest = list(LocalStream(spec, 0, 1).batches(whole[at].position, 9 - at))
        assert [b.fingerprint for b in rest] == [b.fingerprint for b in whole[at:]]
        assert whole[at - 1].next == whole[at].position


def test_micro_batch_layout(make_config: MakeConfig) -> None:
    spec = prepare(make_config()).train
    rows = spec.plan.rows(0, 0, 2)
    micro = to_tensors(build_micro(spec.plan.store, [*rows, []], pad_id=257))
    assert micro["input_ids"].shape[0] == 3
    assert micro["input_ids"].shape[1] % 8 == 0
    at = 0
    for segment in rows[0]:
        part = slice(at, at + segment.length)
        ids, trained = decode(spec.plan.store.read(*segment))
        assert micro["input_ids"][0, part].tolist() == ids.tolist()
        assert micro["position_ids"][0, part].tolist() == list(range(segment.length))
        assert micro["labels"][0, at] == IGNORE
        expected = np.where(trained, ids, IGNORE)[1:].tolist()
        assert micro["labels"][0, part].tolist()[1:] == expected
        at += segment.length
    assert (micro["input_ids"][0, at:] == 257).all()
    assert (micro["labels"][0, at:] == IGNORE).all()
    assert (micro["labels"][2] == IGNORE).all()


def test_second_preparation_reads_nothing(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(make_config())

    def refuse(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    assert prepare(make_config(), map_units=refuse).identity == first.identity


def test_changed_file_is_prepared_again(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(instruction_rows(30)))
    config = make_config(f"data.train.path={path}")
    before = prepare(config).identity
    path.write_text(json.dumps(instruction_rows(31)))
    assert prepare(config).identity != before


def test_empty_data_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(DataError, match="'e' is empty: it contains no documents"):
        prepare(make_config(f"data.train.path={tmp_path / 'e.json'}"))
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        prepare(make_config(f"data.train.path={tmp_path / 'e.jsonl'}"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="all 1 rows were skipped"):
        prepare(make_config(f"data.train.path={tmp_path / 'bad.jsonl'}", "data.on_bad_row=skip"))
    with pytest.raises(DataError, match=r"data.train.path: nothing found at"):
        prepare(make_config("data.train.path=/nowhere.json"))


def test_report_warns_where_the_end_is_never_trained(make_config: MakeConfig) -> None:
    prepared = prepare(make_config())
    tokenizer = byte_tokenizer()
    assert describe(prepared, tokenizer).warnings == []
    never = byte_tokenizer()
    never.eos_token = "a"
    warnings = describe(prepared, never).warnings
    assert not any("never trained" in w for w in warnings), "some document trains on an a"
    never.pad_token = never.eos_token = "\u0100"  # byte 0, which no document contains
    never.additional_special_tokens = []
    texts = describe(prepared, never).warnings
    assert any("padding equals" in w for w in texts)


def test_rows_of_step_match_the_stream(make_config: MakeConfig) -> None:
    spec = prepare(make_config()).train
    batches = list(LocalStream(spec, 0, 1).batches(Position(), 8))
    for step in (1, 4, 8):
        position, rows, fingerprint = rows_of_step(spec, step)
        assert position == batches[step - 1].position
        assert fingerprint == batches[step - 1].fingerprint % 2**64
        assert len(rows) == 8


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_jsonl_give_rows_or_bad_rows(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "d.jsonl"
    path.write_bytes(content)
    section = SourceSection(path=str(path))
    rows = [row for unit in sources.list_units(section, "k") for row in sources.read_unit(unit, section)]
    batch = tokenize_rows(rows, formats.text, byte_tokenizer(), TokenizeOptions({}, on_bad_row="skip"))
    assert batch.num_rows + int(batch.schema.metadata[b"skipped"]) == len(rows)
