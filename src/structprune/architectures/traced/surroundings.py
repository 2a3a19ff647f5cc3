"""What lies around the blocks of a stock causal model, found by running it: no name of a module is read.

The model is built with a few tokens as vocabulary. Its blocks stay without storage and are passed through; what is
around them gets random weights and runs, so that the order of its modules, the arguments of the blocks and the logits
are known.

Shape suffixes: B sequences, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, PretrainedConfig

from structprune.architectures.stock.config import with_few_tokens
from structprune.architectures.stock.placeholders import Recorder, StopForward, parameters_on_meta
from structprune.architectures.traced.widths import shapes_of
from structprune.errors import UnsupportedError, first_line

VOCAB_SIZE = 128
NUM_WINDOWS, NUM_POSITIONS = 3, 7
"""Sizes of what is run: small, and no factors of usual widths that a graph could take them for. Two windows could be
taken apart where stock code takes a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """A stock model with few tokens, random weights around its blocks, and what its parts are."""

    config: PretrainedConfig
    """Config of the model, with `VOCAB_SIZE` tokens."""
    model: Any
    blocks: nn.ModuleList
    """The stock blocks, parameters on `meta`; `model` has others in their place while it runs."""
    kind_of: tuple[int, ...]
    """Number of each block -> the first block of its kind: of its class, with tensors of the same names and shapes."""
    blocks_module: str
    embedding_modules: tuple[str, ...]
    position_module: str | None
    final_norm_module: str | None
    head_module: str
    computed: Mapping[str, float]
    """Single numbers that embedding modules compute as they are built."""
    hidden_BSD: Tensor
    """What enters the first block for `token_ids(0)`."""
    block_kwargs: tuple[Mapping[str, Any], ...]
    """Arguments of each block beside the hidden states, by name."""
    returns_tuple: bool
    """Whether a block returns its hidden states as the first of several."""

    def logits(self, replaced: Mapping[int, nn.Module], ids_BS: Tensor) -> Tensor:
        """Run the model with some blocks as they are given and the others passed through, (B, S, V)."""
        passed = Recorder((), is_last=False, returns_tuple=self.returns_tuple)
        blocks = [replaced.get(index, passed) for index in range(len(self.blocks))]
        with torch.no_grad():
            return _with_blocks(self.model, self.blocks_module, blocks, ids_BS).logits

    @property
    def attention_implementation(self) -> Literal["sdpa", "eager"]:
        """What stock code chooses where nothing is said."""
        chosen: Any = self.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
        return "eager" if chosen == "eager" else "sdpa"

    def given_buffers(self, index: int) -> dict[str, Tensor]:
        """Return the buffers of block `index` that it has by the model alone, and that no checkpoint has."""
        block = self.blocks[index]
        layer_class: Any = type(block)
        with parameters_on_meta():
            own = dict(layer_class(self.config, layer_idx=index).named_buffers())
        stored = block.state_dict()
        return {name: buffer for name, buffer in block.named_buffers() if name not in own and name not in stored}

    def plain_kwargs(self, index: int) -> dict[str, Any]:
        """Return the arguments of a block that a graph can have: no caches, and nothing that blocks share."""
        return _plain(self.block_kwargs[index])

    def outer_tensors(self) -> dict[str, Tensor]:
        """Return the weights around the blocks by name."""
        prefix = f"{self.blocks_module}."
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(prefix)
        }


def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return all(each is None or isinstance(each, Tensor | bool | int | float | str) for each in leaves)


def set_attention(config: PretrainedConfig, implementation: str) -> None:
    """Say which attention the blocks of a config have: some look it up as they are built, as a model has chosen it."""
    config._attn_implementation = implementation  # pyright: ignore[reportPrivateUsage]


def token_ids(number: int) -> Tensor:
    """Return windows of tokens to run, (B, S); other ones for each number."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, VOCAB_SIZE, (NUM_WINDOWS, NUM_POSITIONS), generator=generator)


def to_meta(value: Any) -> Any:
    """Move the tensors in a nest of tuples, lists and dictionaries to `meta`."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: to_meta(each) for name, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return type(value)(to_meta(each) for each in value)  # pyright: ignore[reportUnknownVariableType]
    return value


def random_tensor(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw a weight: vectors around 1, as norms want them, matrices that keep the size of what they multiply."""
    if len(shape) < 2:
        return torch.rand(tuple(shape), generator=generator) + 0.5
    return torch.randn(tuple(shape), generator=generator) * shape[-1] ** -0.5


def look_around(config: PretrainedConfig) -> Surroundings:
    """Build and run what is around the blocks. Raises UnsupportedError for what is not embedding, blocks, norm, head.

    `config` is that of a model whose blocks have equal widths.
    """
    small: Any = with_few_tokens(config, VOCAB_SIZE)
    # The product of experts that asks for no kind of machine, and for no numbers.
    small._experts_implementation = "batched_mm"
    with parameters_on_meta():
        model: Any = AutoModelForCausalLM.from_config(small, trust_remote_code=False).eval().requires_grad_(False)
    blocks_module, blocks = _blocks(model, small.num_hidden_layers)
    _draw_outer(model, blocks_module)
    head_module = _name_of(model, model.get_output_embeddings(), "head")
    first_embedding = _name_of(model, model.get_input_embeddings(), "token embedding")
    calls = _Calls(model, blocks_module)
    first = _recorded(model, blocks_module, blocks, stops_at=0, returns_tuple=False)[0]
    returns_tuple = _returns_tuple(model, blocks[0], first)
    with calls:
        recorders = _recorded(model, blocks_module, blocks, stops_at=len(blocks) - 1, returns_tuple=returns_tuple)
    before, before_bare = calls.weighted, calls.bare
    found = Surroundings(
        config=small,
        model=model,
        blocks=blocks,
        kind_of=_kinds(blocks),
        blocks_module=blocks_module,
        embedding_modules=(first_embedding, *(name for name in before if name != first_embedding)),
        position_module=_position_module(model, calls.bare),
        final_norm_module=None,
        head_module=head_module,
        computed=_computed_numbers(model, before),
        hidden_BSD=recorders[0].hidden_BSD,
        block_kwargs=tuple(recorder.kwargs for recorder in recorders),
        returns_tuple=returns_tuple,
    )
    if first_embedding not in before:
        raise _not_described("the token embedding does not run before the first block", model, first_embedding)
    try:
        with calls:
            found.logits({}, token_ids(0))
    except Exception as error:
        # As above: stock code may want more of its blocks than hidden states.
        raise _not_described("what is behind its blocks does not run by itself", model, first_line(error)) from error
    behind = [name for name in calls.weighted if name not in before and name != head_module]
    if not behind:
        # Norms without a weight are modules too; what does nothing here, such as dropout, may follow any of them.
        unweighted = calls.bare[len(before_bare) :]
        behind = [name for name in unweighted if not isinstance(model.get_submodule(name), nn.Dropout)]
    if len(behind) > 1:
        raise _not_described("there is more than a norm between the last block and the head", model, ", ".join(behind))
    known = {*before, *behind, head_module}
    prefix = f"{blocks_module}."
    lost = sorted(
        {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
        - known
        - {name for name, _ in model.named_modules() if name.startswith(prefix)}
    )
    if lost:
        raise _not_described("it has weights that are neither embedding, block, norm nor head", model, lost[0])
    return replace(found, final_norm_module=behind[0] if behind else None)


def _recorded(
    model: Any, blocks_module: str, blocks: nn.ModuleList, *, stops_at: int, returns_tuple: bool
) -> list[Recorder]:
    """Run the model as far as a block, and return what stood for its blocks."""
    recorders = [
        Recorder(list(inspect.signature(type(block).forward).parameters)[2:], index == stops_at, returns_tuple)
        for index, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            _with_blocks(model, blocks_module, recorders, token_ids(0))
    except StopForward:
        return recorders
    except Exception as error:
        # Stock code that wants more of its blocks than a call raises many types.
        raise _not_described("what is before its blocks does not run by itself", model, first_line(error)) from error
    raise _not_described("it does not run all of its blocks", model, blocks_module)


def _returns_tuple(model: Any, block: nn.Module, recorder: Recorder) -> bool:
    hidden_BSD, kwargs = to_meta((recorder.hidden_BSD, _plain(recorder.kwargs)))
    try:
        with torch.no_grad():
            return isinstance(copy.deepcopy(block).to("meta")(hidden_BSD, **kwargs), tuple)
    except Exception as error:
        # Stock code that wants more than it is given raises many types.
        raise _not_described("a block of it does not run by itself", model, first_line(error)) from error


def _blocks(model: Any, count: int) -> tuple[str, nn.ModuleList]:
    """Find the list of as many modules as there are blocks, the one with most parameters."""
    lists = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise _not_described("it has no list of blocks", model, f"num_hidden_layers {count}")
    _, name, module = max(lists, key=lambda each: each[0])
    return name, module


def _kinds(blocks: nn.ModuleList) -> tuple[int, ...]:
    """Return for each block the first one of its class that has tensors of the same names and shapes."""
    firsts: dict[Any, int] = {}
    return tuple(
        firsts.setdefault((type(block), tuple(sorted(shapes_of(block).items()))), index)
        for index, block in enumerate(blocks)
    )


def _draw_outer(model: Any, blocks_module: str) -> None:
    """Give the modules around the blocks random weights; tied ones stay one tensor."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if prefix.startswith(f"{blocks_module}."):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in drawn:
                value = random_tensor(parameter.shape, generator)
                # Tokens that are as large as what blocks get, so that factors on either side are seen.
                value = value * parameter.shape[-1] ** 0.5 if isinstance(module, nn.Embedding) else value
                drawn[id(parameter)] = nn.Parameter(value, requires_grad=False)
            # A head that is tied reads what the embedding has.
            setattr(module, name, drawn[id(parameter)])


def _name_of(model: Any, wanted: nn.Module | None, what: str) -> str:
    name = next((name for name, module in model.named_modules() if module is wanted), None)
    if wanted is None or name is None:
        raise _not_described(f"its {what} cannot be found", model, type(wanted).__name__)
    return name


def _with_blocks(model: Any, name: str, blocks: Sequence[nn.Module], ids_BS: Tensor) -> Any:
    stock = model.get_submodule(name)
    model.set_submodule(name, nn.ModuleList(blocks))
    try:
        return model(input_ids=ids_BS, use_cache=False)
    finally:
        model.set_submodule(name, stock)


class _Calls:
    """Names of the modules around the blocks in the order of their calls, inside the context."""

    def __init__(self, model: Any, blocks_module: str) -> None:
        self._model, self._prefix = model, f"{blocks_module}."
        self._handles: list[Any] = []
        self.weighted: list[str] = []
        """Modules with parameters of their own."""
        self.bare: list[str] = []
        """Modules without any parameter."""

    def __enter__(self) -> None:
        self.weighted, self.bare = [], []
        for name, module in self._model.named_modules():
            if name and not name.startswith(self._prefix):
                self._handles.append(module.register_forward_pre_hook(self._noting(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, _: Any) -> None:
            if next(module.parameters(recurse=False), None) is not None:
                self.weighted.append(name)
            elif next(module.parameters(), None) is None:
                self.bare.append(name)

        return note


def _position_module(model: Any, bare: Sequence[str]) -> str | None:
    """Return the module without weights that holds what it has computed from the config, as positions are."""
    found = [name for name in dict.fromkeys(bare) if next(model.get_submodule(name).buffers(), None) is not None]
    if len(found) > 1:
        raise _not_described("several modules without weights compute what its blocks read", model, ", ".join(found))
    return found[0] if found else None


def _computed_numbers(model: Any, names: Sequence[str]) -> dict[str, float]:
    """Return the single numbers that embedding modules hold and no checkpoint has."""
    stored = model.state_dict().keys()
    numbers: dict[str, float] = {}
    for module in names:
        for name, buffer in model.get_submodule(module).named_buffers(recurse=False):
            if f"{module}.{name}" in stored:
                continue
            if buffer.numel() != 1:
                raise _not_described("an embedding computes a table that no checkpoint has", model, f"{module}.{name}")
            numbers[f"{module}.{name}"] = float(buffer)
    return numbers


def _not_described(what: str, model: Any, got: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model.config.model_type} has no family file, and {what}",
        where=type(model).__name__,
        got=got,
        wanted="embedding, equal blocks, norm and head",
    )
