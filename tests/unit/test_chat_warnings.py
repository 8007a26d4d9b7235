"""Warnings about the data before a run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import MakeConfig
from test_chat import TALK, tokenizer_with

from myllm_ray.data.inspect import describe
from myllm_ray.data.prepare import prepare
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.preparation import warn_of_data


def chats(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_tokenizer_without_a_template_gives_a_warning(make_config: MakeConfig, tmp_path: Path) -> None:
    bare = tokenizer_with(None)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    path = chats(tmp_path / "rows.jsonl", [{"messages": TALK}] * 12 + [{"messages": TALK[:2]}] * 36)
    overrides = ("data.validation=null", f"data.train.path={path}", "data.train.format=chat")
    prepared = prepare(make_config(f"tokenizer={{path: {tmp_path / 'bare'}}}", *overrides))
    assert (
        "the tokenizer has no chat template: chats are written as ChatML (<|im_start|>role ... <|im_end|>)"
        in prepared.notes[0]
    )
    assert (
        prepared.notes[1]
        == "46 of 48 documents (95.8%) are exact copies of others: each is trained on as often as it is in the data"
    )
    report = describe(prepared, open_tokenizer(prepared.tokenizer_folder))
    assert report.warnings[:2] == list(prepared.notes)
    assert (report.sources[0].duplicates, prepared.train.plan.store.duplicates, prepared.train.plan.store.chats) == (
        46,
        46,
        48,
    )
    built_in = prepare(make_config("tokenizer={kind: bytes}", *overrides))
    assert len(built_in.notes) == 1


def test_duplicates_are_counted_within_and_across_sources(make_config: MakeConfig, tmp_path: Path) -> None:
    one = chats(tmp_path / "one.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    two = chats(tmp_path / "two.jsonl", [{"text": "b"}, {"text": "c"}])
    config = make_config(
        "trainer=pretrain",
        "data.validation=null",
        f"data.train=[{{path: {one}}}, {{path: {two}}}]",
        "data.sequence_length=16",
    )
    store = prepare(config).train.plan.store
    assert [source["duplicates"] for source in store.meta["sources"]] == [1, 0]
    assert store.duplicates == 2


def test_a_run_that_never_trains_on_an_end_token_warns_at_its_start(make_config: MakeConfig, warned: list[str]) -> None:
    warn_of_data(prepare(make_config("data.train.format=helpers:without_its_end")))
    assert warned == [
        "the token that ends a turn (<|endoftext|> or <|im_end|>) is never trained on: the model will not learn to "
        "stop; put it inside the trained part of the chat template or format"
    ]
    warned.clear()
    warn_of_data(prepare(make_config("data.sequence_length=1024")))
    assert not warned
