"""The base class of all sections of a config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections. Unknown keys are an error, so that a misspelt key does not train with a default value."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), serialize_by_alias=True
    )
