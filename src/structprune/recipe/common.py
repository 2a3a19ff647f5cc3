"""The recipe: everything that decides what a run does, as one frozen value that can be hashed, saved and read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from structprune.errors import InputError
from structprune.files import check_path, check_regular
from structprune.kinds import HeadUnits, Structure
from structprune.recipe.fields import (
    DEFAULT_SHARD_BYTES,
    ByteCount,
    Flag,
    Group,
    Share,
    settings_fingerprint,
    validated,
)

Scope = Literal["mlp", "attention", "all"]
_METHODS_OWN = "the method's"


def default_sensitivity_samples(seq_len: int) -> int:
    """Choose the windows of the streamed backward pass where the recipe names none: their tokens are what counts."""
    return max(1, min(24, 24_576 // seq_len))


class Recipe(BaseModel):
    """What to prune and how. `None` means: chosen by the planner, and written into the resolved recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[str, Flag(Group.HOW)] = Field(
        default="structprune", description="a name that `structprune methods` lists"
    )
    sparsity: Annotated[Share, Flag(Group.WHAT)] = Field(
        default=0.3, ge=0.0, lt=1.0, description="share of the scope's parameters to remove, such as 0.3 or 30%"
    )
    scope: Annotated[Scope, Flag(Group.WHAT)] = Field(
        default="mlp", description="sublayers to prune: mlp, attention or all"
    )
    head_units: Annotated[HeadUnits | None, Flag(Group.WHAT, unset=_METHODS_OWN)] = Field(
        default=None,
        description="what attention loses. kv-group: KV heads with their query heads; query-head: query heads alone; "
        "value-channel: channels of the values",
    )
    calibration: Annotated[str | None, Flag(Group.CALIBRATION, unset="the first that can be had")] = Field(
        default=None, description="text to measure on: wikitext2, c4, boolq, self, or the path of a text or jsonl file"
    )
    num_samples: Annotated[int, Flag(Group.CALIBRATION)] = Field(default=128, ge=1, description="calibration windows")
    seq_len: Annotated[int, Flag(Group.CALIBRATION)] = Field(default=2048, ge=2, description="tokens per window")
    memory: Annotated[ByteCount | None, Flag(Group.RESOURCES, unset="80% of what is free")] = Field(
        default=None, ge=1, description="host bytes that the run may add, such as 4GiB"
    )
    device: Annotated[str, Flag(Group.RESOURCES)] = Field(
        default="auto", description="where blocks run: auto, cpu or cuda"
    )
    device_memory: Annotated[ByteCount | None, Flag(Group.RESOURCES, unset="90% of what is free there")] = Field(
        default=None, ge=1, description="bytes that the run may add on a CUDA device, such as 8GiB"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag(Group.RESOURCES)] = Field(
        default="auto", description="number format of forward passes: auto, float32, bfloat16 or float16"
    )
    seed: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=0, ge=0, le=2**63 - 1, description="seed of the draw of windows, and of method random"
    )
    multiple_of: Annotated[int | None, Flag(Group.ADVANCED, unset="32; 128 in wide models")] = Field(
        default=None, ge=1, description="kept units per block are a multiple of this"
    )
    damping: Annotated[
        Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None, Flag(Group.ADVANCED, unset=_METHODS_OWN)
    ] = Field(
        default=None, description="ridge as a share of the Gram's mean diagonal; auto: chosen on held-out windows"
    )
    shrinkage: Annotated[float | None, Flag(Group.ADVANCED, unset=_METHODS_OWN)] = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the correlations between units that greedy removal does not count on",
    )
    score: Annotated[str | None, Flag(Group.HOW, unset=_METHODS_OWN)] = Field(
        default=None, description="what decides which units stay, such as wanda or greedy (docs/methods.md lists all)"
    )
    allocator: Annotated[str | None, Flag(Group.HOW, unset=_METHODS_OWN)] = Field(
        default=None,
        description="how the blocks share the sparsity: uniform, closed-form, fermi-dirac, softmax or standardised",
    )
    solver: Annotated[str | None, Flag(Group.HOW, unset=_METHODS_OWN)] = Field(
        default=None,
        description="how weights are restored: mask-only, bias, least-squares, admm, admm-duals or alternating",
    )
    target: Annotated[Literal["local", "dense-path"] | None, Flag(Group.HOW, unset=_METHODS_OWN)] = Field(
        default=None,
        description="what the solver fits. local: the sublayer's own output; dense-path: the dense model's hidden "
        "states",
    )
    structure: Annotated[Structure | None, Flag(Group.HOW, unset="what the method needs")] = Field(
        default=None, description="widths of the output: uniform (one for all blocks) or per-layer"
    )
    temperature: Annotated[float | None, Flag(Group.ADVANCED, unset=_METHODS_OWN)] = Field(
        default=None, ge=0, description="temperature of the fermi-dirac and softmax allocators"
    )
    min_retention: Annotated[float, Flag(Group.WHAT)] = Field(
        default=0.1, gt=0, le=1, description="least share of its units that a block keeps"
    )
    max_retention: Annotated[float, Flag(Group.WHAT)] = Field(
        default=1.0, gt=0, le=1, description="largest share of its units that a block keeps"
    )
    outer_iterations: Annotated[int, Flag(Group.ADVANCED)] = Field(
        default=0,
        ge=0,
        description="times that removal costs are measured again on the pruned model and shared out anew",
    )
    allow_block_removal: Annotated[bool, Flag(Group.WHAT, names="--allow-block-removal/--no-block-removal")] = Field(
        default=False, description="let a block lose its whole attention or MLP"
    )
    protect_first: Annotated[int | None, Flag(Group.WHAT, unset=_METHODS_OWN)] = Field(
        default=None, ge=0, description="blocks at the start that lose nothing"
    )
    protect_last: Annotated[int | None, Flag(Group.WHAT, unset=_METHODS_OWN)] = Field(
        default=None, ge=0, description="blocks at the end that lose nothing"
    )
    sensitivity_samples: Annotated[
        int | None, Flag(Group.CALIBRATION, unset="24, or fewer where those have more than 24,576 tokens")
    ] = Field(default=None, ge=1, description="windows of the streamed backward pass, or of measured losses")
    tensor_parallel: Annotated[int, Flag(Group.ADVANCED)] = Field(
        default=1, ge=1, description="processes that will share each block: its heads and widths divide by this"
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
    def build(cls, **values: Any) -> Recipe:
        """Validate `values`. Raises InputError that names the field, what it got and what it takes."""
        return validated(cls, values)

    @classmethod
    def from_yaml(cls, path: Path, **overrides: Any) -> Recipe:
        """Read a YAML mapping of recipe fields; `overrides` win. Raises InputError."""
        check_path(path, "the recipe file")
        try:
            check_regular(path)
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except InputError:
            raise
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
        """Hash the canonical JSON of every field with SHA-256."""
        return settings_fingerprint(self)
