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


def test_a_network_that_is_late_covers_what_comes_first_and_the_rest_when_there_is_time():
    ledger, covered = PairLedger(), []
    for arrived in range(30, 301, 30):  # three times as many as are taken
        batch = ledger.spread(arrived, 10)
        assert batch.tolist() == list(range(arrived - 28, arrived, 3))
        ledger.add(batch)
        covered += batch.tolist()
    left = []
    while len(batch := ledger.spread(300, 10)):
        ledger.add(batch)
        left += batch.tolist()
    assert sorted(covered + left) == list(range(300))
    assert max(np.diff(sorted(left[:50]))) < 20  # not one end of the scan after the other


def test_few_that_come_leave_room_for_those_left_out():
    ledger = PairLedger()
    ledger.add(ledger.spread(100, 10))
    batch = ledger.spread(103, 10)
    assert batch.tolist()[-3:] == [100, 101, 102]
    assert len(batch) == 10 and 12 <= np.diff(batch[:7]).min() <= np.diff(batch[:7]).max() <= 15
    assert ledger.spread(103, 200).tolist() == ledger.pending(103, 200).tolist()
    assert ledger.spread(103, 0).tolist() == []


def test_a_spread_choice_is_that_many_pairs_none_of_them_twice_whatever_the_rounding():
    for waiting in range(1, 140):
        for limit in range(1, 40):
            ledger = PairLedger()
            for _ in range(2):  # all of them are fresh at first, then all are older
                chosen = ledger.spread(waiting, limit)
                assert len(set(chosen.tolist())) == len(chosen) == min(waiting, limit)
                assert chosen.min() >= 0 and chosen.max() < waiting
