"""Exported programs (.pt2) as modules: a graph of operations that the tracer knows, run one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.errors import CheckpointError, InputError, StructPruneError, UnsupportedError, first_line
from structprune.modules.archive import fixed_size, read_archive, type_of
from structprune.modules.program import make_place
from structprune.tracing.graph import IGNORED
from structprune.tracing.rules import operation

_PREFIX = "torch.ops.aten."
_POSITIONAL = 1
_OVERLOAD: Any = type(torch.ops.aten.add.Tensor)
"""Type of an operation for one kind of arguments."""
_AS_THEY_ARE = {
    "as_bool": bool,
    "as_string": str,
    "as_bools": list,
    "as_floats": list,
    "as_strings": list,
}
"""Arguments that the JSON has as they are -> their Python type."""
_LAYOUTS = {7: torch.strided}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
"""Numbers of torch's export schema."""


@dataclass(frozen=True, slots=True)
class _Named:
    """A value that an earlier operation gives."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One operation: what it takes, and the names of what it gives."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    gives: str | tuple[str | None, ...]
    """One name, or one for each tensor of a sequence; None for a result that is dropped."""


class ExportedModule(nn.Module):
    """The graph of an exported program, with its tensors under their names.

    It takes its inputs by name, of the sizes that were exported (`sizes`), and returns a tuple of what comes out.
    """

    def __init__(self, graph_module: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        graph, signature = graph_module["graph"], graph_module["signature"]
        self.sizes: dict[str, tuple[int, ...]] = {}
        """Input -> its sizes."""
        self._inputs: dict[str, str] = {}
        """Name that a caller gives -> name in the graph."""
        self._state: dict[str, tuple[str, str]] = {}
        """Name in the graph -> module and name of the tensor."""
        made: dict[int, Tensor] = {}
        told = _argument_names(graph_module)
        for spec in signature["input_specs"]:
            ((kind, entry),) = spec.items()
            if kind == "user_input":
                name = _name(entry["arg"])
                if name is not None:
                    given = told.get(name, name)
                    self._inputs[given] = name
                    self.sizes[given] = _sizes(graph, name)
            elif kind in _STATE:
                self._put(entry["arg"]["name"], entry[_STATE[kind]], tensors, made, is_parameter=kind == "parameter")
            elif kind != "constant_input":
                raise UnsupportedError("the program has an input that is no tensor", got=kind)
        self._steps = [each for node in graph["nodes"] if (each := _step(node)) is not None]
        self._outputs = [_output(spec) for spec in signature["output_specs"]]

    @property
    def main_input_name(self) -> str:
        return next(iter(self._inputs))

    def _put(
        self, node: str, full: str, tensors: Mapping[str, Tensor], made: dict[int, Tensor], *, is_parameter: bool
    ) -> None:
        """Register a tensor under its path; a tensor of two names stays one."""
        if full not in tensors:
            raise CheckpointError("the program lacks a tensor", wanted=full)
        tensor, (module, last) = tensors[full], make_place(self, full)
        if is_parameter:
            shared = made.setdefault(id(tensor), nn.Parameter(tensor, tensor.is_floating_point()))
            module.register_parameter(last, shared)  # pyright: ignore[reportArgumentType]
        else:
            module.register_buffer(last, tensor)
        self._state[node] = (full.rpartition(".")[0], last)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        if inputs.keys() != self._inputs.keys():
            raise InputError("the program has other inputs", got=", ".join(inputs), wanted=", ".join(self._inputs))
        values: dict[str, Any] = {self._inputs[name]: tensor for name, tensor in inputs.items()}
        values |= {node: getattr(self.get_submodule(path), last) for node, (path, last) in self._state.items()}
        for step in self._steps:
            result = step.run(
                *(_filled(each, values) for each in step.args),
                **{name: _filled(each, values) for name, each in step.kwargs.items()},
            )
            if isinstance(step.gives, str):
                values[step.gives] = result
            else:
                values |= {name: each for name, each in zip(step.gives, result, strict=True) if name is not None}
        return tuple(values[name] for name in self._outputs)


_STATE = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
"""Kind of an input of the graph -> entry with the name of its tensor."""


def load_exported(path: Path) -> ExportedModule:
    """Read a file of torch.export.save as a module; its code is the graph, and no Python comes with it.

    Raises what `read_archive` raises, UnsupportedError for operations that do more than compute tensors and for sizes
    that are not fixed.
    """
    try:
        archive = read_archive(path)
        return ExportedModule(archive.graph, archive.tensors).eval()
    except StructPruneError as error:
        raise error.inside(str(path)) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            "the graph of this program cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {first_line(error)}",
        ) from error


def _argument_names(graph_module: Mapping[str, Any]) -> dict[str, str]:
    """Map names of the graph to those of keyword arguments, which the file has apart from them, in the same order."""
    called = next(each for each in graph_module["module_call_graph"] if each["fqn"] == "")
    spec = json.loads(called["signature"]["in_spec"])[1]
    positional, keywords = spec["children_spec"]
    names = [""] * len(positional["children_spec"]) + json.loads(keywords["context"])
    given = [
        _name(entry.get("arg"))
        for each in graph_module["signature"]["input_specs"]
        for kind, entry in each.items()
        if kind in ("user_input", "constant_input")
    ]
    if len(given) != len(names):
        # Arguments that are sequences of tensors: the graph's own names are used.
        return {}
    return {name: told for name, told in zip(given, names, strict=True) if name and told}


def _name(argument: Any) -> str | None:
    """Return the name of a tensor that is an argument of the whole graph; None for a constant."""
    return argument["as_tensor"]["name"] if isinstance(argument, dict) and "as_tensor" in argument else None


def _sizes(graph: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(fixed_size(each) for each in graph["tensor_values"][name]["sizes"])


def _output(spec: Mapping[str, Any]) -> str:
    ((kind, entry),) = spec.items()
    name = _name(entry["arg"]) if kind == "user_output" else None
    if name is None:
        raise UnsupportedError("the program returns something that is no tensor, or changes its state", got=kind)
    return name


def _step(node: Mapping[str, Any]) -> _Step | None:
    """Read an operation. Raises UnsupportedError for one that is no plain one on tensors: it could be any function."""
    target = str(node["target"])
    packet, _, overload = target.removeprefix(_PREFIX).partition(".")
    if packet in IGNORED and target.startswith(_PREFIX):
        return None
    found: Any = getattr(getattr(torch.ops.aten, packet, None), overload, None) if packet.isidentifier() else None
    if not isinstance(found, _OVERLOAD) or not target.startswith(_PREFIX) or not _is_plain(packet, found):
        raise UnsupportedError(
            "the program has an operation that is not run here",
            where=f"node {node.get('name')}",
            got=target[:200],
            wanted="an ATen operation that computes tensors of tensors and changes none",
            do="prune the module itself with structprune.prune_module",
        )
    args = [_argument(each["arg"]) for each in node["inputs"] if each["kind"] == _POSITIONAL]
    kwargs = {str(each["name"]): _argument(each["arg"]) for each in node["inputs"] if each["kind"] != _POSITIONAL}
    return _Step(run=found, args=tuple(args), kwargs=kwargs, gives=_gives(node["outputs"]))


def _is_plain(packet: str, found: Any) -> bool:
    """Whether the tracer knows the operation, or it is public, only computes, and reads no file."""
    if operation(packet) is not None:
        return True
    schema: Any = found._schema
    hidden = packet.startswith("_") or "unsafe" in packet or schema.is_mutable
    reads_file = any("file" in argument.name for argument in schema.arguments)
    return not hidden and not reads_file and all("Tensor" in str(each.type) for each in schema.returns)


def _gives(outputs: Sequence[Mapping[str, Any]]) -> str | tuple[str | None, ...]:
    if len(outputs) == 1:
        ((kind, value),) = outputs[0].items()
        if kind == "as_tensor":
            return value["name"]
        if kind == "as_tensors":
            return tuple(each["name"] for each in value)
    return tuple(each["as_tensor"]["name"] if "as_tensor" in each else None for each in outputs)


def _argument(given: Mapping[str, Any]) -> Any:
    """Read an argument of an operation; a tensor is known by its name. Raises UnsupportedError for other kinds."""
    ((kind, value),) = given.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return _Named(value["name"])
    if kind in ("as_tensors", "as_optional_tensors"):
        return [_argument(each) if "as_tensor" in each or "as_none" in each else _Named(each["name"]) for each in value]
    if kind in ("as_int", "as_sym_int"):
        return fixed_size(value)
    if kind in ("as_ints", "as_sym_ints"):
        return [fixed_size(each) for each in value]
    if kind == "as_scalar_type":
        return type_of(value)
    if kind == "as_float":
        # Also what JSON has no number for: Infinity, -Infinity, NaN.
        return float(value)
    if kind == "as_device":
        return torch.device("cpu")
    if kind in _NUMBERED:
        return _NUMBERED[kind][value]
    if kind in _AS_THEY_ARE and isinstance(value, _AS_THEY_ARE[kind]):
        return value
    raise UnsupportedError("an operation takes something that is not read here", got=kind)


_NUMBERED: Mapping[str, Mapping[int, Any]] = {"as_layout": _LAYOUTS, "as_memory_format": _MEMORY_FORMATS}


def _filled(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, list):
        return [_filled(each, values) for each in argument]
    return values[argument.name] if isinstance(argument, _Named) else argument
