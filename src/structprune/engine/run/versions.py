"""Versions of what decides the bytes of a result."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

import torch


@functools.cache
def _installed(name: str) -> str:
    """Return the version of an installed package; reading it takes milliseconds."""
    return importlib.metadata.version(name)


def versions() -> dict[str, str]:
    """Return the versions of everything that decides the bytes of a result."""
    return {
        "structprune": _installed("structprune"),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "safetensors": _installed("safetensors"),
        "python": platform.python_version(),
    }
