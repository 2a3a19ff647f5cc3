"""A module as the graph that was traced, with other tensors and sizes: runs without the code of the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import UnsupportedError, first_line
from structprune.modules.compare import are_close, tensors_of
from structprune.modules.layout import evaluating
from structprune.tracing.graph import Traced
from structprune.tracing.replay import Example, Kept, returned


class GraphModule(nn.Module):
    """The graph of a module with fewer units, and its tensors under their old names.

    It takes arguments of the sizes that were traced, returns what the module returned, and can be trained; dropout and
    the statistics of norms stay as they are in evaluation.
    """

    def __init__(self, traced: Traced, state: Mapping[str, Tensor], kept: Kept) -> None:
        super().__init__()
        self._traced = traced
        self._kept = kept
        self._constants: dict[str, Tensor] = {}
        """Tensors that are no parameters or buffers of the model, such as tables that its code makes."""
        self._places: dict[str, tuple[nn.Module, str]] = {}
        parameters = frozenset(traced.program.graph_signature.parameters)
        made: dict[int, Tensor] = {}
        for name, tensor in state.items():
            if name in parameters:
                # A tensor with two names has one expression of its axes.
                shared = made.setdefault(
                    id(traced.parameters[name]), nn.Parameter(tensor.detach(), tensor.is_floating_point())
                )
                place, last = self._places[name] = make_place(self, name)
                place.register_parameter(last, shared)  # pyright: ignore[reportArgumentType]
            elif name in traced.program.constants:
                self._constants[name] = tensor.detach()
            else:
                place, last = self._places[name] = make_place(self, name)
                place.register_buffer(last, tensor.detach())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = {
            **self._constants,
            **{name: getattr(module, last) for name, (module, last) in self._places.items()},
        }
        return returned(self._traced, state, Example(args=args, kwargs=kwargs), self._kept)


def make_place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the submodule that a tensor's full name names, made where it is not there yet, and the name in it."""
    module = root
    *path, last = name.split(".")
    for each in path:
        if each not in dict(module.named_children()):
            module.add_module(each, nn.Module())
        module = module.get_submodule(each)
    return module, last


def save_program(model: nn.Module, example: Example, path: Path) -> None:
    """Export a module for the sizes of an example, and write the program (.pt2), which torch.export.load reads.

    Raises UnsupportedError where torch.export has no graph of it, or one that returns something else for the example.
    """
    try:
        with warnings.catch_warnings(), evaluating(model), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, tuple(example.args), dict(example.kwargs), strict=False)
            wanted = tensors_of(model(*example.args, **example.kwargs))
            found = tensors_of(program.module()(*example.args, **example.kwargs))
            torch.export.save(program, path)
    except Exception as error:
        # torch.export raises many types.
        raise UnsupportedError(
            "the smaller module cannot be exported", where=type(model).__name__, got=first_line(error)
        ) from error
    if not are_close(found, wanted):
        path.unlink()
        raise UnsupportedError("the exported program returns something else", where=type(model).__name__)
