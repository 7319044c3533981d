"""Mixtures: shares, cursors, epochs, and places that nothing but their number decides."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np

from mmi_train.data.document import Part, TextPart
from mmi_train.data.mixture import MixedDocuments, MixedOrder, Source, Turns
from mmi_train.data.order import ShuffledOrder


class Numbers:
    """Documents that tell their number and epoch."""

    def __init__(self, name: str, count: int) -> None:
        self.label, self.count, self.sha256 = name, count, name

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.label} {index}"

    def parts(self, index: int, epoch: int = 0) -> tuple[Part, ...]:
        return (TextPart(f"{self.label} {index} {epoch}", True),)


def mixture(**counts: int) -> MixedDocuments:
    return MixedDocuments(
        [Source(name, Numbers(name, count), count**0.5) for name, count in counts.items()]
    )


def test_sources_are_drawn_by_their_weights() -> None:
    turns = Turns([2.0, 1.0, 0.5, 0.5], seed=3)
    drawn = Counter(turns[place][0] for place in range(20_000))
    for source, share in enumerate((0.5, 0.25, 0.125, 0.125)):
        spread = np.sqrt(20_000 * share * (1 - share))
        assert abs(drawn[source] - 20_000 * share) < 4 * spread
    other = Turns([2.0, 1.0, 0.5, 0.5], seed=4)
    assert drawn != Counter(other[place][0] for place in range(20_000))


def test_a_turn_counts_the_places_of_its_source_before_it() -> None:
    """Across blocks of places too, from whatever place one begins."""
    turns, seen = Turns([3.0, 1.0], seed=0), [0, 0]
    for place in range(9000):
        source, turn = turns[place]
        assert turn == seen[source]
        seen[source] += 1
    assert Turns([3.0, 1.0], seed=0)[8999] == turns[8999]
    assert [turns[place] for place in (5, 8500, 6)] == [
        Turns([3.0, 1.0], seed=0)[place] for place in (5, 8500, 6)
    ]


def test_every_source_goes_through_its_documents_once_an_epoch() -> None:
    documents = mixture(a=7, b=40)
    order = MixedOrder(documents, 1)
    seen: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    for place in range(400):
        number, epoch = order[place]
        source, own = documents.place(number)
        seen[documents.sources[source].name].append((epoch, own))
    for name, count in (("a", 7), ("b", 40)):
        epochs = [
            seen[name][at : at + count] for at in range(0, len(seen[name]) // count * count, count)
        ]
        assert len(epochs) > 2
        for number, epoch in enumerate(epochs):
            assert {one for one, _ in epoch} == {number}
            assert sorted(own for _, own in epoch) == list(range(count))
        assert any(
            one != other for one, other in pairwise([[own for _, own in epoch] for epoch in epochs])
        )


def test_numbers_lead_to_the_documents_of_their_source() -> None:
    documents = mixture(a=3, b=2)
    assert len(documents) == 5
    assert [documents.name(number) for number in range(5)] == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert documents.parts(4, 6) == (TextPart("b 1 6", True),)
    draw = np.random.default_rng(0)
    order = MixedOrder(documents, 0)
    assert {order.another(3, draw) for _ in range(50)} == {3, 4}


def test_documents_alone_keep_their_order() -> None:
    """Runs that were begun on a file go on."""
    order, expected = MixedOrder(Numbers("x", 11), 5), ShuffledOrder(11, 5)
    assert [order[place] for place in range(40)] == [
        (expected[place], place // 11) for place in range(40)
    ]


def test_other_weights_or_shapes_are_other_data() -> None:
    one = mixture(a=3, b=2)
    other = MixedDocuments([Source("a", Numbers("a", 3)), Source("b", Numbers("b", 2))])
    assert one.sha256 == mixture(a=3, b=2).sha256 != other.sha256
