"""Reports of amounts: parameters, bytes, zeros, and the limits of what the result may have."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from structprune.memory import format_bytes
from structprune.results.frozen import Frozen


class ReachableShares(Frozen):
    """What share of the scope's parameters goes, beside the nearest that its units allow."""

    removed: float
    below: float
    """The largest that is less than what was asked for; 0 where there is none."""
    above: float
    """The smallest that is at least as much."""
    decided: bool = True
    """Whether `removed` is what goes. Before a run whose costs decide it is the most that may go, and at least `above`
    does."""


class SizeReport(Frozen):
    """Parameters and bytes, before and after."""

    parameters_before: int = Field(gt=0)
    parameters_after: int
    bytes_before: int = Field(gt=0)
    bytes_after: int
    dtypes: list[str] = Field(default_factory=list[str])
    """What the output's weights are stored in, that of the most bytes first; empty in reports of earlier versions."""
    removed_share_of_scope: float
    """Removed parameters over the parameters of the modules in scope: what `--sparsity` asks for."""
    reachable: ReachableShares | None = None
    """None in reports of earlier versions."""
    removed_share_of_blocks: float
    removed_share_of_model: float
    """Negative where the output is larger: slicing unties the head from the embedding, which then counts twice."""
    parameters_around: int = 0
    """Parameters of an image-text model around the text model that was pruned: they are in both counts, and stay."""

    @property
    def removed_share_of_text_model(self) -> float:
        """Removed parameters over those of the text model alone."""
        return (self.parameters_before - self.parameters_after) / (self.parameters_before - self.parameters_around)


Counted = Literal["numbers", "bytes", "nanoseconds"]
"""What an amount that is limited is counted in."""


def shown_amount(number: int, counts: Counted) -> str:
    """Write an amount with its unit."""
    if counts == "nanoseconds":
        return f"{number / 1e6:,.2f} ms"
    return f"{number:,} bytes" if counts == "bytes" else f"{number:,}"


class ZerosReport(Frozen):
    """Zeros that were put into the matrices in scope, where single weights went."""

    pattern: str
    asked: float
    """Share of zeros that the pattern wants."""
    weights: int
    """Weights of the matrices in scope."""
    zeros: int
    """Zeros among them, as they are stored."""
    nonzero_parameters: int
    """Parameters of the whole model less those zeros."""

    @property
    def share(self) -> float:
        """Share of zeros in scope."""
        return self.zeros / max(1, self.weights)


class LimitReport(Frozen):
    """A limit of what the result may have, such as of its parameters, and what it has."""

    name: str
    """What is counted, in words."""
    counts: Counted = "numbers"
    at_most: int
    """What was asked for."""
    before: int
    """What the result would have if no unit had gone."""
    predicted: int
    """What the chosen widths give by the source's headers; counts a repair's new biases, which it may leave out."""
    reached: int | None
    """What the written model has; None: that was not measured. A time is measured by `structprune bench`."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """Read what reports of earlier versions say of bytes."""
        if not isinstance(values, dict) or "in_bytes" not in values:
            return values
        counted = {"counts": "bytes" if values["in_bytes"] else "numbers"}
        return {name: value for name, value in values.items() if name != "in_bytes"} | counted

    @property
    def is_missed(self) -> bool:
        """Whether the result has more than was asked for, or is predicted to where that was not measured."""
        return (self.predicted if self.reached is None else self.reached) > self.at_most

    @property
    def line(self) -> str:
        """Say what was asked, what the widths promised, and what the result has."""

        def shown(number: int) -> str:
            size = f" ({format_bytes(number)})" if self.counts == "bytes" else ""
            return f"{shown_amount(number, self.counts).removesuffix(' bytes')}{size}"

        asked = f"asked for at most {shown(self.at_most)}"
        if self.reached is None:
            dense = f"the dense model takes {shown(self.before)}"
            later = "`llama-quantize` makes it" if self.counts == "bytes" else "`structprune bench` measures it"
            return f"{asked}, predicted {shown(self.predicted)} ({dense}); {later}"
        predicted = "as predicted" if self.reached == self.predicted else f"predicted {shown(self.predicted)}"
        return f"{asked}, reached {shown(self.reached)}, {predicted}"
