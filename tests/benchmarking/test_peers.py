"""Other libraries, where they are installed, minimise what our formulas say; without them nothing here is tested."""

from __future__ import annotations

import pytest

from hfdistill.benchmarking.candidates import Setting, candidates_of
from hfdistill.benchmarking.measuring import SAME_GRADIENT, SAME_LOSS, measure_times
from hfdistill.benchmarking.peers import OTHERS, peer_versions
from hfdistill.benchmarking.workloads import build_workload


@pytest.fixture(scope="module")
def absent():
    return peer_versions()[1]


@pytest.mark.parametrize(("workload", "name"), [(one, name) for name, other in OTHERS.items() for one in other.workloads])
def test_peers_minimise_the_same(workload, name, absent, tmp_path):
    if OTHERS[name].peer in absent:
        pytest.skip(absent[OTHERS[name].peer])
    measured = measure_times(build_workload(workload, "tiny"), candidates_of(workload, [name], OTHERS), Setting(folder=tmp_path), rounds=1)
    assert measured["failed"] == {}
    check = measured["checks"][name]
    assert check["gradient_difference"] <= SAME_GRADIENT
    same = check["loss_difference"] <= SAME_LOSS
    assert same != ("another value" in OTHERS[name].note and workload == "W1"), "the note says where its value is another one"
