"""What every part of a report is: values that do not change, and no others than those that are named."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """The base of the report's models."""

    model_config = ConfigDict(frozen=True, extra="forbid")
