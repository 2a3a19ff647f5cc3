"""The command line, run in the process of the test."""

from __future__ import annotations

from collections.abc import Callable

CommandLine = Callable[..., tuple[object, str, str]]
"""Takes the arguments of `structprune`; returns (exit code, standard output, standard error)."""
