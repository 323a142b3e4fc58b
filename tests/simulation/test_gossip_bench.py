"""A hundred peers in one process end in one state, and the bytes are those that travelled."""

from __future__ import annotations

import pytest

from meadow.simulation.gossip_bench import convergence


@pytest.mark.long
def test_a_hundred_peers_end_with_equal_hashes() -> None:
    done = convergence(peers=100, records=60, fanout=3, seed=1)
    assert len(done.state_ids) == 100 and len(set(done.state_ids)) == 1
    assert done.payload_bytes == 60 * 377
    assert 0 < done.rounds < 10
    # every peer received all records, and sent or received no more than a few copies of each
    assert done.payload_bytes * 0.98 <= done.mean_bytes <= done.most_bytes
    assert done.mean_bytes < 12 * done.payload_bytes


def test_anti_entropy_alone_converges_and_the_seed_decides() -> None:
    one, again = (convergence(peers=6, records=9, fanout=0, seed=2) for _ in range(2))
    assert one == again and len(set(one.state_ids)) == 1
    assert convergence(peers=6, records=9, fanout=0, seed=3).state_ids != one.state_ids


def test_nothing_to_say_takes_no_round() -> None:
    done = convergence(peers=3, records=0, fanout=2, seed=0)
    assert (done.rounds, done.calls, done.mean_bytes) == (0, 0, 0)
