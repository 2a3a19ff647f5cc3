"""How a limit is shared out to tokens and units, on curves whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from structprune.assess.split import Priced, Room, price_at, tokens_share, why

MILLION = 10**6


def steps(loss: Callable[[float], float], *ends: float) -> list[Priced]:
    """Measure a loss, a function of millions of parameters, where so many are gone."""
    found, before = list[Priced](), 0.0
    for end in ends:
        price = (loss(end) - loss(before)) / (end - before)
        found.append(Priced(name="", parameters=round(end * MILLION), bits_per_byte=loss(end), price=price))
        before = end
    return found


def square(scale: float) -> Callable[[float], float]:
    return lambda gone: scale * gone**2


def line(scale: float) -> Callable[[float], float]:
    return lambda gone: scale * gone


def test_prices_between_the_middles_of_steps() -> None:
    """Those of a square are exact: its slope is a line."""
    found = steps(square(0.5), 4, 10, 12)
    for gone in (2, 3, 7, 9, 11):
        assert price_at(found, gone * MILLION) == pytest.approx(gone)
    assert price_at(found, 0) == pytest.approx(2)
    assert price_at(found, 20 * MILLION) == pytest.approx(11)


def test_prices_never_fall() -> None:
    found = steps(square(0.5), 4, 10)
    cheaper = Priced(name="", parameters=20 * MILLION, bits_per_byte=0.0, price=1.0)
    assert price_at([*found, cheaper], 18 * MILLION) == price_at(found, 10 * MILLION)


CASES = [
    # Slopes 2 * 0.1 * x and 2 * 0.3 * (40 - x) meet at 30.
    (square(0.1), square(0.3), Room(least=0, most=40 * MILLION, limit=40 * MILLION), 30),
    # Slopes 0.2 x and 3 meet at 15, whatever the units take then.
    (square(0.1), line(3), Room(least=0, most=40 * MILLION, limit=40 * MILLION), 15),
    (square(0.1), line(3), Room(least=0, most=40 * MILLION), 15),
    # Tokens are cheaper everywhere.
    (line(0.1), square(0.3), Room(least=0, most=10 * MILLION, limit=10 * MILLION), 10),
    # Units are.
    (line(9), line(3), Room(least=0, most=40 * MILLION, limit=40 * MILLION), 0),
    # Tokens cannot give so many, and units take the rest.
    (line(0.1), line(3), Room(least=0, most=25 * MILLION, limit=40 * MILLION), 25),
    # Units cannot give the rest, and tokens go beyond what they are worth.
    (square(0.1), line(3), Room(least=22 * MILLION, most=40 * MILLION, limit=40 * MILLION), 22),
]


@pytest.mark.parametrize(("tokens", "units", "room", "wanted"), CASES)
def test_slopes_meet(
    tokens: Callable[[float], float], units: Callable[[float], float], room: Room, wanted: float
) -> None:
    found = tokens_share(steps(tokens, *range(2, 42, 2)), steps(units, *range(2, 42, 2)), room)
    assert found / MILLION == pytest.approx(wanted, abs=1e-5)


def test_why() -> None:
    room = Room(least=5, most=9, limit=9)
    said = [why(gone, room) for gone in (5, 7, 9)]
    assert "units in scope can give no more" in said[0]
    assert "a further one would cost more" in said[1]
    assert "none of them costs more" in said[2]
    assert "the first ones cost more" in why(0, Room(least=0, most=9))
