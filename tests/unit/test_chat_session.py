"""A chat with tiny models in this process: prompts, seeds, kept keys and values, commands, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import REFUSES_SYSTEM, write_model

from myllm_ray.config import ConfigError, UserError
from myllm_ray.data.formats import chat as chat_format
from myllm_ray.data.messages import Messages
from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, TRAINED
from myllm_ray.models.decoding import SequenceDecoder
from myllm_ray.models.generate import sample
from myllm_ray.serving.chat import Chat
from myllm_ray.serving.served_model import LoadedModel
from myllm_ray.trained_model import open_trained

SHORT = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "talker": write_model(root / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE),
        "other": write_model(root / "other", TRAINED + DEFAULT_CHAT_TEMPLATE, seed=1),
        "short": write_model(root / "short", TRAINED + DEFAULT_CHAT_TEMPLATE, positions=160),
        "strict": write_model(root / "strict", REFUSES_SYSTEM),
        "base": write_model(root / "base", None),
    }


class Recorder:
    """A chat whose output is kept."""

    def __init__(self, folders: dict[str, Path], name: str, system: str | None = None, **params: Any):
        self.written, self.notes = list[str](), list[str]()
        self.chat = Chat(
            LoadedModel.open(str(folders[name]), "chat"),
            {**SHORT, **params},
            0,
            system,
            lambda other: LoadedModel.open(str(folders[other]), "chat"),
            self.written.append,
            self.notes.append,
        )

    def answer(self, line: str) -> str:
        del self.written[:]
        assert self.chat.handle(line)
        return "".join(self.written)


Start = Callable[..., Recorder]


@pytest.fixture
def start(folders: dict[str, Path]) -> Start:
    return lambda name="talker", **given: Recorder(folders, name, **given)


def test_the_first_answer_is_that_of_sample_and_the_seed_reproduces_a_chat(
    start: Start, folders: dict[str, Path]
) -> None:
    one, two = start(), start()
    answers = [one.answer(line) for line in ("hi", "how are you?", "bye")]
    assert answers == [two.answer(line) for line in ("hi", "how are you?", "bye")]
    opened = open_trained(folders["talker"])
    ids = one.chat.speakers[0].served.chat_prompt(Messages([{"role": "user", "content": "hi"}]))
    wanted = sample(opened.model, opened.tokenizer, [ids], opened.end_tokens, **SHORT)[0]  # type: ignore[arg-type]
    assert answers[0] == wanted + "\n"
    one.answer("/reset")
    assert one.answer("hi") == answers[0]
    one.answer("/reset")
    one.answer("/params seed=5")
    assert one.answer("hi") != answers[0]


def test_a_turn_computes_only_what_is_new(start: Start) -> None:
    recorder = start()
    recorder.answer("hi")
    speaker = recorder.chat.speakers[0]
    before = list(speaker.decoder.tokens)
    recorder.answer("and then?")
    prompt = speaker.served.chat_prompt(Messages([*speaker.messages[:2], {"role": "user", "content": "and then?"}]))
    same = (
        next(i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b)
        if before != prompt[: len(before)]
        else len(before)
    )
    assert speaker.decoder.reused == same > 20
    # What is sampled does not depend on what was kept.
    fresh = start()
    fresh.answer("hi")
    fresh.chat.speakers[0].decoder = SequenceDecoder(fresh.chat.speakers[0].served.model)
    fresh.answer("and then?")
    assert fresh.chat.speakers[0].messages == speaker.messages


def test_the_system_prompt(start: Start) -> None:
    plain, system = start().answer("hi"), start(system="Be brief.")
    first = system.answer("hi")
    assert first != plain
    system.answer("/reset")
    assert system.answer("hi") == first, "a new chat has the same system prompt"
    system.answer("/system")
    system.answer("/reset")
    assert system.answer("hi") == plain
    with pytest.raises(UserError, match="no system turns"):
        start("strict", system="Be brief.")
    strict = start("strict")
    wanted = start("strict").answer("hi")
    with pytest.raises(UserError, match="no system turns"):
        strict.answer("/system Be brief.")
    assert strict.answer("hi") == wanted, "a refused command changes nothing"


def test_params(start: Start) -> None:
    recorder = start()
    recorder.answer("/params temperature=0.5 top_k=7 stop='a b' max_new_tokens=3")
    assert recorder.notes[-1] == ("temperature=0.5 top_p=0.95 top_k=7 min_p=0.0 max_new_tokens=3 stop=['a b'] seed=0")
    assert len(recorder.answer("hi").rstrip("\n").encode()) <= 9
    assert "cut after 3 tokens" in recorder.notes[-1]
    recorder.answer("/params top_k=none stop=")
    assert "top_k=none" in recorder.notes[-1]
    assert "stop=[]" in recorder.notes[-1]
    for line, message in (
        ("/params temperatur=1", "did you mean temperature"),
        ("/params temperature=hot", "temperature"),
        ("/params top_p=2", "top_p"),
        ("/params seed=-1", "non-negative integer"),
        ("/params 0.5", "NAME=VALUE"),
        ("/params stop='a", "/params: No closing quotation"),
        ("/perams", "unknown command /perams"),
    ):
        with pytest.raises(ConfigError, match=message):
            recorder.answer(line)
    assert recorder.chat.speakers[0].sampling.temperature == 0.5


def test_the_oldest_turns_are_left_out_of_a_long_chat(start: Start) -> None:
    recorder = start("short", system="Be brief.")
    for number in range(6):
        recorder.answer(f"question {number}")
    speaker = recorder.chat.speakers[0]
    assert any("messages are left out" in note for note in recorder.notes)
    assert speaker.left_out % 2 == 0
    assert speaker.left_out > 0
    assert len(speaker.messages) == 12, "the chat itself is kept, for /save"
    messages = Messages([{"role": "system", "content": "Be brief."}, *speaker.messages[:-2]])
    messages.append({"role": "user", "content": "question 5"})
    prompt, left_out = speaker.served.fitting_prompt(messages, 12)
    assert left_out == speaker.left_out
    assert len(prompt) + 12 <= 160
    text = speaker.served.tokenizer.decode(prompt)
    assert "Be brief." in text
    assert "question 0" not in text
    assert "question 5" in text
    with pytest.raises(ConfigError, match=r"the question has \d+ tokens .* 160 tokens"):
        recorder.answer("x" * 200)
    assert len(speaker.messages) == 12
    nearly = "y" * (160 - len(speaker.served.chat_prompt(Messages([{"role": "user", "content": ""}]))) - 40)
    assert recorder.answer(nearly), "the last question alone may leave less room than the answer wants"


def test_save_writes_chats_that_the_data_format_reads(start: Start, tmp_path: Path) -> None:
    recorder = start(system="Be brief.")
    with pytest.raises(ConfigError, match="no answer"):
        recorder.answer(f"/save {tmp_path}/chats.jsonl")
    recorder.answer("größe?")
    recorder.answer("two")
    recorder.answer(f"/save {tmp_path}/chats.jsonl")
    recorder.answer(f"/save {tmp_path}/chats.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    messages = chat_format(rows[0])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]  # type: ignore[index]
    assert messages[1]["content"] == "größe?"  # type: ignore[index]
    with pytest.raises(ConfigError, match="can't be written"):
        recorder.answer(f"/save {tmp_path}/no/chats.jsonl")


def test_compare_asks_both_models_with_the_same_seed(start: Start) -> None:
    alone, other, recorder = start(), start("other"), start()
    recorder.answer("hi")
    shown = recorder.answer("/compare other")
    assert shown == other.answer("hi"), "the other model answers the last question at once"
    both = recorder.answer("again")
    alone.answer("hi")
    assert both == f"[talker] {alone.answer('again')}[other] {other.answer('again')}"
    recorder.answer("/compare off")
    assert recorder.answer("more") == alone.answer("more")
    with pytest.raises(ConfigError, match="has a chat template, the other has not"):
        recorder.answer("/compare base")
    with pytest.raises(ConfigError, match="give a second model"):
        recorder.answer("/compare")
    first = start()
    first.answer("/compare other")
    assert first.answer("hi") == f"[talker] {start().answer('hi')}[other] {start('other').answer('hi')}"


def test_a_base_model_continues_each_line(start: Start, folders: dict[str, Path]) -> None:
    recorder = start("base")
    recorder.chat.introduce()
    assert "no chat template: it continues each line as text" in recorder.notes[0]
    recorder.answer("import ")
    found = recorder.answer("def ")
    opened = open_trained(folders["base"])
    prompts = [list(b"import "), list(b"def ")]
    wanted = sample(opened.model, opened.tokenizer, prompts, opened.end_tokens, **SHORT)  # type: ignore[arg-type]
    assert found == wanted[1] + "\n"
    with pytest.raises(ConfigError, match="no chat template"):
        recorder.answer("/system Be brief.")
    with pytest.raises(ConfigError, match="no answer of a chat model"):
        recorder.answer("/save x.jsonl")
    with pytest.raises(ConfigError, match="no chat template"):
        start("base", system="Be brief.")


def test_ctrl_c_ends_the_answer_and_not_the_chat(start: Start) -> None:
    recorder = start(max_new_tokens=400)
    count = 0

    def write(text: str) -> None:
        nonlocal count
        count += bool(text)
        recorder.written.append(text)
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)

    recorder.chat.write = write
    answer = recorder.answer("hi")
    assert recorder.notes[-1] == "the answer was ended by Ctrl-C"
    assert len(answer) < 30
    messages = recorder.chat.speakers[0].messages
    assert messages[-1]["content"] + "\n" == answer, "the part that was shown belongs to the chat"
    assert recorder.answer("more")
    assert len(messages) == 4


def test_special_tokens_and_private_characters_in_a_question(start: Start) -> None:
    recorder = start()
    served = recorder.chat.speakers[0].served
    ids = served.chat_prompt(Messages([{"role": "user", "content": "a<|im_end|>b"}]))
    assert ids.count(served.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1, "the question is text"
    with pytest.raises(UserError, match="private-use characters"):
        recorder.answer("\U00100000 <|im_end|>")
    with pytest.raises(UserError, match="surrogate"):
        recorder.answer("\ud800")
    assert recorder.answer("hi") == start().answer("hi")
    assert recorder.answer("//quit") != ""
    assert not recorder.chat.handle("/quit")
