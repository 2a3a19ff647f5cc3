"""What recipes of all pipelines have in common, and how a mapping of settings finds the class that validates it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, model_validator
from pydantic.fields import FieldInfo

from structprune.errors import InputError, UnsupportedError
from structprune.kinds import Scope
from structprune.recipe.fields import (
    BOS_FIELD,
    DEFAULT_SHARD_BYTES,
    OUTPUT_DTYPE_FIELD,
    SAID,
    AdapterSetting,
    BosSetting,
    ByteCount,
    CalibrationTexts,
    Flag,
    Group,
    OutputDtype,
    Seconds,
    Share,
    flag_of,
    settings_fingerprint,
    validated,
)
from structprune.recipe.limits import TARGETS
from structprune.recipe.settings_file import read_yaml
from structprune.recipe.tokens import (
    DROP_RESERVE_FIELD,
    VOCABULARY_FIELD,
    VOCABULARY_TEXT_FIELD,
    AskedVocabulary,
    DropReserve,
    VocabularyTexts,
    decided_tokens,
)
from structprune.registry import Registry
from structprune.texts import AUTO, WeightedText, weighted_texts
from structprune.vocabulary.kept import ALL_TOKENS, KeptTokens, Vocabulary

DEFAULT_METHOD = "structprune"
# By how much a perplexity has grown is known to a few percent from the first, to about one from the second.
_FEWEST_HELD_OUT_TOKENS, _MOST_HELD_OUT_TOKENS = 2_048, 32_768
MOST_SAMPLES = 128
"""Calibration windows of a run that is not told how many, where there is time for them."""
DEFAULT_TIME_BUDGET_S = 20 * 60


def default_sensitivity_samples(seq_len: int) -> int:
    """Choose the windows of the streamed backward pass where the recipe names none: their tokens are what counts."""
    return max(1, min(24, 24_576 // seq_len))


def default_held_out(num_samples: int, seq_len: int) -> int:
    """Choose the windows that are only measured on, where the recipe names none: both models pass them once.

    An eighth of the others, but as many as tell something, and no more than cost little.
    """
    fewest = min(num_samples, -(-_FEWEST_HELD_OUT_TOKENS // seq_len))
    return max(1, min(max(num_samples // 8, fewest), _MOST_HELD_OUT_TOKENS // seq_len))


class Recipe(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What to prune and how; `None` means that the method or the planner chooses.

    `Recipe(method=..., ...)` is a recipe of the method's pipeline: a UnitsRecipe, DepthRecipe, ExpertsRecipe,
    SliceRecipe or ElementsRecipe, which say what each takes beside the fields here. Raises InputError for an unknown
    method, and UnsupportedError for settings that have no meaning for it.
    """

    pipeline: ClassVar[str] = ""
    """The pipeline that it is a recipe for; empty: the method decides which class it becomes."""
    removes: ClassVar[str] = ""
    """What the pipeline removes, in words."""
    settled: ClassVar[Mapping[str, Any]] = {}
    """Fields of other pipelines with the values that recipes of earlier versions may have here: they ask for what the
    pipeline does anyway."""

    method: Annotated[str, Flag(Group.HOW)] = Field(
        default=DEFAULT_METHOD, description="a name that `structprune methods` lists"
    )
    sparsity: Annotated[Share, Flag(Group.WHAT)] = Field(
        default=0.3, ge=0.0, lt=1.0, description="share of the scope's parameters to remove, such as 0.3 or 30%"
    )
    scope: Annotated[Scope, Flag(Group.WHAT)] = Field(
        default="mlp", description="sublayers to prune: mlp, attention or all; vocabulary: none, tokens alone go"
    )
    calibration: Annotated[CalibrationTexts, Flag(Group.CALIBRATION, unset=AUTO)] = Field(
        default=(AUTO,),
        description="text to measure on: wikitext2, c4, boolq, python, self, or the path of a text or jsonl file; "
        "auto: the first of wikitext2, boolq and self that can be had; mix: two parts of that and one of python; given "
        "several times, the windows are shared out to the texts, by weights if some have one, as in code.jsonl:2",
    )
    merge_adapter: AdapterSetting = Field(
        default="none",
        description="folder of a LoRA adapter that is merged into the weights first; beside: the one in MODEL's folder",
    )
    vocabulary: AskedVocabulary = VOCABULARY_FIELD
    vocabulary_text: VocabularyTexts = VOCABULARY_TEXT_FIELD
    drop_reserve: DropReserve = DROP_RESERVE_FIELD
    num_samples: Annotated[
        int | None, Flag(Group.CALIBRATION, unset=f"as many as --time-budget allows, at most {MOST_SAMPLES}")
    ] = Field(default=None, ge=1, description="calibration windows")
    seq_len: Annotated[int, Flag(Group.CALIBRATION)] = Field(default=2048, ge=2, description="tokens per window")
    bos: BosSetting = BOS_FIELD
    held_out: Annotated[
        int | None, Flag(Group.CALIBRATION, unset="an eighth of --num-samples, 2,048 to 32,768 tokens")
    ] = Field(
        default=None,
        ge=0,
        description="windows of the same text that nothing is fitted on, to measure perplexity before and after; "
        "0: none",
    )
    time_budget: Annotated[Seconds | None, Flag(Group.RESOURCES, unset="20m")] = Field(
        default=None,
        ge=0,
        description="time that the run is to take on this machine, such as 10m or 2h; it decides --num-samples where "
        "that is not given",
    )
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
    output_dtype: OutputDtype = OUTPUT_DTYPE_FIELD
    seed: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=0, ge=0, le=2**63 - 1, description="seed of the draw of windows, and of method random"
    )
    tensor_parallel: Annotated[int, Flag(Group.ADVANCED)] = Field(
        default=1, ge=1, description="processes that will share each block: its heads and widths divide by this"
    )
    max_shard_size: Annotated[ByteCount, Flag(Group.ADVANCED, unset="5GB")] = Field(
        default=DEFAULT_SHARD_BYTES,
        ge=1,
        description="largest weight file of the output, such as 2GB; a smaller output is one file",
    )
    reload_check: Annotated[bool, Flag(Group.RESOURCES)] = Field(
        default=True, description="load the result with stock code, in a process of its own, and compare its logits"
    )

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

    def __new__(cls, **values: Any) -> Self:
        """Make an instance of the class for the method's pipeline."""
        return super().__new__(cls if cls.pipeline else cls.kind_for(values))

    @classmethod
    def kinds(cls) -> Registry[Any]:
        """Return the table that `kind_for` chooses from."""
        return RECIPES

    @classmethod
    def kind_for(cls, values: Mapping[str, Any]) -> type[Self]:
        """Find the class that validates `values`, by their method, and by their pattern where the method has both.

        Raises InputError for an unknown method.
        """
        method = values.get("method", DEFAULT_METHOD)
        # What is no name at all is refused when the field is validated.
        return cls.kinds().get(_pipeline_of(method, values) if isinstance(method, str) else "units")

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        if self.scope == "vocabulary" and not self.vocabulary:
            raise InputError("no tokens are to go", got="--scope vocabulary", wanted="--vocabulary 64000, or a list")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        if not isinstance(values, Mapping):
            return validate(values)
        if not cls.pipeline:
            return cls.kind_for(values).model_validate(values)
        return validate(cls.own_values(values))

    @classmethod
    def own_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out other pipelines' fields that ask for nothing. Raises UnsupportedError for one that does."""
        method = values.get("method")
        if isinstance(method, str) and _pipeline_of(method, values) != cls.pipeline:
            raise InputError(f"method {method!r} has another kind of recipe", got=cls.__name__, do="use Recipe")
        foreign = {name: values[name] for name in values if name in all_fields() and name not in cls.model_fields}
        asked = {name: value for name, value in foreign.items() if not cls.asks_nothing(name, value, values)}
        if asked:
            others = cls._methods_with(asked)
            raise UnsupportedError(
                f"{', '.join(map(flag_name, asked))} {'has' if len(asked) == 1 else 'have'} no meaning for method "
                f"{values.get('method') or DEFAULT_METHOD!r}, which removes {cls.removes}",
                got=", ".join(
                    str(value).lower() if isinstance(value, bool) else str(value) for value in asked.values()
                ),
                wanted=f"--method {', '.join(others)}" if others else None,
                do=None if others else f"settings that have one: {', '.join(map(flag_name, cls.model_fields))}",
            )
        if idle := cls.idle(values):
            name, beside = next(iter(idle.items()))
            unset = flag_of(all_fields()[beside]).unset or all_fields()[beside].default
            raise UnsupportedError(
                f"{flag_name(name)} says how {flag_name(beside)} is done, which asks for nothing",
                got=f"{flag_name(name)} {values[name]}, {flag_name(beside)} {unset}",
                wanted=f"a value for {flag_name(beside)}, or {flag_name(name)} left out",
            )
        # None stands for the default where other pipelines leave the field to the method.
        unsaid = {name for name in cls.model_fields if name in values and values[name] is None and cls._has_own(name)}
        return {name: value for name, value in values.items() if name not in foreign and name not in unsaid}

    @staticmethod
    def _methods_with(asked: Mapping[str, Any]) -> list[str]:
        """List the methods for which all of these fields have a meaning."""
        from structprune.methods import METHODS

        return [
            name for name in METHODS if asked.keys() <= Recipe.kind_for({**asked, "method": name}).model_fields.keys()
        ]

    @classmethod
    def _has_own(cls, name: str) -> bool:
        field = cls.model_fields[name]
        return not field.is_required() and field.default is not None and all_fields()[name].default is None

    @classmethod
    def asks_nothing(cls, name: str, value: Any, values: Mapping[str, Any]) -> bool:
        """Say whether a field of other pipelines has a value that changes nothing here."""
        settled = {"sensitivity_samples": default_sensitivity_samples(values.get("seq_len", 2048)), **cls.settled}
        return value in (None, all_fields()[name].default) or (name in settled and value == settled[name])

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """Find what says how another setting is done that asks for nothing: name -> that setting."""
        found: dict[str, str] = {}
        for name in values.keys() & cls.model_fields.keys():
            beside = flag_of(all_fields()[name]).beside
            waits = beside and values.get(beside) in (None, all_fields()[beside].default)
            # Zero stands for none in what a run has worked by.
            if waits and values[name] and not cls.asks_nothing(name, values[name], values):
                found[name] = beside
        return dict(sorted(found.items()))

    @classmethod
    def build(cls, **values: Any) -> Self:
        """Validate `values`. Raises InputError that names the field, what it got and what it takes."""
        return validated(cls, values)

    @classmethod
    def from_yaml(cls, path: Path, **overrides: Any) -> Self:
        """Read a YAML mapping of recipe fields; `overrides` win. Raises InputError."""
        return cls.build(**cls.merged_values(path, overrides))

    @staticmethod
    def merged_values(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Read a YAML mapping of recipe fields without validating it; `overrides` win. Raises InputError."""
        values = read_yaml(path, all_fields())
        # Either decides the number of windows: what overrides one overrides the other.
        for name, other in (("num_samples", "time_budget"), ("time_budget", "num_samples")):
            if overrides.get(name) is not None and other not in overrides:
                values.pop(other, None)
        # A share or limits decide how much goes, and limits go together.
        targets = {name for name in TARGETS if overrides.get(name) is not None}
        if targets and overrides.get("sparsity") is None:
            values.pop("sparsity", None)
        elif overrides.get("sparsity") is not None and not targets:
            for name in TARGETS:
                values.pop(name, None)
        return {**values, **overrides}

    @property
    def most_samples(self) -> int:
        """The calibration windows that are asked for, or the most that are taken where nothing is."""
        return MOST_SAMPLES if self.num_samples is None else self.num_samples

    @property
    def tokens(self) -> KeptTokens:
        """The tokens that stay. Raises InputError where that is not decided."""
        return decided_tokens(self.vocabulary)

    def with_tokens(self, kept: KeptTokens) -> Self:
        """Return the recipe with the tokens that stay decided, and nothing left of how they were chosen."""
        return self.model_copy(update={"vocabulary": kept, "vocabulary_text": (), "drop_reserve": False})

    @property
    def texts(self) -> tuple[WeightedText, ...]:
        """The calibration texts with their weights."""
        return weighted_texts(self.calibration)

    def fingerprint(self) -> str:
        """Hash the canonical JSON of every field with SHA-256."""
        return settings_fingerprint(self)


DeviceBytes = Annotated[
    int,
    BeforeValidator(lambda value: 0 if value is None else value),
    PlainSerializer(lambda value: value or None, return_type=int | None),
]
"""Bytes on a device, 0 where blocks run in host memory; null in JSON."""


class ResolvedRecipe(Recipe, frozen=True):
    """A recipe in which everything is said, as a run works by it: no field is None.

    Before the run has its windows, `calibration` may still be `auto`, and `num_samples` what was asked for.
    """

    vocabulary: Vocabulary = ALL_TOKENS
    num_samples: int = SAID
    time_budget: int = 0
    """0: the number of windows is said."""
    held_out: int = 0
    """Reports of earlier versions name none."""
    memory: int = SAID
    device_memory: DeviceBytes = SAID

    @classmethod
    def of(cls, asked: Recipe, **decided: Any) -> Self:
        """Put together what was asked for and what was decided."""
        return cls(**{**dict(asked), **decided})

    @classmethod
    def kinds(cls) -> Registry[Any]:
        """Return the table that `kind_for` chooses from."""
        return RESOLVED

    @classmethod
    def asks_nothing(cls, name: str, value: Any, values: Mapping[str, Any]) -> bool:
        """Say that it does: reports of earlier versions hold the fields of all pipelines."""
        return True

    @property
    def per_layer(self) -> bool:
        """Whether every block of the output has a config of its own."""
        return False

    @property
    def chooses_ridge(self) -> bool:
        """Whether the ridge is chosen, on windows whose sums are kept apart."""
        return False

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states of all windows are kept beside the pruned ones."""
        return False

    @property
    def protected(self) -> tuple[int, int]:
        """Blocks at the start and at the end that lose nothing."""
        return 0, 0

    @property
    def backward_samples(self) -> int:
        """Windows of the streamed backward pass, or of measured losses."""
        return default_sensitivity_samples(self.seq_len)


RECIPES: Registry[Any] = Registry(
    "pipeline",
    type,
    {
        "units": "structprune.recipe.units:UnitsRecipe",
        "depth": "structprune.recipe.depth:DepthRecipe",
        "experts": "structprune.recipe.experts:ExpertsRecipe",
        "slice": "structprune.recipe.slice:SliceRecipe",
        "elements": "structprune.recipe.elements:ElementsRecipe",
    },
)
"""Pipeline -> what may be asked of it."""

RESOLVED: Registry[Any] = Registry(
    "pipeline",
    type,
    {
        "units": "structprune.recipe.units:ResolvedUnits",
        "depth": "structprune.recipe.depth:ResolvedDepth",
        "experts": "structprune.recipe.experts:ResolvedExperts",
        "slice": "structprune.recipe.slice:ResolvedSlice",
        "elements": "structprune.recipe.elements:ResolvedElements",
    },
)
"""Pipeline -> what a run of it works by."""


@functools.cache
def all_fields() -> dict[str, FieldInfo]:
    """Collect the fields of all pipelines' recipes; one that several have is described as the first of them does."""
    fields: dict[str, FieldInfo] = {}
    for pipeline in RECIPES:
        fields = {**RECIPES.get(pipeline).model_fields, **fields}
    return fields


def _pipeline_of(method: str, values: Mapping[str, Any]) -> str:
    # Only now: methods load torch, and the help of the command line should not wait for that.
    from structprune.methods import METHODS

    return METHODS.get(method).for_pattern(given=values.get("pattern") is not None).pipeline


def flag_name(field: str) -> str:
    """Write a field as it is on the command line."""
    return "--" + field.replace("_", "-")
