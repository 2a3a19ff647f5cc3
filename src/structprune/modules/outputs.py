"""How far what a smaller module returns is from what the dense one returns, on some examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from structprune.modules.layout import ModuleLayout
from structprune.tracing.replay import Example, Kept, cut_state, replay


class OutputError:
    """The relative squared error of each output, summed over outputs and examples; the dense outputs are held."""

    def __init__(self, layout: ModuleLayout, dense: Mapping[str, Tensor], examples: Sequence[Example]) -> None:
        self._traced = layout.traced
        self._examples = examples
        self._wanted = [replay(layout.traced, dense, example) for example in examples]

    def __bool__(self) -> bool:
        """Whether there is an example to tell by."""
        return bool(self._examples)

    def without(self, state: Mapping[str, Tensor], gone: Kept) -> float:
        """Return the error of the module with these tensors and without some units; `gone` has those that stay."""
        cut = cut_state(self._traced, state, gone)
        total = 0.0
        for example, wanted in zip(self._examples, self._wanted, strict=True):
            for one, other in zip(replay(self._traced, cut, example, gone), wanted, strict=True):
                if other.is_floating_point():
                    total += float((one - other).square().sum() / other.square().sum().clamp_min(1e-30))
        return total
