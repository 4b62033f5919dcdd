import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from minitf.analysis import bench
from minitf.analysis.bench import Row
from minitf.analysis.scan_snap import bench as scan_snap_bench
from minitf.analysis.scan_snap import synthetic, torch_peer
from minitf.analysis.scan_snap.bench import bench_scan_snap
from minitf.config import token_tables
from minitf.declaration import initialize
from minitf.train.optimizers import Rates
from minitf.train.sequence_classes import SequenceClasses, sample_counts, sample_tokens

KEYS = ["name", "peer", "ratio", "ours", "theirs", "unit", "rounds", "note"]


def test_a_row_has_exactly_the_published_keys_in_json():
    rows = [bench.throughput_row("a", "b", [6.0], [2.0], "runs/s"), bench.missing_row("c", "torch", [], "s")]
    parsed = json.loads(bench.as_json(rows))
    assert [list(row) for row in parsed] == [KEYS, KEYS]
    assert parsed[0]["ratio"] == 3.0 and parsed[1]["ratio"] is None


def test_a_ratio_above_one_means_that_we_are_better():
    assert bench.throughput_row("runs per second", "peer", [20.0], [10.0], "runs/s").ratio == 2.0
    assert bench.cost_row("seconds", "peer", [1.0], [2.0], "s").ratio == 2.0


def test_ratios_are_taken_per_round_so_that_a_busy_round_is_busy_for_both():
    row = bench.throughput_row("a", "b", [10.0, 1.0, 12.0], [1.0, 0.1, 2.0], "runs/s")
    assert row.ratio == 10.0 and row.rounds == 3
    assert (row.ours, row.theirs) == (10.0, 1.0)


def test_a_peer_that_is_not_installed_is_told_and_has_no_ratio():
    row = bench.missing_row("a", "eager PyTorch", [4.0, 2.0, 3.0], "runs/s")
    assert row.ratio is None and row.theirs is None and row.ours == 3.0
    assert "eager PyTorch is not installed" in row.note


def test_sides_take_turns_and_every_other_round_runs_backwards():
    seen = []
    sides = {name: (lambda name=name: float(len(seen.append(name) or seen))) for name in "abc"}
    measured = bench.interleaved(sides, 3, lambda sentence: None)
    assert "".join(seen) == "abccbaabc"
    assert measured == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds is 0; it must be at least 1"):
        bench.interleaved({}, 0, lambda sentence: None)


def test_a_name_that_is_no_benchmark_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no benchmark 'scansnap'; there are scan-snap"):
        bench.run_benchmarks(["scansnap"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "told"),
    [(["train"], "pythons are for the benchmark walk"), (["walk"], "there is no program 'no/python'")],
)
def test_an_interpreter_that_nothing_can_use_is_refused_before_anything_runs(tmp_path, names, told):
    with pytest.raises(ValueError, match=told):
        bench.run_benchmarks(names, tmp_path, pythons=["no/python"])
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_before_it_was_stopped_is_kept_and_shown(tmp_path, monkeypatch, capsys):
    def stopped(**settings):
        settings["say"]("the first [of two]")
        yield bench.value_row("memory", [1234.5], "MiB")
        raise KeyboardInterrupt

    monkeypatch.setattr("minitf.analysis.train_bench.job.bench_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run_benchmarks(["train"], tmp_path)
    assert [row["ours"] for row in json.loads((tmp_path / "bench.json").read_text())] == [1234.5]
    told = capsys.readouterr()
    assert "1,234" in told.out and "the first [of two]" in told.err


def test_the_table_shows_every_row_for_people():
    rows = [
        Row("grid", "PyTorch", 23.456, 120.0, 5.0, "runs/s", 5, "compiled"),
        bench.value_row("m", [1234.5], "MiB"),
    ]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(bench.as_table(rows))
    text = console.export_text()
    for part in ("grid", "PyTorch", "23.5", "120", "runs/s", "compiled", "1,234"):
        assert part in text


def test_a_process_that_fails_is_told_with_its_error():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        bench.measured_alone("1 / 0")
    assert bench.measured_alone("print('noise'); print('{\"a\": 1}')") == {"a": 1}


@pytest.fixture(scope="module")
def rows():
    """The whole benchmark at the smallest sizes."""
    said = []
    return list(bench_scan_snap(rounds=1, panels=[1], seeds=2, steps=5, peer_runs=1, say=said.append)), said


def test_the_benchmark_measures_grid_recording_compile_time_and_memory(rows):
    measured, said = rows
    names = " | ".join(row.name for row in measured)
    for part in ("Fig. 6 grid, 32 runs x 5", "compile time", "walk every 2", "peak memory", "temporary memory"):
        assert part in names
    assert said
    for row in measured:
        assert row.ours is None or row.ours > 0
    assert next(row for row in measured if row.name.startswith("peak")).ours > 50  # MiB; jax alone has more


def test_both_peers_are_measured_where_torch_is_installed(rows):
    pytest.importorskip("torch")
    grid = [row for row in rows[0] if "32 runs" in row.name]
    assert [row.peer for row in grid] == list(scan_snap_bench.PEERS)
    for row in grid:
        assert row.ratio > 0 and row.theirs > 0 and "scaled to 32" in row.note


def test_without_torch_the_grid_says_so(monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda module: False)
    measured = scan_snap_bench._grid_rows(0, 1, [1], 1, 2, 1, lambda sentence: None)
    assert [row.ratio for row in measured] == [None] * 4
    assert "not installed" in measured[0].note and "not installed" in measured[1].note


def torch_model(parameters):
    torch = pytest.importorskip("torch")
    model = torch_peer.tables(parameters.unembedding.shape[0])
    with torch.no_grad():
        model["decoder"].weight.copy_(torch.from_numpy(np.array(parameters.unembedding.T)))
        model["attention"].weight.copy_(torch.from_numpy(np.array(parameters.layers.attention.table[0, 0])))
    return model


@pytest.mark.parametrize("form", ["positions", "counts"])
def test_the_peer_takes_the_same_steps_as_we_do(form):
    torch = pytest.importorskip("torch")
    data = SequenceClasses(queries=2, next_per_query=2, common=3, distinct=4, length=17)
    job = torch_peer.Job(2, 2, 3.0, 0.5, steps=2, form=form, length=17)
    ours = initialize(token_tables(data.vocabulary, "fan_in"), jax.random.key(0))
    model = torch_model(ours)
    optimizer = torch_peer.sgd(model, job)
    task = synthetic.task(data, "fan_in", "sgd")
    rule = task.optimizer(Rates(decoder=jnp.array(3.0), attention=jnp.array(0.5)))
    state = rule.init(ours)
    for seed in range(3):  # the third step has momentum from two
        key = jax.random.key(seed)
        tokens, labels = (torch.from_numpy(np.array(x)).long() for x in sample_tokens(data, key, 20))
        batch = sample_counts(data, key, 20)
        loss, gradient = jax.value_and_grad(synthetic.loss)(ours, batch)
        update, state = rule.update(gradient, state, ours)
        ours = jax.tree.map(jnp.add, ours, update)
        if form == "positions":
            logits = torch_peer.logits_of_positions(model, tokens)
        else:
            logits = torch_peer.logits_of_counts(model, tokens[:, -1], torch.from_numpy(np.array(batch.counts)))
        theirs = torch_peer.step(model, optimizer, logits, labels)
        assert theirs.item() == pytest.approx(float(loss), abs=1e-5)
        decoder, table = model["decoder"].weight.detach().numpy().T, model["attention"].weight.detach().numpy()
        np.testing.assert_allclose(decoder, ours.unembedding, atol=1e-5)
        np.testing.assert_allclose(table, ours.layers.attention.table[0, 0], atol=1e-5)


def test_the_peer_learns_and_ends_like_our_runs():
    pytest.importorskip("torch")
    losses = [
        torch_peer.train(torch_peer.Job(1, 2, 1.0, 1.0, 60, form))["loss"] for form in ("positions", "counts")
    ]
    _, history = synthetic.run_medium(1, 2, steps=60)
    ours = history.loss[:, 4, -1]  # eta_Z = 1 and ratio 1
    # The loss falls by orders of magnitude; seeds differ by less than a factor of two around it.
    for loss in losses:
        assert 0.3 * ours.min() < loss < 3 * ours.max()
