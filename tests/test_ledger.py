"""The set of pairs done."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ptycho_stream.reconstruct.ledger import PairLedger


def test_pending_pairs_come_in_order_and_only_once():
    ledger = PairLedger()
    taken = []
    while len(batch := ledger.pending(10, 3)):
        ledger.add(batch)
        taken.append(batch.tolist())
    assert taken == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert ledger.added.tolist() == list(range(10))


@given(
    st.lists(st.tuples(st.integers(0, 400), st.booleans()), unique_by=lambda p: p[0], max_size=80)
)
def test_any_set_of_pairs_done_leaves_the_others_pending(done):
    ledger = PairLedger()
    for index, use in done:
        (ledger.add if use else ledger.skip)(np.array([index]))
    expected = sorted(set(range(401)) - {index for index, _ in done})
    assert ledger.pending(401, 1000).tolist() == expected
    assert ledger.count == len(done)
    again = PairLedger(ledger.added, ledger.skipped)
    assert again.pending(401, 1000).tolist() == expected


def test_more_pairs_than_room():
    ledger = PairLedger()
    ledger.add(np.arange(5000))
    assert ledger.pending(5001, 9).tolist() == [5000]
    ledger.add(np.array([5000]))
    assert ledger.pending(5001, 9).tolist() == []
