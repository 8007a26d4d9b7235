"""The section `model.lora`: which layers get adapters, and how the adapters are initialized and scaled."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from myllm_ray.config.section import Section


def check_pattern(pattern: str, key: str) -> None:
    """Raises ValueError if a regular expression is invalid."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


class LoraSection(Section):
    """LoRA adapters: trains low-rank updates of frozen matrices (requires the extra `lora`)."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field(
        "all-linear",
        description="all-linear, or the last parts of the names of the layers, such as [q_proj, v_proj], or a regular "
        "expression that matches complete names",
    )
    exclude: str | list[str] = Field(
        default_factory=list, description="targets that get no adapter: last parts of names, or a regular expression"
    )
    layers: list[NonNegativeInt] | None = Field(
        None, description="adapt only the targets in these blocks, counted from 0; default: all blocks"
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="modules that are trained in full: the last parts of their names, such as [embed_tokens, lm_head]",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)")
    dora: bool = Field(False, description="train the norms of the weights' rows separately (DoRA)")
    initialization: Literal["default", "gaussian", "pissa"] = Field(
        "default",
        description="initial adapters. default: A uniform, B zero; gaussian: A normal, B zero; pissa: the principal "
        "singular vectors of the weight",
    )

    @model_validator(mode="after")
    def _patterns(self) -> LoraSection:
        for key in ("targets", "exclude"):
            if isinstance(given := getattr(self, key), str):
                check_pattern(given, key)
            elif key == "targets" and not given:
                raise ValueError("targets is an empty list: name at least one layer")
        return self

    @property
    def base_is_unchanged(self) -> bool:
        """Whether the model without its adapters is the base model."""
        return not self.modules_to_save and self.initialization != "pissa"
