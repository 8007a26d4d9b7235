"""A chat in a terminal or through pipes: reads lines, and prints answers while they are sampled."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myllm_ray.common.signals import stop_on_signals
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.config.validation import refuse_unknown
from myllm_ray.data.messages import Messages
from myllm_ray.models.decoding import SequenceDecoder, stream
from myllm_ray.serving.sampling import Sampling, answer_seed
from myllm_ray.serving.served_model import LoadedModel
from myllm_ray.serving.text_stream import TextStream

HELP = """\
/params [NAME=VALUE ...]  show or change temperature, top_p, top_k, min_p, max_new_tokens, stop, seed
/system [TEXT]            set the system prompt; without TEXT remove it
/reset                    start a new chat
/compare OTHER            answer with a second model too; /compare off ends it
/save FILE                append the chat to FILE as a line of JSON, which the data format `chat` reads
/help                     show this list
/quit                     quit, as Ctrl-D does
Ctrl-C ends an answer. A question that begins with / is typed with // in place of it."""
_SERIES = ("stop",)


@dataclass
class Speaker:
    """One model in a chat, with its own answers."""

    served: LoadedModel
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)
    left_out: int = 0
    """The number of messages that were left out of the last prompt."""

    def __post_init__(self) -> None:
        # The keys and values of a chat are kept between its turns.
        self.decoder = SequenceDecoder(self.served.model)


class Chat:
    """A chat with one model, or with two that answer the same questions.

    The prompt of every answer is the whole chat as the model's template renders it. An answer is therefore a function
    of the chat, the settings and the seed. Answer `n` of a chat has the seed of answer `n` of `myllm-ray sample`.

    Args:
        served: The model.
        params: Sampling settings by name; those not given are the model's own.
        seed: The seed of the answers.
        system: The system prompt, or None.
        open_other: Opens a model by name, for `/compare`.
        write: Receives the text of answers.
        note: Receives lines about the chat.

    Raises:
        ConfigError: A setting has a wrong value, or the model's template does not take the system prompt.
    """

    def __init__(
        self,
        served: LoadedModel,
        params: dict[str, Any],
        seed: int,
        system: str | None,
        open_other: Callable[[str], LoadedModel],
        write: Callable[[str], None],
        note: Callable[[str], None],
    ):
        self.params, self.seed = dict(params), seed
        self.system: str | None = None
        self.open_other, self.write, self.note = open_other, write, note
        self.speakers = [Speaker(served, served.sampling(self.params, "chat"))]
        self.turn = 0
        self.asked: str | None = None  # the last question, and the first model's chat before it
        self.before: list[dict[str, str]] = []
        if system is not None:
            self._set_system(system)

    def introduce(self) -> None:
        """Writes one line about the model."""
        served = self.speakers[0].served
        self.note(
            f"{served.name}: ask a question; /help lists the commands"
            if served.on_chats
            else f"{served.name} has no chat template: it continues each line as text; /help lists the commands"
        )

    def handle(self, line: str) -> bool:
        """Answers a line, or executes it as a command. Returns whether the chat continues.

        Raises:
            UserError: The command or the question can't be executed. The chat is unchanged.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].strip().partition(" ")
            commands: dict[str, Callable[[str], None]] = {
                "params": self._set_params,
                "system": self._set_system,
                "reset": self._reset,
                "compare": self._compare,
                "save": self._save,
                "help": lambda _: self.note(HELP),
            }
            if name in ("quit", "exit"):
                return False
            if name not in commands:
                raise ConfigError(f"unknown command /{name}: /help lists the commands")
            commands[name](rest.strip())
        elif line.strip():
            self._ask(line[1:] if line.startswith("//") else line)
        return True

    def _ask(self, question: str) -> None:
        """Prints the answers of all models to a question."""
        prompts = [self._prompt(speaker, question) for speaker in self.speakers]
        seed = answer_seed(self.seed, self.turn)
        self.turn += 1
        self.asked, self.before = question, list(self.speakers[0].messages)
        for speaker, prompt in zip(self.speakers, prompts, strict=True):
            if len(self.speakers) > 1:
                self.write(f"[{speaker.served.name}] ")
            answer, completed = self._answer(speaker, prompt, seed)
            if speaker.served.on_chats and answer:
                speaker.messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            if not completed:
                return

    def _prompt(self, speaker: Speaker, question: str) -> tuple[list[int], int]:
        """Returns the ids of a prompt, and the largest number of tokens of the answer."""
        served, most = speaker.served, speaker.sampling.max_new_tokens
        if served.on_chats:
            messages = Messages([*self._system_message(), *speaker.messages, {"role": "user", "content": question}])
            prompt, left_out = served.fitting_prompt(messages, most)
            if left_out > speaker.left_out:
                self.note(
                    f"the chat is longer than the context of {served.name} ({served.limit} tokens): its first "
                    f"{left_out} messages are left out"
                )
            speaker.left_out = left_out
        else:
            prompt = served.text_prompt(question)
        room = served.room(prompt)
        if room is not None and room <= 0:
            raise ConfigError(
                f"the text has {len(prompt)} tokens; the context of {served.name} is {served.limit} tokens"
            )
        return prompt, most if room is None else min(most, room)

    def _answer(self, speaker: Speaker, prompt: tuple[list[int], int], seed: int) -> tuple[str, bool]:
        """Prints an answer while it is sampled. Returns its text, and whether no signal asked to stop."""
        ids, most = prompt
        sampling = speaker.sampling.model_copy(update={"max_new_tokens": most})
        signals: list[str] = []
        text, parts, count, last = TextStream(speaker.served.tokenizer, sampling.stop), list[str](), 0, -1
        sampler = sampling.sampler(speaker.served.tokenizer, speaker.served.end_tokens)
        try:
            with stop_on_signals(signals.append):
                for last in stream(speaker.decoder, sampler, ids, seed):
                    count += 1
                    parts.append(text.add(last))
                    self.write(parts[-1])
                    if text.stopped or signals:
                        break
        except KeyboardInterrupt:  # the second Ctrl-C, in a long forward pass
            signals.append("Ctrl-C")
        parts.append(text.end())
        self.write(parts[-1] + "\n")
        if signals:
            self.note(f"the answer was ended by {signals[0]}")
        elif last not in sampler.end_tokens and not text.stopped:
            self.note(f"the answer was cut after {count} tokens (max_new_tokens, or the end of the context)")
        if "SIGTERM" in signals:
            sys.exit(128 + 15)
        return "".join(parts), not signals

    def _system_message(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _set_system(self, text: str) -> None:
        for speaker in self.speakers if text else ():
            # Some templates refuse a system message: this is reported now and not with the next question.
            speaker.served.chat_prompt(
                Messages([{"role": "system", "content": text}, {"role": "user", "content": "question"}])
            )
        self.system = text or None

    def _reset(self, _: str = "") -> None:
        self.turn, self.asked, self.before = 0, None, []
        for speaker in self.speakers:
            speaker.messages, speaker.left_out = [], 0

    def _set_params(self, text: str) -> None:
        known = [*Sampling.model_fields, "seed"]
        given = dict(part.partition("=")[::2] for part in _words(text))
        refuse_unknown(given, known, "/params")
        new: dict[str, Any] = {**self.params, **{k: v for k, v in given.items() if k not in ("seed", *_SERIES)}}
        new |= {k: [v] if v else [] for k, v in given.items() if k in _SERIES}
        new = {k: None if v in ("none", "null", "") else v for k, v in new.items()}
        seed = given.get("seed", str(self.seed))
        if not (seed.isascii() and seed.isdecimal()):
            raise ConfigError(f"/params: seed={seed!r} is not a non-negative integer")
        found = [speaker.served.sampling(new, "/params") for speaker in self.speakers]
        for speaker, sampling in zip(self.speakers, found, strict=True):
            speaker.sampling = sampling
        self.params, self.seed = new, int(seed)
        for speaker in self.speakers:
            named = f"{speaker.served.name}: " if len(self.speakers) > 1 else ""
            values = {**speaker.sampling.model_dump(), "seed": self.seed}
            self.note(named + " ".join(f"{k}={'none' if v is None else v}" for k, v in values.items()))

    def _compare(self, name: str) -> None:
        if name in ("", "off"):
            if len(self.speakers) == 1:
                raise ConfigError("/compare: give a second model: a run, a folder, or a hub id")
            del self.speakers[1:]
            return
        served, first = self.open_other(name), self.speakers[0]
        if served.on_chats != first.served.on_chats:
            raise ConfigError(
                f"/compare: one of {first.served.name} and {served.name} has a chat template, the other has not"
            )
        if served.name == first.served.name:
            served.name = name
        other = Speaker(served, served.sampling(self.params, "/compare"))
        if self.asked is None:
            self.speakers[1:] = [other]
            self.note(f"{first.served.name} and {served.name} answer each question, with the same seed")
            return
        # The other model answers the last question, after the same chat and with the same seed.
        other.messages = list(self.before)
        self.note(f"the answer of {served.name} to the last question; from now on, both models answer")
        answer, _ = self._answer(other, self._prompt(other, self.asked), answer_seed(self.seed, self.turn - 1))
        if served.on_chats and answer:
            other.messages += [
                {"role": "user", "content": self.asked},
                {"role": "assistant", "content": answer},
            ]
        self.speakers[1:] = [other]

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save: give a file, such as /save chats.jsonl")
        rows = [
            {"messages": [*self._system_message(), *speaker.messages]} for speaker in self.speakers if speaker.messages
        ]
        if not rows:
            raise ConfigError("/save: there is no answer of a chat model to save")
        path = Path(name).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise ConfigError(f"/save: {path} can't be written: {error.strerror or error}") from None
        self.note(f"appended {len(rows)} chat{'s' * (len(rows) > 1)} to {path} (data format: chat)")


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"/params: {error}") from None
    for word in words:
        if "=" not in word:
            raise ConfigError(f"/params: {word!r} is not NAME=VALUE, such as temperature=0.7")
    return words


def lines(interactive: bool) -> Iterator[str]:
    """Yields the lines of standard input, without the line break; in a terminal with a prompt and a history."""
    if not interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401  (`input` then edits the line and has a history)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit quits", file=sys.stderr)


def run_chat(chat: Chat, interactive: bool) -> None:
    """Reads lines until the end of the input or `/quit`.

    Args:
        chat: The chat.
        interactive: Whether a person types: a line that can't be executed is then reported, and the chat continues.

    Raises:
        UserError: A line can't be executed, and the chat is not interactive.
    """
    chat.introduce()
    for line in lines(interactive):
        try:
            if not chat.handle(line):
                return
        except UserError as error:
            if not interactive:
                raise
            chat.note(f"error: {error}")
