"""The benchmark of training: the same model on both sides, told as a ratio."""

import math

import pytest

from minitf.analysis import bench
from minitf.analysis.train_bench.job import bench_train
from minitf.analysis.train_bench.program import model_of
from minitf.analysis.train_bench.sizes import GPU_SIZES, Size
from minitf.declaration import count

SMALL = Size("small", 1, 8, 2, 16, 4, 2, 3, seeds=2)
PUBLISHED = Size("published", 1, 8, 2, 16, 4, 2, 3, precision="bfloat16", published=True, products=16)


def test_training_is_measured_beside_pytorch_where_that_is_installed():
    said = []
    rows = list(
        bench_train(
            rounds=1,
            say=said.append,
            sizes=(SMALL,),
            compiled=False,
            allocators={"as usual": {}},
            device=bench.Device("cpu", "a core"),
        )
    )
    names = [row.name for row in rows]
    assert names[0] == "training, small" and names[-1] == "training, small: recording the walk"
    assert rows[-1].ours > 0 and rows[-1].unit == "% of 100 steps"
    assert math.isfinite(rows[0].ours)
    assert rows[0].ours > 0
    if bench.installed("torch"):
        assert rows[0].peer == "PyTorch, eager"
        assert rows[0].ratio == pytest.approx(rows[0].ours / rows[0].theirs)
        assert said[0] == "training, small: compiling, ours"
        assert names[1] == "training, small: first turn" and rows[1].ours > 0 and rows[1].theirs > 0
    else:
        assert "not installed" in rows[0].note


def test_on_a_card_it_is_timed_by_the_clock_beside_gpt2_itself_and_its_products():
    # What a card has for its own is not seen here: all else is.
    rows = list(bench_train(rounds=1, sizes=(PUBLISHED,), compiled=False, device=bench.Device("gpu", "a card")))
    by_name = {row.name: row for row in rows}
    training = by_name["training, published"]
    assert "a card, bfloat16, by the clock" in by_name["training, published: recording the walk"].note
    if bench.installed("transformers"):
        assert training.peer == "transformers, eager" and training.ratio > 0
    share = by_name["training, published: model FLOPs"]
    assert share.ours > 0 and "TFLOP/s" in share.note


def test_the_model_flops_of_gpt2_are_those_that_are_published():
    # https://github.com/karpathy/nanoGPT and llm.c: 124 million weights and attention at 1024 tokens, .855 GFLOP.
    assert GPU_SIZES[0].flops == pytest.approx(0.855e9, rel=0.005)


@pytest.mark.parametrize("size", [SMALL, PUBLISHED], ids=lambda size: size.name)
def test_both_sides_train_the_same_model(size):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from minitf.analysis.train_bench.peer import make_model

    theirs = make_model(size)
    assert sum(weight.numel() for weight in theirs.parameters()) == count(model_of(size))
