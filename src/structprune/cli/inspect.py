"""`structprune inspect`: what a checkpoint is made of and what can be removed from it."""

from __future__ import annotations

import json
from dataclasses import asdict

from structprune.cli.flags import JsonFlag, MergeAdapterFlag, ModelArgument


def inspect(
    model: ModelArgument,
    merge_adapter: MergeAdapterFlag = "none",
    as_json: JsonFlag = False,
) -> None:
    """Show the blocks of MODEL and the units that can be removed. Reads headers only."""
    from structprune.api import inspect_with_runtimes
    from structprune.cli.render import runtime_rows
    from structprune.cli.tables import print_pairs

    layout, supports = inspect_with_runtimes(model, merge_adapter)
    block = max(layout.blocks, key=lambda b: b.num_parameters)
    uneven = any(b.groups != block.groups for b in layout.blocks)
    groups = [
        {
            "kind": kind,
            "units_per_block": sum(part.num_units for part in block.groups_of(kind)),
            "parameters_per_unit": block.unit_parameters(block.group(kind)),
            "share_of_block": block.module_parameters(block.group(kind)) / block.num_parameters,
            "share_of_model": sum(b.module_parameters(b.group(kind)) for b in layout.blocks if b.has(kind))
            / layout.num_parameters,
        }
        for kind in dict.fromkeys(group.kind for group in block.groups)
    ]
    facts = {
        "model": model,
        "family": layout.family,
        "parameters": layout.num_parameters,
        **({"parameters_around_the_text_model": layout.around.parameters} if layout.around.parameters else {}),
        "blocks": len(layout.blocks),
        "hidden_size": layout.hidden_size,
        "vocab_size": layout.vocab_size,
        "max_positions": layout.max_positions,
        "tied_embeddings": layout.tied_embeddings,
        "share_of_blocks": layout.block_parameters / layout.num_parameters,
    }
    if as_json:
        print(
            json.dumps(
                {**facts, "notes": layout.notes, "groups": groups, "runtimes": [asdict(s) for s in supports]}, indent=2
            )
        )
        return
    rows = [(name.replace("_", " "), _show(value)) for name, value in facts.items()]
    for group in groups:
        rows.append(
            (
                f"{group['kind']} units",
                f"{'up to ' if uneven else ''}{group['units_per_block']} per block, "
                f"{group['parameters_per_unit']:,} parameters each; "
                f"{group['share_of_block']:.1%} of a block, {group['share_of_model']:.1%} of the model",
            )
        )
    rows += [("found", note) for note in layout.notes]
    print_pairs(f"structprune inspect {model}", [*rows, *runtime_rows(supports)])


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
