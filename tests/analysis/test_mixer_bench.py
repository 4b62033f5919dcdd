import math

from minitf import mixers
from minitf.analysis import mixer_bench


def test_every_mixer_has_its_rows_beside_softmax_attention():
    said = []
    rows = list(
        mixer_bench.bench_mixers(
            rounds=1,
            say=said.append,
            every={"softmax": mixers.Softmax(), "minGRU": mixers.MinimalGru(), "FNet": mixers.Fourier()},
            trained=(16,),
            growth=(8, 16, 32),
        )
    )
    names = [row.name for row in rows]
    assert names == [
        "training step, 16 tokens: minGRU",
        "training step, 16 tokens: FNet",
        "growth of a pass, 8 to 32 tokens: softmax",
        "growth of a pass, 16 to 32 tokens: softmax",
        "growth of a pass, 8 to 32 tokens: minGRU",
        "growth of a pass, 16 to 32 tokens: minGRU",
        "growth of a pass, 8 to 32 tokens: FNet",
        "growth of a pass, 16 to 32 tokens: FNet",
    ]
    assert all(math.isfinite(row.ours) for row in rows)
    assert [row.ratio is None for row in rows] == 2 * [False] + 6 * [True]
    assert rows[0].peer == "softmax attention" and rows[2].unit == "exponent; stated 2"
    assert rows[4].unit == "exponent; stated 1"
    assert said[0] == "training at 16 tokens: minGRU"
