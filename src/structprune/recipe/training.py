"""What decides a recovery, as one frozen value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from structprune.recipe.fields import (
    BOS_FIELD,
    DEFAULT_SHARD_BYTES,
    OUTPUT_DTYPE_FIELD,
    SAID,
    AdapterSetting,
    BosSetting,
    ByteCount,
    Flag,
    Group,
    OutputDtype,
    settings_fingerprint,
    validated,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Defaults:
    learning_rate: float
    epochs: int


_MOST_HELD_OUT = 8
# Tried on SmolLM2-135M at 30% (docs/recover.md).
_DEFAULTS = {
    "stream": _Defaults(learning_rate=1e-4, epochs=1),
    "blocks": _Defaults(learning_rate=3e-4, epochs=4),
    "scales": _Defaults(learning_rate=3e-3, epochs=1),
    "lora": _Defaults(learning_rate=1e-3, epochs=1),
}


def num_kept_apart(found: int) -> int:
    """Choose how many of a text's windows are only measured on: an eighth, but one at least and few enough."""
    return max(1, min(_MOST_HELD_OUT, found // 8))


def divided(texts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Divide windows into those that are learned from, all together, and those of each text that only measure.

    These are its last ones, an eighth of it; a text with a single window has none, unless all have one.
    """
    counts = [num_kept_apart(len(text)) if len(text) > 1 else 0 for text in texts]
    if not any(counts):
        counts[-1] = 1
    train = sorted(number for text, count in zip(texts, counts, strict=True) for number in text[: len(text) - count])
    measured = tuple(tuple(text[len(text) - count :]) for text, count in zip(texts, counts, strict=True) if count)
    return tuple(train), measured


class RecoverySettings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How to recover, on what, and for how long. `None` means: the mode's own."""

    mode: Annotated[Literal["stream", "blocks", "scales", "lora"], Flag(Group.HOW)] = Field(
        default="stream",
        description="how it learns. stream: all blocks together; blocks: one after the other; scales: as stream, but "
        "only norms, biases and a scale for each channel; lora: low-rank updates",
    )
    calibration: Annotated[tuple[str, ...], Flag(Group.CALIBRATION, unset="as in `prune`")] = Field(
        default=(), description="text to learn from, as in `prune`; given several times, each is a domain of its own"
    )
    merge_adapter: AdapterSetting = Field(
        default="none",
        description="folder of a LoRA adapter that is merged into the teacher first; beside: the one in its folder",
    )
    num_samples: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=512, ge=2, description="windows of each text, held-out ones included"
    )
    seq_len: Annotated[int, Flag(Group.CALIBRATION)] = Field(default=1024, ge=2, description="tokens per window")
    bos: BosSetting = BOS_FIELD
    held_out: Annotated[int | None, Flag(Group.CALIBRATION, unset="an eighth, at most 8")] = Field(
        default=None, ge=1, description="windows of each text that are only measured on"
    )
    epochs: Annotated[int | None, Flag(Group.HOW, unset="1; mode blocks 4")] = Field(
        default=None, ge=1, description="passes over the windows; of mode blocks at most"
    )
    minutes: Annotated[float | None, Flag(Group.HOW, unset="none")] = Field(
        default=None, gt=0, description="time limit of the training, in minutes"
    )
    batch: Annotated[int, Flag(Group.ADVANCED)] = Field(
        default=2, ge=1, description="windows per step of the optimiser"
    )
    learning_rate: Annotated[float | None, Flag(Group.ADVANCED, unset="the mode's")] = Field(
        default=None, gt=0, description="highest learning rate"
    )
    warmup: Annotated[int, Flag(Group.ADVANCED)] = Field(
        default=5, ge=0, description="steps over which the learning rate rises"
    )
    rank: Annotated[int, Flag(Group.ADVANCED)] = Field(default=16, ge=1, description="rank of mode lora's updates")
    mix: Annotated[Literal["given", "robust"], Flag(Group.HOW)] = Field(
        default="given",
        description="weights of the texts. given: all windows alike; robust: texts that are furthest from the teacher "
        "count more",
    )
    mix_radius: Annotated[float, Flag(Group.ADVANCED)] = Field(
        default=0.5, gt=0, description="chi-square distance that mix robust may move"
    )
    memory: Annotated[ByteCount | None, Flag(Group.RESOURCES, unset="80% of what is free")] = Field(
        default=None, ge=1, description="host bytes that the run may add, such as 4GiB"
    )
    device: Annotated[str, Flag(Group.RESOURCES)] = Field(
        default="auto", description="where blocks run: auto, cpu or cuda"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag(Group.RESOURCES)] = Field(
        default="auto", description="number format of forward passes: auto, float32, bfloat16 or float16"
    )
    output_dtype: OutputDtype = OUTPUT_DTYPE_FIELD
    seed: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=0, ge=0, le=2**63 - 1, description="seed of the draw of windows"
    )
    max_shard_size: Annotated[ByteCount, Flag(Group.ADVANCED)] = Field(
        default=DEFAULT_SHARD_BYTES,
        ge=1,
        description="largest weight file of the output, such as 2GB; a smaller output is one file",
    )
    reload_check: Annotated[bool, Flag(Group.RESOURCES)] = Field(
        default=True, description="load the result with stock code, in a process of its own, and compare its logits"
    )

    @classmethod
    def build(cls, **values: Any) -> RecoverySettings:
        """Validate `values`. Raises InputError that names the field, what it got and what it takes."""
        return validated(cls, values)

    def resolved(self) -> ResolvedRecovery:
        """Take the mode's own learning rate and number of passes where none were given."""
        own = _DEFAULTS[self.mode]
        return ResolvedRecovery(
            **{
                **dict(self),
                "learning_rate": own.learning_rate if self.learning_rate is None else self.learning_rate,
                "epochs": own.epochs if self.epochs is None else self.epochs,
            }
        )

    @property
    def limit_s(self) -> float | None:
        """The time limit in seconds."""
        return None if self.minutes is None else 60 * self.minutes

    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical JSON of every field."""
        return settings_fingerprint(self)


class ResolvedRecovery(RecoverySettings, frozen=True):
    """What a recovery works by."""

    learning_rate: float = SAID
    epochs: int = SAID
