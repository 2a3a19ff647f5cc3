"""Options that take every value up to the next option: `--methods a b c`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


def many_values(*options: str) -> type[TyperCommand]:
    """A command class that reads `--option a b c` of each of `options` as `--option a --option b --option c`."""

    class ManyValuesCommand(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            """Repeat the option's name before each of its values."""
            spelled: list[str] = []
            current: str | None = None
            first = False
            for argument in args:
                if argument.startswith("-"):
                    name = argument.partition("=")[0]
                    current, first = (argument, True) if argument in options else (None, False)
                    spelled.append(argument)
                    if name in options and "=" in argument:
                        current, first = name, False
                    continue
                if current is not None and not first:
                    spelled.append(current)
                first = False
                spelled.append(argument)
            return super().parse_args(ctx, spelled)

    return ManyValuesCommand
