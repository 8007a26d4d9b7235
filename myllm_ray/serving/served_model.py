"""A trained model that answers: its prompts, its limits, and where it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.validation import typed
from myllm_ray.data.chat import tokenize_prompt
from myllm_ray.data.messages import BadRow, Messages
from myllm_ray.data.special_tokens import continued
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.decoding import check_decodable
from myllm_ray.serving.sampling import Sampling
from myllm_ray.trained_model import TrainedModel, kind_of_trained, open_trained

_SHARE = 4
"""An answer may use at least 1/4 of a model's context: older turns of a chat are left out for it."""


def check_kind(name: str, command: str) -> None:
    """Checks that a name refers to a language model, without reading its weights.

    Raises:
        CheckpointError: There is no checkpoint.
        ConfigError: The model can't be found, or it is a reward model.
    """
    if kind_of_trained(name) == "reward_model":
        raise ConfigError(f"{command} needs a language model; {name} is a reward model")


def chosen_device(device: str | None) -> torch.device:
    """Returns the device of a name; by default a GPU if there is one.

    Raises:
        ConfigError: torch does not know the device, or it is not available.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return found


class ServedModel:
    """What a chat or a server knows of a model apart from its weights: its prompts, settings and limits.

    Args:
        opened: The trained model, with or without weights.
        name: The name shown to users and clients.

    Raises:
        ConfigError: The model is not a causal language model of transformers.
    """

    def __init__(self, opened: TrainedModel, name: str):
        if not isinstance(opened.model, CausalLM):
            kind = type(opened.model).__name__
            raise ConfigError(f"{name} is not a causal language model of transformers but a {kind}")
        self.name, self.tokenizer, self.end_tokens = name, opened.tokenizer, opened.end_tokens
        self.on_chats = opened.on_chats
        self.defaults = Sampling.of(opened.generation)
        config = opened.model.config.get_text_config()
        self.limit: int | None = getattr(config, "max_position_embeddings", None)
        """The largest number of tokens of a prompt and its answer, or None if the model has no limit."""
        self.vocabulary = int(opened.model.head.shape[0])

    def sampling(self, given: Mapping[str, Any], where: str) -> Sampling:
        """Returns sampling settings: those given, else those of the model's generation config, else the defaults.

        Args:
            given: Settings by name; None is not given.
            where: The place of the settings, for error messages.

        Raises:
            ConfigError: A setting is unknown or has a wrong value.
        """
        return typed(Sampling, {**self.defaults, **{k: v for k, v in given.items() if v is not None}}, where)

    def chat_prompt(self, messages: Messages) -> list[int]:
        """Returns the ids of a chat and of the beginning of the assistant's next turn.

        Raises:
            ConfigError: The model has no chat template.
            BadRow: The template refuses the messages.
        """
        if not self.on_chats:
            raise ConfigError(f"{self.name} has no chat template and was not trained on chats: it only continues text")
        check_text(messages)
        return tokenize_prompt(messages, self.tokenizer)[0]

    def text_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text to continue. Names of special tokens in it are encoded as such.

        As in training, the text follows the begin-of-text token if the tokenizer has one of its own.
        """
        check_text(text)
        return continued(self.tokenizer, text)

    def room(self, prompt: list[int]) -> int | None:
        """Returns the largest number of tokens of an answer to a prompt, or None if the model has no limit."""
        return None if self.limit is None else self.limit - len(prompt)

    def fitting_prompt(self, messages: Messages, max_new_tokens: int) -> tuple[list[int], int]:
        """Returns the prompt of a chat, without the oldest turns if the model's context is too short.

        The system message and the last question are always part of it. At least `max_new_tokens` tokens, or a quarter
        of the context if that is less, are left for the answer, unless the last question alone leaves fewer.

        Args:
            messages: The chat: an optional system message, then questions and answers in turn, then a question.
            max_new_tokens: The length of the answer.

        Returns:
            The ids, and the number of messages left out.

        Raises:
            ConfigError: The last question does not fit, or the model has no chat template.
            BadRow: The template refuses the messages.
        """
        first = 1 if messages[0]["role"] == "system" else 0
        left_out = 0
        while True:
            kept = Messages([*messages[:first], *messages[first + left_out :]])
            prompt = self.chat_prompt(kept)
            room, last = self.room(prompt), len(kept) == first + 1
            if room is None or room >= min(max_new_tokens, (self.limit or 0) // _SHARE) or (last and room > 0):
                return prompt, left_out
            if last:
                raise ConfigError(
                    f"the question has {len(prompt)} tokens with its template; the context of {self.name} is "
                    f"{self.limit} tokens: ask a shorter one"
                )
            left_out += 2


class LoadedModel(ServedModel):
    """A model with its weights, which the sampler of this package uses.

    Args:
        opened: The trained model.
        name: The name shown to users and clients.
        device: The device to compute on. On the CPU the weights stay in fp32; elsewhere they get the dtype of the
            weights that training started from.

    Raises:
        ConfigError: The model is not a language model that the sampler supports.
    """

    def __init__(self, opened: TrainedModel, name: str, device: torch.device | str = "cpu"):
        super().__init__(opened, name)
        model = cast(CausalLM, opened.model)
        check_decodable(model)
        self.model = model.eval()
        if torch.device(device).type != "cpu":
            for parameter in self.model.parameters():  # buffers, such as rotary frequencies, stay in fp32
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(opened.dtype)
            self.model.to(device)

    @staticmethod
    def open(name: str, command: str, device: torch.device | str = "cpu") -> LoadedModel:
        """Opens a model: the folder of a run, a checkpoint, a folder in Hugging Face format, or a hub id.

        Args:
            name: The path or id.
            command: The command that needs the model, for error messages.
            device: The device to compute on.

        Raises:
            CheckpointError: There is no complete checkpoint.
            ConfigError: The model can't be found or loaded, or is not a language model that the sampler supports.
        """
        check_kind(name, command)
        return LoadedModel(open_trained(name), name_of(name), device)


def name_of(name: str) -> str:
    """Returns the name of a model to show: that of its run, its folder, or the hub id."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path = path.resolve()
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "checkpoints" else path.name


def check_text(value: Any) -> None:
    """Checks that the texts of a JSON value can be encoded as UTF-8.

    Raises:
        BadRow: A text contains half of a surrogate pair (JSON can contain it as an escape).
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow("the text contains an unpaired surrogate, which is not a character") from None
    elif isinstance(value, Mapping):
        check_text([*value.keys(), *value.values()])
    elif isinstance(value, Iterable):
        for part in value:
            check_text(part)
