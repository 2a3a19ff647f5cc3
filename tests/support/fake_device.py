"""A device with memory of its own, played by the CPU: what a GPU would refuse fails here too, on any machine.

Tensors on "fake" are computed by the CPU's own kernels, so that results are the host's bit for bit. As on CUDA an
operation takes tensors of one device, but for scalar tensors of the host; stricter than CUDA, which copies host indices
unasked, the fake device refuses them. Only `to`, `copy_`, slice assignment and reads of numbers cross over.

Memory is counted by storages: each once, however many views it has, from the first tensor on it to the last one's end.
What a kernel holds while it runs is not counted. Importing this module registers the device once per process.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import (
    _setup_privateuseone_for_python_backend,  # pyright: ignore[reportPrivateUsage]
)

NAME = "fake"
_FLASH = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value  # pyright: ignore[reportAttributeAccessIssue]


class _Memory:
    """Bytes of the storages that are alive."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.bytes = 0
        self.peak = 0
        self.leases: weakref.WeakValueDictionary[int, _Lease] = weakref.WeakValueDictionary()

    def lease(self, raw: Tensor) -> _Lease:
        """The one of the tensor's storage, shared by all that lie on it."""
        storage = raw.untyped_storage()
        with self.lock:
            found = self.leases.get(storage._cdata)  # pyright: ignore[reportPrivateUsage]
            if found is None:
                found = _Lease(storage)
                self.leases[storage._cdata] = found  # pyright: ignore[reportPrivateUsage]
                self.add(found.num_bytes)
            elif found.num_bytes != storage.nbytes():
                # An empty tensor that an operation filled.
                self.add(storage.nbytes() - found.num_bytes)
                found.num_bytes = storage.nbytes()
            return found

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.bytes += num_bytes
            self.peak = max(self.peak, self.bytes)


class _Lease:
    """A storage on the fake device: its bytes are given back when nothing refers to it any more."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        # Held, so that no other storage takes its address before the lease ends.
        self.storage = storage
        self.num_bytes = storage.nbytes()

    def __del__(self) -> None:
        _MEMORY.add(-self.num_bytes)


_MEMORY = _Memory()


def allocated_bytes() -> int:
    """Of all tensors that are on the fake device now."""
    return _MEMORY.bytes


def peak_bytes() -> int:
    """The most since the last `reset_peak`."""
    return _MEMORY.peak


def reset_peak() -> None:
    with _MEMORY.lock:
        _MEMORY.peak = _MEMORY.bytes


class FakeDeviceTensor(Tensor):
    """A tensor of the fake device; `raw` is the host tensor that plays it."""

    raw: Tensor
    _lease: _Lease

    @staticmethod
    def __new__(cls: type[FakeDeviceTensor], raw: Tensor) -> FakeDeviceTensor:
        # No shell is one of inference: torch makes no views of other tensors there that are.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
                cls,
                raw.shape,
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                layout=raw.layout,
                device=torch.device(NAME, 0),
            )
        made.raw = raw
        made._lease = _MEMORY.lease(raw)
        return made

    def __init__(self, raw: Tensor) -> None:
        """Made by `__new__`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _route(func, args, kwargs or {})

    def tolist(self) -> Any:
        """torch has none for subclasses."""
        return self.raw.tolist()

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"fake: {self.raw!r}"

    def __format__(self, format_spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), format_spec)

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.detach()

    @data.setter
    def data(self, other: FakeDeviceTensor) -> None:
        # Torch would exchange the shell and leave the values.
        Tensor.data.__set__(self, other)  # pyright: ignore[reportAttributeAccessIssue]
        self.raw = other.raw.detach()
        self._lease = other._lease


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, FakeDeviceTensor) else value


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write)


def _route(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the tensors that play the fake device's."""
    name = func._schema.name
    if name == "aten::_to_copy":
        device = kwargs.get("device")
        to_fake = isinstance(args[0], FakeDeviceTensor) if device is None else torch.device(device).type == NAME
        copied = func(_raw(args[0]), **{key: value for key, value in kwargs.items() if key != "device"})
        return FakeDeviceTensor(copied) if to_fake else copied
    if name == "aten::copy_":
        _raw(args[0]).copy_(_raw(args[1]))
        return args[0]
    if name in _OWN:
        return _OWN[name](func, args, kwargs)
    by_raw: dict[int, FakeDeviceTensor] = {}
    raw_args = [_played(name, value, by_raw) for value in args]
    raw_kwargs = {key: _played(name, value, by_raw) for key, value in kwargs.items()}
    written: list[Any] = []
    for place, key in _written(func):
        value = args[place] if place < len(args) else kwargs.get(key)
        written.extend(value if isinstance(value, (list, tuple)) else [value])  # pyright: ignore
    if any(isinstance(value, Tensor) and not isinstance(value, FakeDeviceTensor) for value in written):
        raise RuntimeError(f"{name}: writes a tensor of the host from tensors of the fake device")
    stays = True
    if raw_kwargs.get("device") is not None:
        stays = torch.device(raw_kwargs["device"]).type == NAME
        raw_kwargs["device"] = torch.device("cpu")
    result = func(*raw_args, **raw_kwargs)
    for value in written:
        if value is not None and (value.shape, value.stride()) != (value.raw.shape, value.raw.stride()):
            value.data = FakeDeviceTensor(value.raw)
    return _placed(result, by_raw) if stays else result


# Not closures in `_route`: those that call themselves are rings, which would keep tensors alive beyond their last use.
def _played(name: str, value: Any, by_raw: dict[int, FakeDeviceTensor]) -> Any:
    """An argument with the host tensors that play the fake device's; raises for any other tensor."""
    if isinstance(value, FakeDeviceTensor):
        by_raw[id(value.raw)] = value
        return value.raw
    if type(value) in (int, float, bool, type(None)):
        return value
    if isinstance(value, (list, tuple)):
        return [_played(name, item, by_raw) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Tensor) and value.dim() > 0:
        raise RuntimeError(f"{name}: a host tensor of shape {tuple(value.shape)} among tensors of the fake device")
    if isinstance(value, torch.Generator):
        raise RuntimeError(f"{name}: a generator of the host draws for the fake device")
    return value


def _placed(value: Any, by_raw: dict[int, FakeDeviceTensor]) -> Any:
    """A result on the fake device; what was written comes back as the object that was given."""
    if isinstance(value, Tensor):
        return by_raw[id(value)] if id(value) in by_raw else FakeDeviceTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(item, by_raw) for item in value)  # pyright: ignore
    return value


def _item(_: Any, args: Sequence[Any], __: Mapping[str, Any]) -> Any:
    return args[0].raw.item()


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused wherever the CPU's is: no more scores in memory than on a GPU, and the host's products."""
    settings = dropout_p, is_causal
    named = {"scale": scale, "enable_gqa": enable_gqa}
    raw = map(_raw, (query, key, value, attn_mask))
    choice = torch.ops.aten._fused_sdp_choice(*raw, *settings, **named)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    if choice != _FLASH:
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, *settings, **named)[0]
    fused = torch.ops.aten._scaled_dot_product_fused_attention_overrideable
    return fused(query, key, value, attn_mask, *settings, scale=scale)[0]


def _attention(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    given = _named(func, args, kwargs)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        given.get("dropout_p", 0.0),
        given.get("is_causal", False),
        attn_mask=given.get("attn_bias"),
        scale=given.get("scale"),
    )
    # Lengths, seeds and a mask that only other kernels fill.
    none = [FakeDeviceTensor(torch.empty(0, dtype=torch.int64)) for _ in range(5)]
    sizes = query.shape[2], key.shape[2]
    return FakeDeviceTensor(output), FakeDeviceTensor(logsumexp), *none[:2], *sizes, *none[2:]


def _attention_backward(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    given = _named(func, args, kwargs)
    bias = given.get("attn_bias")
    if given["grad_input_mask"][3] and bias is not None:
        raise RuntimeError("the fake device gives an attention mask no gradient")
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(given[name] for name in ("grad_out", "query", "key", "value", "out", "logsumexp")),
        given["dropout_p"],
        given["is_causal"],
        attn_mask=bias,
        scale=given.get("scale"),
    )
    return *(FakeDeviceTensor(gradient) for gradient in gradients), None


def _named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, with the host tensors that play the fake device's."""
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | dict(kwargs)
    return {key: _played(func._schema.name, value, {}) for key, value in given.items()}


_OWN: dict[str, Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]] = {
    "aten::_local_scalar_dense": _item,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
}


def _fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What makes tensors from none."""
    return _route(func, args, kwargs)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor` and others ask for by themselves, past the subclass."""
    _raw(target).copy_(_raw(source))
    return target


def _silu_backward(grad_output: Tensor, tensor: Tensor) -> Tensor:
    return _route(torch.ops.aten.silu_backward.default, (grad_output, tensor), {})


class _Backend(ModuleType):
    """`torch.fake`: one device, whose random numbers are the host's."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend(NAME))
    all_operations = torch.library.Library("_", "IMPL")
    all_operations.fallback(_fallback, dispatch_key="PrivateUse1")
    one = torch.library.Library("aten", "IMPL")
    one.impl("_copy_from", _copy_from, "PrivateUse1")
    # Above autograd, in place of parts that torch puts these together from where a device has no kernel of its own.
    one.impl("scaled_dot_product_attention", _scaled_dot_product_attention, "AutogradPrivateUse1")
    one.impl("silu_backward", _silu_backward, "AutogradPrivateUse1")
    # Backward passes on the caller's thread, as the CPU's: torch has no thread for a device that came late.
    torch.autograd.set_multithreading_enabled(False)
    return [all_operations, one]


if hasattr(torch, NAME):
    # This file under another name: the device of the first import is the one.
    globals().update(torch.fake.tests)  # pyright: ignore[reportAttributeAccessIssue]
else:
    _LIBRARIES = _register()
    torch.fake.tests = {  # pyright: ignore[reportAttributeAccessIssue]
        name: globals()[name] for name in ("FakeDeviceTensor", "allocated_bytes", "peak_bytes", "reset_peak")
    }
