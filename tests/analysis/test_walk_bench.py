"""The walk's benchmark compares sides that found the same, or none."""

import importlib.util

import pytest

from minitf.analysis import bench
from minitf.analysis.walk_bench import job
from minitf.analysis.walk_bench.sizes import Size

SMALL = Size(layers=2, width=8, heads=2, vocabulary=16, batch=2, length=4)
needs_peers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs the peers extra",
)


@needs_peers
def test_every_question_gets_its_row_from_real_processes(monkeypatch):
    monkeypatch.setattr(job, "NEW_TOKENS", 3)
    said = []
    rows = list(
        job.bench_walk(
            rounds=1,
            read=(SMALL,),
            write=(Size(1, 8, 2, 16, 1, 4),),
            say=said.append,
            device=bench.Device("cpu", "a core"),
        )
    )
    by_name = {(row.name, row.peer.split(" ")[0]): row for row in rows}
    for name in ("forward, 2/8", "generate, 1/8"):
        row = by_name[name, "transformers"]
        assert row.ours > 0 and row.theirs > 0 and row.ratio > 0
    for name in ("the whole walk kept", "sweep over 4 heads", "one gradient for every leaf"):
        assert by_name[f"{name}, 2/8", ""].ours > 0
    arrays = by_name["the whole walk's arrays, 2/8", ""].ours
    # Outputs begin on boundaries of the allocator, and a program has some bytes of its own.
    assert by_name["memory beyond those, 2/8", ""].ours < arrays
    assert any("round 1 of 1" in sentence for sentence in said)


def test_sides_that_differ_are_not_compared():
    job._check({"sweep": [1.0, 2.0], "sweep peer 1": [1.0, 2.00001]}, SMALL)
    with pytest.raises(RuntimeError, match="^2/8: the sweep of peer 1 differs from ours by"):
        job._check({"sweep": [1.0, 2.0], "sweep peer 1": [1.0, 2.1]}, SMALL)
    with pytest.raises(RuntimeError, match="^2/8: the sweep of peer 1 differs from ours by nan"):
        job._check({"sweep": [1.0, 2.0], "sweep peer 1": [1.0, float("nan")]}, SMALL)
    with pytest.raises(RuntimeError, match="^2/8: peer 1 writes other tokens than we do$"):
        job._check({"generate": [[1]], "generate peer 1": [[2]]}, SMALL)
