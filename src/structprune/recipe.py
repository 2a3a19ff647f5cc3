"""The recipe: everything that decides what a run does, as one frozen value that can be hashed, saved and read."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from structprune.errors import InputError
from structprune.memory import parse_bytes
from structprune.types import HeadUnits

Scope = Literal["mlp", "attention", "all"]
ByteCount = Annotated[int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value)]
"""A number, or a text such as `4GiB`."""
Settings = TypeVar("Settings", bound=BaseModel)


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The settings `kind` of these values. Raises InputError that names the flag, what it got and what it takes."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # Only the field: a union's errors go on with the name of the alternative.
        name = str(first["loc"][0]) if first["loc"] else "recipe"
        flag = "--" + name.replace("_", "-")
        raise InputError(
            f"{flag} is not usable", got=reprlib.repr(first.get("input")), wanted=first["msg"].lower()
        ) from None


def settings_fingerprint(settings: BaseModel) -> str:
    """SHA-256 over the canonical JSON of every field."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def default_sensitivity_samples(seq_len: int) -> int:
    """Windows of the streamed backward pass where the recipe names none: what it finds depends on their tokens."""
    return max(1, min(24, 24_576 // seq_len))


class Recipe(BaseModel):
    """What to prune and how. `None` means: chosen by the planner, and written into the resolved recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "fasp"
    sparsity: float = Field(default=0.3, ge=0.0, lt=1.0, description="share of the scope's parameters to remove")
    scope: Scope = "mlp"
    head_units: HeadUnits | None = Field(
        default=None,
        description="what attention loses: KV heads with their query heads, query heads alone, or channels of the "
        "values; None: the method's",
    )
    calibration: str | None = Field(default=None, description="wikitext2, c4, boolq, self, or a text or jsonl file")
    num_samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    memory: ByteCount | None = Field(default=None, ge=1, description="host bytes that the run may add")
    device: str = "auto"
    device_memory: ByteCount | None = Field(
        default=None, ge=1, description="bytes that the run may add on a CUDA device; None: 90% of what is free there"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0)
    multiple_of: int | None = Field(default=None, ge=1, description="kept units per block are a multiple of this")
    damping: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = Field(
        default=None, description="ridge as a share of the Gram's mean diagonal; auto: chosen on held-out windows"
    )
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the units' correlations that removal does not count on; None: the method's",
    )
    score: str | None = Field(default=None, description="what decides which units stay; None: the method's")
    allocator: str | None = Field(default=None, description="how the blocks share the sparsity; None: the method's")
    solver: Literal["mask-only", "bias", "least-squares", "admm", "admm-duals", "alternating"] | None = Field(
        default=None, description="how weights are restored; None: the method's"
    )
    target: Literal["local", "dense-path"] | None = Field(default=None, description="what the solver fits")
    structure: Literal["uniform", "per-layer"] | None = Field(default=None, description="output format")
    temperature: float | None = Field(
        default=None, ge=0, description="of the energy and softmax allocators; None: the method's"
    )
    min_retention: float = Field(default=0.1, gt=0, le=1, description="least share of its units that a block keeps")
    max_retention: float = Field(default=1.0, gt=0, le=1, description="largest share of its units that a block keeps")
    outer_iterations: int = Field(
        default=0,
        ge=0,
        description="times that removal costs are measured again on the pruned model and shared out anew",
    )
    allow_block_removal: bool = Field(default=False, description="a block may lose its whole attention or MLP")
    protect_first: int | None = Field(
        default=None, ge=0, description="blocks at the start that lose nothing; None: the method's"
    )
    protect_last: int | None = Field(
        default=None, ge=0, description="blocks at the end that lose nothing; None: the method's"
    )
    sensitivity_samples: int | None = Field(
        default=None,
        ge=1,
        description="windows of the streamed backward pass, or of measured losses; None: 24, or fewer where those have "
        "more than 24,576 tokens",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="processes that will share each block: its heads and widths divide by this"
    )
    reload_check: bool = Field(
        default=True, description="whether stock code loads the result, in a process of its own, and is compared"
    )

    @classmethod
    def build(cls, **values: Any) -> Recipe:
        """Validate `values`. Raises InputError that names the field, what it got and what it takes."""
        return validated(cls, values)

    @classmethod
    def from_yaml(cls, path: Path, **overrides: Any) -> Recipe:
        """Read a YAML mapping of recipe fields; `overrides` win. Raises InputError."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError("the recipe file does not exist", where=str(path)) from None
        except Exception as error:
            # PyYAML's constructors raise ValueError, TypeError, RecursionError and more beside YAMLError.
            raise InputError(
                "the recipe file cannot be read as YAML", where=str(path), got=" ".join(str(error).split())
            ) from None
        if data is None:
            data = {}
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise InputError(
                "a recipe must be a mapping",
                where=str(path),
                got=type(data).__name__,
                wanted="lines such as `sparsity: 0.3`",
            )
        unknown = sorted(set(data) - set(cls.model_fields))
        if unknown:
            raise InputError(
                f"unknown recipe field {unknown[0]!r}", where=str(path), do=f"known: {', '.join(cls.model_fields)}"
            )
        return cls.build(**{**data, **overrides})

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of every field."""
        return settings_fingerprint(self)
