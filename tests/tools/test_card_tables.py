from __future__ import annotations

import pytest

from tools.card_tables import (
    CARDS,
    CPU,
    MODELS,
    NETWORKS,
    ONE_BOX,
    DataSheet,
    Network,
    main,
    predictions,
)


def test_documented_tables_are_what_the_formula_says() -> None:
    assert main(["--check"]) == 0


def test_what_fits_is_told_by_memory() -> None:
    """70B is too much for two cards of 16 GiB, 32B for one, and 8B for none."""
    p100 = CARDS[0]
    small, middle, large = (predictions(m, p100, p100, ONE_BOX) for m in MODELS)
    assert [p.fits for p in small.values()] == [True] * 4
    assert [middle["alone"].fits, middle["layers"].fits, middle["tensor"].fits] == [0, 1, 1]
    assert not any(p.fits for p in large.values())


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_cards_wait_for_exchanges_and_processors_for_memory(network: Network) -> None:
    """A pair of cards loses more by the network than a pair of processors does."""
    small = MODELS[0]

    def share(one: DataSheet, other: DataSheet) -> float:
        slow, fast = (
            predictions(small, one, other, n)["tensor"].tokens_per_second
            for n in (network, ONE_BOX)
        )
        return slow / fast

    assert share(CARDS[2], CARDS[2]) < share(CPU, CPU) < 1
