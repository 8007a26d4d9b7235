"""Shares of the sources of the training data: `data.train[i].share`, or `data.mixture` if they change in the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt, model_validator

from myllm_ray.config.section import Section

if TYPE_CHECKING:
    from myllm_ray.config.sections import SourceSection

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_TOLERANCE = 1e-6
SMALLEST_SHARE = 1e-6
"""The smallest share above 0."""


class MixtureStage(Section):
    """The shares of the sources up to a step."""

    until: PositiveInt | str | None = Field(
        None,
        description="where the stage ends: an optimizer step, or a part of run.max_steps such as 10%; all stages use "
        "the same unit. The last stage ends with the run: without until, or with 100%",
    )
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        description="{name of a source: its share of the tokens}; the shares add up to 1, and other sources have none"
    )

    @model_validator(mode="after")
    def _valid(self) -> MixtureStage:
        if isinstance(self.until, str) and not 0 < (self.part or 0) <= 1:
            raise ValueError(f"until: give an optimizer step, or a part of the run such as 10% (got {self.until!r})")
        check_shares(self.shares.values(), "shares")
        return self

    @property
    def part(self) -> Fraction | None:
        """The end as a part of the run, or None if it is a step or the end of the run."""
        found = _PERCENT.fullmatch(self.until.strip()) if isinstance(self.until, str) else None
        return None if found is None else Fraction(found[1]) / 100


def check_shares(shares: Iterable[float], key: str) -> None:
    """Checks that shares add up to 1.

    Raises:
        ValueError: they do not, or one is too small.
    """
    shares = list(shares)
    if abs(sum(shares) - 1) > _TOLERANCE:
        raise ValueError(f"{key}: the shares must add up to 1 (they add up to {sum(shares):g})")
    if any(0 < share < SMALLEST_SHARE for share in shares):
        raise ValueError(f"{key}: the smallest share above 0 is {SMALLEST_SHARE:g}")


def refuse_share(source: SourceSection) -> None:
    """Raises ValueError if a source that is not trained on has a share."""
    if source.share is not None:
        raise ValueError("share belongs to data.train: data that is not trained on is not mixed")


def check_mixture(sources: Sequence[SourceSection], mixture: Sequence[MixtureStage] | None) -> None:
    """Checks the shares of the training data.

    Raises:
        ValueError: they are contradictory or incomplete.
    """
    given = [source.share for source in sources if source.share is not None]
    if mixture is not None and given:
        raise ValueError("mixture and train.share exclude each other: mixture has the shares of every stage")
    if (mixture is not None or given) and any(source.weight != 1 for source in sources):
        raise ValueError("train.weight is a number of passes per epoch: leave it out where sources have shares")
    if mixture is not None:
        _check_stages(sources, mixture)
    elif given:
        if len(given) < len(sources):
            raise ValueError("train.share: give every source a share, or none")
        check_shares(given, "train.share")


def _check_stages(sources: Sequence[SourceSection], mixture: Sequence[MixtureStage]) -> None:
    names = [source.name for source in sources]
    if not mixture:
        raise ValueError("mixture is an empty list: give at least one stage")
    if None in names or len(set(names)) < len(names):
        raise ValueError("mixture: give every entry of data.train a name of its own (data.train[i].name)")
    for number, stage in enumerate(mixture):
        unknown = [name for name in stage.shares if name not in names]
        if unknown:
            known = ", ".join(map(str, names))
            raise ValueError(f"mixture[{number}].shares: no source is named {unknown[0]} (names: {known})")
    unused = [name for name in names if not any(stage.shares.get(str(name)) for stage in mixture)]
    if unused:
        raise ValueError(f"mixture: source {unused[0]} has no share in any stage: remove it from data.train")
    *earlier, last = mixture
    if last.until is not None and last.part != 1:
        raise ValueError(f"mixture: the last stage ends with the run: leave until={last.until} out, or give 100%")
    if any(stage.until is None for stage in earlier):
        raise ValueError("mixture: only the last stage can be without until")
    ends = [_end(stage) for stage in earlier]
    parts = [isinstance(end, Fraction) for end in ends]
    if any(parts) and not all(parts):
        raise ValueError("mixture: give until as a step in all stages, or as a part of the run (10%) in all")
    if any(a >= b for a, b in pairwise([*ends, *([1] if any(parts) else [])])):
        raise ValueError("mixture: the ends of the stages (until) must ascend")


def _end(stage: MixtureStage) -> int | Fraction:
    """Returns the end of a stage that is not the last one: a step, or a part of the run."""
    return stage.until if isinstance(stage.until, int) else stage.part or Fraction(1)


def stages_of(
    sources: Sequence[SourceSection], mixture: Sequence[MixtureStage] | None
) -> list[tuple[int | Fraction | None, list[float]]]:
    """Returns the stages of a mixture: (end, share of each source). Empty if the sources have no shares.

    The end is an optimizer step, a part of the run, or None for the last stage.
    """
    if mixture is not None:
        shares = [[stage.shares.get(str(source.name), 0.0) for source in sources] for stage in mixture]
        ends = [_end(stage) for stage in mixture[:-1]]
        return list(zip([*ends, None], shares, strict=True))
    given = [source.share for source in sources if source.share is not None]
    return [(None, given)] if given else []
