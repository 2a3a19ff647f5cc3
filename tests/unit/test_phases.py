"""Phases: the names that reports and plans are written with, and the meter that counts under them."""

from __future__ import annotations

import json

import torch

from structprune.memory import PeakMeter
from structprune.phases import Phase, PhaseBytes, SublayerPhase, by_name, fullest


def test_the_names_are_those_of_the_reports_that_users_have() -> None:
    assert [str(phase) for phase in Phase] == [
        "calibration text",
        "embed",
        "read block",
        "propagate",
        "write block",
        "copy embeddings and head",
        "perplexity of the calibration text",
        "perplexity of held-out windows",
        "angular distances",
        "measured losses",
        "sensitivity: backward",
        "sensitivity: loss",
        "sensitivity: scores",
        "gates",
        "search: statistics",
        "search: candidates",
        "iterate",
        "repair",
        "merged rows",
        "statistics",
        "eigenvectors",
        "rotate block",
        "rotate embeddings",
        "rotate head",
    ]
    assert SublayerPhase.STATISTICS.of("mlp") == "statistics (mlp)"
    assert SublayerPhase.SOLVE.of("attention") == "solve (attention)"
    assert SublayerPhase.REMOVAL_COSTS.of("mlp") == "sensitivity: costs (mlp)"
    assert SublayerPhase.SEARCH_ORDER.of("mlp") == "search: order (mlp)"
    assert SublayerPhase.SEARCH_SOLVE.of("attention") == "search: solve (attention)"


def test_bytes_by_name_are_plain_json_in_the_same_order() -> None:
    phases: PhaseBytes = {SublayerPhase.SOLVE.of("mlp"): 3, Phase.EMBED: 7, Phase.WRITE_BLOCK: 7}
    named = by_name(phases)
    assert json.dumps(named) == '{"solve (mlp)": 3, "embed": 7, "write block": 7}'
    assert all(type(name) is str for name in named)
    assert fullest(phases) is Phase.EMBED


def test_a_phase_that_comes_twice_counts_its_higher_peak() -> None:
    with PeakMeter() as meter:
        with meter.phase(Phase.EMBED):
            torch.ones(4 * 2**20)
        with meter.phase(SublayerPhase.SOLVE.of("mlp")):
            torch.ones(24 * 2**20)
        with meter.phase(Phase.EMBED):
            torch.ones(12 * 2**20)
    assert list(meter.phases) == [Phase.EMBED, SublayerPhase.SOLVE.of("mlp")]
    # The system counts resident pages in batches: a few hundred KiB may not show.
    assert 47 * 2**20 <= meter.phases[Phase.EMBED] < 96 * 2**20
    assert meter.phases[SublayerPhase.SOLVE.of("mlp")] >= 95 * 2**20
