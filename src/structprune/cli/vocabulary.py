"""`structprune vocabulary`: which tokens of a model are worth a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.command import many_values
from structprune.cli.flags import JsonFlag, MergeAdapterFlag, ModelArgument, QuietFlag
from structprune.errors import InputError

VocabularyCommand = many_values("--text")


def vocabulary(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The list, a JSON file for `prune --vocabulary`.")],
    size: Annotated[str, typer.Option(help="Tokens that stay, such as 64000 or 64k; a multiple of 64 is taken.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help="One or more texts that the model is meant for, as --calibration takes them: code.jsonl:2.",
        ),
    ],
    drop_reserve: Annotated[
        bool,
        typer.Option("--drop-reserve", help="Let added tokens go that stand for nothing yet, such as <unused12>."),
    ] = False,
    merge_adapter: MergeAdapterFlag = "none",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Choose the tokens of MODEL that stay: those that the texts use most, and what every text needs."""
    from structprune.assess import VocabularyRequest, choose_vocabulary
    from structprune.cli.progress import progress_observer
    from structprune.cli.tables import print_pairs
    from structprune.files import check_path, write_text
    from structprune.recipe.limits import parse_count

    check_path(output, "the file of -o")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(
            "the list cannot be written here", where=str(output), wanted="a file in a folder that is there"
        )
    request = VocabularyRequest(
        size=parse_count(size), texts=text, drop_reserve=drop_reserve, merge_adapter=merge_adapter
    )
    with progress_observer(quiet=quiet) as observer:
        found = choose_vocabulary(model, request, observer)
    written = found.kept.model_dump_json()
    write_text(output, written)
    if as_json:
        print(json.dumps({**json.loads(written), "ids": len(found.kept.ids)}, indent=2))
        return
    rows = [
        ("tokens", f"{len(found.kept.ids):,} of {found.num_tokens:,}"),
        ("of the texts' tokens stay", f"{found.kept.covered:.3%} of {found.kept.num_tokens:,}"),
        *((f"tokens of {each.text}", f"{each.after / max(1, each.before) - 1:+.2%}") for each in found.lengths),
    ]
    if found.num_reserve:
        rows.append(("kept though unused", f"{found.num_reserve:,} added tokens; --drop-reserve lets them go"))
    print_pairs(f"structprune vocabulary {model}", rows)
    print(f"written to {output}: structprune prune {model} -o OUT --vocabulary {output} --sparsity 0.3")
