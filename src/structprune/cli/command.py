"""Help texts: options in groups, examples at the end, lines that break between words only."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from structprune.recipe import Group as SettingsGroup

MAX_WIDTH = 100
_OWN_OPTIONS = "Options"
_NAMES_WIDTH = 30
_Row = tuple[str, str]
# Option -> what it means without a value.
_BARE = {"--merge-adapter": "beside"}


class Command(TyperCommand):
    """A verb: its options under the groups that `rich_help_panel` names, its epilog (examples) as written."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give options that may stand without a value the one that this means."""
        spelled: list[str] = []
        for argument, following in zip(args, [*args[1:], "-"], strict=True):
            spelled.append(argument)
            if argument in _BARE and following.startswith("-"):
                spelled.append(_BARE[argument])
        return super().parse_args(ctx, spelled)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole help text."""
        arguments: list[_Row] = []
        groups: dict[str, list[_Row]] = {title: [] for title in (_OWN_OPTIONS, *SettingsGroup)}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(row)
            else:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or _OWN_OPTIONS, []).append(row)
        formatter.write(_page(_usage(self, ctx), self.help, {"Arguments": arguments, **groups}))
        if self.epilog:
            formatter.write(f"\n{self.epilog.rstrip()}\n")


class Group(TyperGroup):
    """The program: its verbs with the first sentence of each."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole help text."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        verbs = [(name, _first_sentence(command.help or "")) for name, command in commands if command is not None]
        options = [row for parameter in self.get_params(ctx) if (row := parameter.get_help_record(ctx)) is not None]
        formatter.write(_page(_usage(self, ctx), self.help, {"Commands": verbs, _OWN_OPTIONS: options}))


def many_values(*options: str) -> type[Command]:
    """Make the class of a verb that reads `--option a b c` of these options as `--option a --option b --option c`."""

    class ManyValuesCommand(Command):
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


def wrap_words(text: str, width: int) -> list[str]:
    """Split into lines of whole words, no longer than `width` unless one word is; hyphens do not end a word."""
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)


def _usage(command: Any, ctx: Any) -> str:
    return " ".join(["Usage:", ctx.command_path, *command.collect_usage_pieces(ctx)])


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".") + "."


def _page(usage: str, text: str | None, sections: dict[str, list[_Row]]) -> str:
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    lines = [usage]
    for paragraph in (text or "").split("\n\n"):
        lines += ["", *(f"  {line}" for line in wrap_words(paragraph, width - 2))]
    names = [len(name) for rows in sections.values() for name, _ in rows]
    column = max((length for length in names if length <= _NAMES_WIDTH), default=_NAMES_WIDTH) + 2
    for title, rows in sections.items():
        if rows:
            lines += ["", f"{title}:", *_definitions(rows, column, width)]
    return "\n".join(lines) + "\n"


def _definitions(rows: Sequence[_Row], column: int, width: int) -> Iterable[str]:
    """Write two columns; a name that is too long for its column stands on a line of its own."""
    for name, text in rows:
        lines = wrap_words(text, width - column - 2)
        if len(name) + 2 > column or not lines:
            yield f"  {name}"
        else:
            yield f"  {name:<{column}}{lines.pop(0)}"
        yield from (" " * (column + 2) + line for line in lines)
