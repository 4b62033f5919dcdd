"""The benchmark of training: the same model on both sides, told as a ratio."""

import math

import pytest

from minitf.analysis import bench
from minitf.analysis.train_bench.job import bench_train
from minitf.analysis.train_bench.sizes import Size

SMALL = Size("small", 1, 8, 2, 16, 4, 2, 3, seeds=2)


def test_training_is_measured_beside_pytorch_where_that_is_installed():
    said = []
    rows = bench_train(rounds=1, say=said.append, sizes=(SMALL,), compiled=False, allocators={"as usual": {}})
    assert [row.name for row in rows] == ["training, small", "training, small: recording the walk"]
    assert rows[1].ours > 0 and rows[1].unit == "% of 100 steps"
    assert math.isfinite(rows[0].ours)
    assert rows[0].ours > 0
    if bench.installed("torch"):
        assert rows[0].peer == "PyTorch, eager"
        assert rows[0].ratio == pytest.approx(rows[0].ours / rows[0].theirs)
        assert said[0] == "training, small: compiling, ours"
    else:
        assert "not installed" in rows[0].note


def test_both_sides_train_the_same_model():
    pytest.importorskip("torch")
    from minitf import ModelConfig
    from minitf.analysis.train_bench.peer import make_model
    from minitf.parameters import count

    theirs = sum(weight.numel() for weight in make_model(SMALL).parameters())
    ours = count(ModelConfig(16, 1, 8, 2, length=4, tied=True))
    assert theirs == ours
