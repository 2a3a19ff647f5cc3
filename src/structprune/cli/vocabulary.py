"""`structprune vocabulary`: which tokens of a model are worth a row, and what vocabularies of several sizes cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.command import many_values
from structprune.cli.flags import JsonFlag, MergeAdapterFlag, ModelArgument, QuietFlag
from structprune.errors import InputError

if TYPE_CHECKING:
    from structprune.assess.sizes import SizesTable
    from structprune.assess.vocabulary import VocabularyChoice
    from structprune.vocabulary.kept import KeptTokens

VocabularyCommand = many_values("--text", "--measure")


def vocabulary(
    model: ModelArgument,
    text: Annotated[
        list[str],
        typer.Option("--text", help="One or more texts that the model is meant for, as --calibration takes them."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The list, a JSON file for `prune --vocabulary`.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Tokens that stay, such as 64000 or 64k; a multiple of 64 is taken.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Several sizes, such as 32k,48k,64k, to measure what each costs.")
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option("--measure", help="One or more other texts, to measure --sizes on.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window of --measure.")] = 1024,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of each text of --measure.")] = 3,
    drop_reserve: Annotated[
        bool,
        typer.Option("--drop-reserve", help="Let added tokens go that stand for nothing yet, such as <unused12>."),
    ] = False,
    merge_adapter: MergeAdapterFlag = "none",
    dtype: Annotated[str, typer.Option(help="Of --measure: auto, float32, bfloat16 or float16.")] = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Choose the tokens of MODEL that stay: those that the texts use most, and what every text needs.

    With --sizes show what vocabularies of these sizes cost in bits per byte, and what the MLP's channels do; -o is then
    the list of the smallest one whose parameters cost no more than the channels'.
    """
    from structprune.api import prune
    from structprune.assess import VocabularyRequest, choose_vocabulary
    from structprune.assess.sizes import SizesRequest, price_sizes
    from structprune.cli.progress import progress_observer
    from structprune.recipe.limits import parse_count

    if (size is None) == (sizes is None):
        raise InputError("one size is chosen, or several are measured", wanted="--size or --sizes")
    if size is not None and output is None:
        raise InputError("the list of tokens has no place", wanted="-o FILE")
    if size is not None and measure:
        raise InputError(
            "one size is chosen without being measured", got="--measure", wanted="--sizes, or --size alone"
        )
    _check_output(output)
    if sizes is not None:
        several = SizesRequest(
            sizes=[parse_count(each) for each in sizes.split(",")],
            texts=text,
            measured_on=measure or [],
            seq_len=seq_len,
            max_windows=max_windows,
            drop_reserve=drop_reserve,
            merge_adapter=merge_adapter,
            dtype=dtype,
        )
        with progress_observer(quiet=quiet) as observer:
            table = price_sizes(model, several, observer, prune)
        _show_sizes(model, table, output, as_json=as_json)
        return
    request = VocabularyRequest(
        size=parse_count(size), texts=text, drop_reserve=drop_reserve, merge_adapter=merge_adapter
    )
    with progress_observer(quiet=quiet) as observer:
        found = choose_vocabulary(model, request, observer)
    assert output is not None
    _write(output, found.kept)
    if as_json:
        print(json.dumps({**found.kept.model_dump(mode="json"), "ids": len(found.kept.ids)}, indent=2))
    else:
        _show_choice(model, found, output)


def _check_output(output: Path | None) -> None:
    """Raise InputError for a place that no file can be written to."""
    from structprune.files import check_path

    if output is None:
        return
    check_path(output, "the file of -o")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(
            "the list cannot be written here", where=str(output), wanted="a file in a folder that is there"
        )


def _write(output: Path, kept: KeptTokens) -> None:
    from structprune.files import write_text

    write_text(output, kept.model_dump_json())


def _show_choice(model: str, found: VocabularyChoice, output: Path) -> None:
    from structprune.cli.tables import print_pairs

    rows = [
        ("tokens", f"{len(found.kept.ids):,} of {found.num_tokens:,}"),
        ("of the texts' tokens stay", f"{found.kept.covered:.3%} of {found.kept.num_tokens:,}"),
        *((f"tokens of {each.text}", f"{each.after / max(1, each.before) - 1:+.2%}") for each in found.lengths),
    ]
    if found.num_reserve:
        rows.append(("kept though unused", f"{found.num_reserve:,} added tokens; --drop-reserve lets them go"))
    print_pairs(f"structprune vocabulary {model}", rows)
    print(f"written to {output}: structprune prune {model} -o OUT --vocabulary {output} --sparsity 0.3")


def _show_sizes(model: str, table: SizesTable, output: Path | None, *, as_json: bool) -> None:
    """Print the table, and write the list that it speaks for; none where not even the largest size is worth it."""
    from structprune.cli.tables import Column, print_table

    best = table.best
    if output is not None and best is not None:
        _write(output, table.lists[best])
    if as_json:
        sizes = [asdict(size) for size in table.sizes]
        found = {"dense_bits_per_byte": table.dense_bits, "sizes": sizes, "channels": asdict(table.channels)}
        print(json.dumps({**found, "best": None if best is None else len(table.lists[best].ids)}, indent=2))
        return
    figures = ("parameters fewer", "bits per byte", "for a million more")
    print_table(
        f"structprune vocabulary {model}: what goes, and what it costs",
        [Column(name="smaller by"), *(Column(name=name, figures=True) for name in figures)],
        [
            ("nothing", "", f"{table.dense_bits:.4f}", ""),
            *(
                (row.name, f"{row.parameters:,}", f"{row.bits_per_byte:.4f}", f"{row.price:+.5f}")
                for row in (*table.sizes, table.channels)
            ),
        ],
    )
    if best is None:
        print("no size is worth it: from the first on its parameters cost more than the MLP's channels do")
    else:
        written = "" if output is None else f"; its list is in {output}"
        print(f"{table.sizes[best].name} are the fewest that cost no more than the MLP's channels{written}")
