"""What decides a recovery, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from structprune.recipe import ByteCount, settings_fingerprint, validated


@dataclass(frozen=True, slots=True, kw_only=True)
class _Defaults:
    learning_rate: float
    epochs: int


# Tried on SmolLM2-135M at 30% (docs/recover.md).
_DEFAULTS = {
    "stream": _Defaults(learning_rate=1e-4, epochs=1),
    "blocks": _Defaults(learning_rate=3e-4, epochs=4),
    "lora": _Defaults(learning_rate=1e-3, epochs=1),
}


class RecoverySettings(BaseModel):
    """How to recover, on what, and for how long. `None` means: the mode's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["stream", "blocks", "lora"] = "stream"
    calibration: tuple[str, ...] = Field(default=(), description="texts to learn from, each a domain of its own")
    num_samples: int = Field(default=512, ge=2, description="windows of each text, held-out ones included")
    seq_len: int = Field(default=1024, ge=2)
    held_out: int | None = Field(default=None, ge=1, description="windows of each text that are only measured on")
    epochs: int | None = Field(default=None, ge=1, description="passes over the windows; of mode blocks at most")
    minutes: float | None = Field(default=None, gt=0, description="time limit of the training, in minutes")
    batch: int = Field(default=2, ge=1, description="windows per step of the optimiser")
    learning_rate: float | None = Field(default=None, gt=0)
    warmup: int = Field(default=5, ge=0, description="steps over which the learning rate rises")
    rank: int = Field(default=16, ge=1, description="of mode lora's updates")
    mix: Literal["given", "robust"] = Field(
        default="given",
        description="given: all windows alike; robust: texts that are furthest from the teacher count more",
    )
    mix_radius: float = Field(default=0.5, gt=0, description="chi-square distance that mix robust may move")
    memory: ByteCount | None = Field(default=None, ge=1, description="host bytes that the run may add")
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0)
    reload_check: bool = True

    @classmethod
    def build(cls, **values: Any) -> RecoverySettings:
        """Validate `values`. Raises InputError that names the field, what it got and what it takes."""
        return validated(cls, values)

    def resolved(self) -> RecoverySettings:
        """With the mode's own learning rate and number of passes where none were given."""
        own = _DEFAULTS[self.mode]
        return self.model_copy(
            update={
                "learning_rate": own.learning_rate if self.learning_rate is None else self.learning_rate,
                "epochs": own.epochs if self.epochs is None else self.epochs,
            }
        )

    @property
    def rate(self) -> float:
        """The learning rate of resolved settings."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def passes(self) -> int:
        """The number of epochs of resolved settings."""
        assert self.epochs is not None
        return self.epochs

    @property
    def limit_s(self) -> float | None:
        """The time limit in seconds."""
        return None if self.minutes is None else 60 * self.minutes

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of every field."""
        return settings_fingerprint(self)
