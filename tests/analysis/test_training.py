"""What a training run writes down, shows and refuses."""

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import types
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import no_file_larger_than
from properties.models import random_parameters

from minitf import ModelConfig, initialize, mixers, walk
from minitf.analysis.run_folder import Diverged, Problem, hold
from minitf.analysis.training import job, under_way
from minitf.analysis.training import statistics as training_statistics
from minitf.analysis.training.boards import boards, show
from minitf.analysis.training.devices import peak
from minitf.analysis.training.log import Log, Looks, lines_of, read
from minitf.analysis.training.prepared import model_of
from minitf.analysis.training.statistics import LABELS, looker, participation, statistics, weight_ranks
from minitf.analysis.walk_report import job as walk_job
from minitf.analysis.walk_report.job import WalkConfig
from minitf.pretrained import load
from minitf.train.batch import Batch, next_token
from minitf.train.config import KeepSettings
from minitf.train.settings import as_config, laid_over

TINY = {
    "task": {"name": "copy", "symbols": 4, "span": 3},
    "model": {"layers": 1, "width": 8, "heads": 2},
    "training": {"steps": 6, "batch": 4, "steps_per_call": 2},
    "keep": {"checkpoint_every": 2, "evaluate_every": 3},
}


def run(out, **groups):
    return job.run(as_config(laid_over(TINY, groups)), out, quiet=True)


def raises(error):
    raise error


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    out = tmp_path_factory.mktemp("several") / "run"
    run(out, training={"seeds": 2}, sweep={"optimizer.rate": [1e-3, 1e-2]})
    return out


def test_many_models_leave_many_models_and_their_curves(several):
    found = read(several / "metrics.jsonl")
    assert all(len(line["loss"]) == 4 for line in found if "loss" in line)
    assert [line["step"] for line in found if "validation_loss" in line] == [0, 3, 6]
    models = [load(several / "models" / str(number)) for number in range(4)]
    assert all(model.config.layers == 1 for model in models)
    # The same seed starts alike; another rate ends elsewhere.
    assert not np.array_equal(models[0].parameters.embedding, models[1].parameters.embedding)
    page = (several / "report.html").read_text()
    assert "seed 1, rate 0.01" in page
    assert "between" in page


def test_a_report_that_has_no_room_is_told_and_the_one_before_stays(several):
    before = (several / "report.html").read_bytes()
    found = r"could not be written to .*File too large.*the same command goes on"
    with no_file_larger_than(100_000), pytest.raises(Problem, match=found):
        run(several, training={"seeds": 2}, sweep={"optimizer.rate": [1e-3, 1e-2]})
    assert (several / "report.html").read_bytes() == before
    assert not list(several.glob(".*"))


def test_a_signal_while_the_last_is_written_ends_when_it_is(tmp_path, monkeypatch):
    asked, finish = [], under_way.Training.finish

    def finished(training, state):
        asked.append(signal.SIGTERM)
        finish(training, state)

    @contextlib.contextmanager
    def noticing():
        yield lambda: asked[0] if asked else None
        asked.clear()

    monkeypatch.setattr(under_way.Training, "finish", finished)
    monkeypatch.setattr(under_way, "noticing_signals", noticing)
    with pytest.raises(Problem, match="terminated after step 6; everything is kept") as told:
        run(tmp_path / "run")
    assert told.value.exit_code == 143
    assert (tmp_path / "run" / "checkpoints" / "6").is_dir() and not (tmp_path / "run" / "report.html").exists()
    run(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()


def test_a_finished_run_may_be_made_longer_where_its_rate_is_constant(tmp_path):
    out, straight = tmp_path / "run", tmp_path / "straight"
    constant = {"schedule": "constant"}
    run(out, optimizer=constant)
    short = load(out / "model").parameters
    run(out, optimizer=constant, training={"steps": 9})
    run(straight, optimizer=constant, training={"steps": 9})
    longer, whole = (load(folder / "model").parameters for folder in (out, straight))
    jax.tree.map(np.testing.assert_array_equal, longer, whole)
    assert not np.array_equal(longer.embedding, short.embedding)
    assert [line["step"] for line in read(out / "metrics.jsonl") if "validation_loss" in line] == [0, 3, 6, 9]
    # Then shorter it may not be, and with another rate neither longer.
    for changed in ({"training": {"steps": 8}}, {"training": {"steps": 12}, "optimizer": {"rate": 0.5}}):
        with pytest.raises(Problem, match="other settings"):
            run(out, **laid_over({"optimizer": constant}, changed))
    assert (out / "model" / "config.json").exists()
    run(tmp_path / "cosine")
    with pytest.raises(Problem, match=r"training\.steps was 6 and is 9"):
        run(tmp_path / "cosine", training={"steps": 9})


def test_a_longer_run_that_cannot_be_leaves_the_finished_one_as_it_was(tmp_path, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"the {n} of {n * n}, and then\n" for n in range(400)))
    of_text = {"data": {"paths": [str(text)]}, "model": {"length": 8}, "optimizer": {"schedule": "constant"}}

    def train(steps, **groups):
        tables = laid_over(TINY, laid_over(of_text, {"training": {"steps": steps}, **groups}))
        job.run(as_config({**tables, "task": {}}), out, quiet=True)

    def kept():
        files = [file for file in out.rglob("*") if file.is_file() and "checkpoints" not in file.parts]
        return {str(file): file.read_bytes() for file in files}

    train(6)
    before = kept()
    for board in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, board, None)
    with pytest.raises(Problem, match="tensorboard"):
        train(9, keep={"tensorboard": True})
    written = text.read_text()
    text.write_text(written + "more\n")
    with pytest.raises(Problem, match="have changed since it began"):
        train(9)
    assert kept() == before
    text.write_text(written)
    (out / "checkpoints" / "6").rename(tmp_path / "elsewhere")
    with pytest.raises(Problem, match="no checkpoint of its last step, 6"):
        train(9)
    assert kept() == before
    (tmp_path / "elsewhere").rename(out / "checkpoints" / "6")
    train(9)
    assert json.loads((out / "config.json").read_text())["training.steps"] == 9


def test_training_that_lost_its_checkpoints_says_that_it_begins_anew(tmp_path, capsys):
    out = tmp_path / "run"
    run(out)
    for folder in ("checkpoints", "model"):
        shutil.rmtree(out / folder)
    job.run(as_config(TINY), out)
    assert "there is no checkpoint to go on from: training begins anew" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_prompt_that_cannot_be_is_told_before_training_goes_on(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"the {n} of {n * n}, and then\n" for n in range(400)))
    groups = {
        "data": {"paths": [str(tmp_path / "text.txt")], "encoding": "characters"},
        "model": {"length": 8},
        "keep": {"sample_every": 3, "prompt": "Z"},
    }
    with pytest.raises(Problem, match="keep.prompt is 'Z': the characters 'Z' are not in the alphabet"):
        job.run(as_config({**laid_over(TINY, groups), "task": {}}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_lost_model_among_others_does_not_stop_them(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, optimizer={"name": "sgd", "clip": 0.0, "warm_up": 0}, sweep={"optimizer.rate": [1e-3, 1e30]})
    last = [line for line in read(out / "metrics.jsonl") if "loss" in line][-1]
    assert last["loss"][0] is not None
    assert last["loss"][1] is None


def test_training_that_is_lost_stops_with_step_data_and_the_last_good_checkpoint(tmp_path):
    lost = {"name": "sgd", "clip": 0.0, "warm_up": 0, "rate": 1e30}
    with pytest.raises(
        Diverged, match=r"step \d is not a finite number \(sequences \d+ to \d+ of its data\)"
    ) as told:
        run(tmp_path / "run", optimizer=lost)
    assert told.value.exit_code == 1
    assert "--overwrite" in str(told.value)
    assert not (tmp_path / "run" / "model").exists()


def test_lost_steps_may_be_skipped(tmp_path):
    lost = {"name": "sgd", "clip": 0.0, "warm_up": 0, "rate": 1e30}
    run(tmp_path / "run", optimizer=lost, training={"when_not_finite": "skip"})
    weights = load(tmp_path / "run" / "model").parameters
    # Not only finite, but as they were before such a step.
    assert all(float(jnp.max(jnp.abs(x))) < 10 for x in jax.tree.leaves(weights))
    assert sum(line.get("skipped", 0) for line in read(tmp_path / "run" / "metrics.jsonl")) == 6
    assert "6 steps were not finite" in (tmp_path / "run" / "report.html").read_text()


def test_where_every_step_is_skipped_training_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(under_way, "MOST_SKIPPED", 3)
    lost = {"name": "sgd", "clip": 0.0, "warm_up": 0, "rate": 1e30}
    with pytest.raises(Diverged, match="the last 3 steps were not finite and changed nothing. The last good"):
        run(tmp_path / "run", optimizer=lost, training={"when_not_finite": "skip"})


def test_no_run_stops_for_damaged_statistics(tmp_path, monkeypatch, capsys):
    out, keep = tmp_path / "run", {"statistics_every": 2, "sample_every": 2}

    def at_four(self, lines):
        if any(line["step"] > 4 for line in lines):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as stopped:
        stopped.setattr(Log, "add", at_four)
        with pytest.raises(Problem, match="No space left"):
            run(out, keep=keep)
    file = out / "statistics.safetensors"
    for size in (100, 0):
        file.write_bytes(file.read_bytes()[:size])
        job.run(as_config(laid_over(TINY, {"keep": keep})), out)
    told = capsys.readouterr()
    assert "statistics.safetensors is damaged; statistics begin anew" in told.out + told.err
    assert "there are no samples of what predicts no next tokens" in told.out + told.err
    assert "report.html" in {one.name for one in out.iterdir()}


def test_rates_are_of_training_alone(tmp_path, monkeypatch):
    clock, due = [0.0], under_way.Training.due

    def slow(self, *arguments, **options):
        due(self, *arguments, **options)
        clock[0] += 1000

    def call(*arguments, **options):
        for taken in run_of(*arguments, **options):
            clock[0] += 1
            yield taken

    run_of = under_way.trainer.run
    monkeypatch.setattr(under_way.trainer, "run", call)
    monkeypatch.setattr(under_way.Training, "due", slow)
    monkeypatch.setattr(under_way, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    run(tmp_path / "run")
    found = read(tmp_path / "run" / "metrics.jsonl")
    rates = [line["tokens_per_second"] for line in found if "tokens_per_second" in line]
    length = load(tmp_path / "run" / "model").config.length
    assert rates and min(rates) >= 4 * length / 2 - 1


def test_results_that_cannot_be_written_are_a_sentence_and_what_was_kept_stays(tmp_path, monkeypatch):
    out = tmp_path / "run"
    calls = []

    def full(self, lines):
        calls.append(lines)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Log, "add", full)
    with pytest.raises(
        Problem, match=r"could not be written to .*No space left on device.*goes on from the newest"
    ):
        run(out)
    monkeypatch.undo()
    assert (out / "checkpoints" / "2").exists()
    run(out)
    assert (out / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"task": {"name": "kopy"}}, "there is no task 'kopy'"),
        ({"task": {"name": "", "span": 4}}, "task.name is missing; the tasks are modular-addition, "),
        ({"task": {"name": "copy", "spam": 3}}, "'spam'"),
        ({"model": {"width": 7}}, "2 heads do not divide a width of 7"),
        ({"model": {"depth": 7}}, "there is no model.depth"),
        ({"model": {"batch": 7}}, "did you mean training.batch"),
        ({"model": {"layer": 7}}, "did you mean layers"),
        ({"model": {"vocabulary": 2}}, "model.vocabulary is 2; the data has"),
        ({"model": {"length": 2}}, "model.length is 2; the task's sequences have"),
        ({"model": {"mixer": "Mambo"}}, "model.mixer is 'Mambo'; choose one of AttentionFree, "),
        ({"objective": {"kind": "regression"}}, "objective.kind is 'regression'"),
        ({"mesh": {"data": 64}, "training": {"batch": 64}}, "the mesh needs 64"),
        (
            {"mesh": {"data": 3}},
            r"4 sequences \(training.batch / training.accumulate\) cannot be divided among 3 x",
        ),
        (
            {"mesh": {"data": 4}, "training": {"batch": 8, "accumulate": 4}},
            r"2 sequences \(training.batch / training.accumulate\) cannot be divided among 4 x 1 devices",
        ),
        ({"keep": {"wandb": "toys"}}, "keep.wandb needs the package wandb"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is(tmp_path, groups, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Problem, match=told):
        run(tmp_path / "run", **groups)


def test_text_too_short_for_a_window_says_which_side_is(tmp_path):
    (tmp_path / "text").write_text("\n\n".join(f"{number} and so on" for number in range(40)))
    data = {"paths": [str(tmp_path / "text")], "encoding": "characters", "validation": 0.1}
    config = as_config({"data": data, "model": {"length": 200, "width": 8}})
    with pytest.raises(
        Problem, match=r"the data has \d\d tokens for validation, and one window of model.length=200"
    ):
        job.run(config, tmp_path / "run", quiet=True)


def test_what_has_no_room_is_told_before_it_begins(tmp_path, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(job, "machine_bytes", lambda: 1000)
        with pytest.raises(
            Problem, match=r"needs 0.0 GB of memory; this machine has 0.0. A smaller training.batch"
        ):
            run(tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(job.trainer, "compiled", lambda *_, **options: jnp.zeros(10**13))
        with pytest.raises(
            Problem, match=r"not enough memory on the device: .*40000000000000 bytes. A smaller train"
        ):
            run(tmp_path / "run", training={"batch": 2})


def test_the_folder_of_a_run_that_was_refused_takes_the_corrected_one(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(Problem, match="2 heads do not divide a width of 7"):
        run(out, model={"width": 7})
    # Stopped before its first step is no more than refused, also where it was measured as it began.
    with monkeypatch.context() as stopped:
        stopped.setattr(job.trainer, "run", lambda *_: raises(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(out, task={"name": "copy", "symbols": 5})
    assert [line["step"] for line in read(out / "metrics.jsonl")] == [0]
    run(out)
    assert "width = 8" in (out / "config.toml").read_text()
    assert [line["step"] for line in read(out / "metrics.jsonl") if "validation_loss" in line] == [0, 3, 6]
    with pytest.raises(Problem, match="holds a run with other settings"):
        run(out, model={"width": 16})


def test_after_a_refusal_other_files_may_be_given(tmp_path, monkeypatch):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("\n\n".join(f"{name} and what follows, {i}." for i in range(300)))

    def on(name, **model):
        of_files = {"data": {"paths": [str(tmp_path / name)]}, "model": {**TINY["model"], "length": 16, **model}}
        return as_config({**TINY, "task": {}, **of_files})

    with pytest.raises(Problem, match="2 heads do not divide a width of 9"):
        job.run(on("one.txt", width=9), tmp_path / "run", quiet=True)
    monkeypatch.setattr(job, "_train", lambda *_: raises(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job.run(on("two.txt"), tmp_path / "run", quiet=True)
    assert "two.txt" in (tmp_path / "run" / "data" / "data.json").read_text()
    assert (tmp_path / "run" / "data.json").exists()


def test_a_run_goes_on_elsewhere_without_its_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {n} of {n * n}, and then\n" for n in range(400)))
    groups = {"task": {}, "data": {"paths": [str(text)]}, "model": {"length": 8}}
    constant = {"schedule": "constant"}
    tables = lambda steps: (
        laid_over(TINY, {**groups, "training": {"steps": steps}, "optimizer": constant}) | {"task": {}}
    )
    job.run(as_config(tables(4)), tmp_path / "run", quiet=True)
    text.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    job.run(as_config(tables(6)), tmp_path / "moved", quiet=True)
    assert (tmp_path / "moved" / "model" / "config.json").exists()


def test_a_folder_in_which_another_run_is_at_work_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with ExitStack() as theirs:
        hold(tmp_path / "run", theirs)
        with pytest.raises(Problem, match="another process is at work"):
            run(tmp_path / "run")


def test_layers_may_mix_as_they_like():
    config = as_config(
        laid_over(TINY, {"model": {"layers": 2, "mixer": ["Mamba", {"kind": "Softmax", "window": 2}]}})
    )
    assert model_of(config, 9, 7).mixer == (mixers.Mamba(), mixers.Softmax(window=2))


def test_lines_are_means_over_ten_steps_and_a_rest():
    values = np.arange(2 * 13.0).reshape(2, 13)
    found = list(lines_of(7, {"loss": values}, 20, skips=False))
    assert [(line["step"], line["steps"]) for line in found] == [(17, 10), (20, 3)]
    np.testing.assert_allclose(found[1]["loss"], values[:, 10:].mean(axis=1))


def test_of_skipped_steps_there_is_a_count_and_means_are_of_the_others():
    loss, norm = np.arange(24.0).reshape(2, 12), np.ones((2, 12))
    loss[0, 3], norm[1, 10:] = np.nan, np.inf
    first, second = lines_of(0, {"loss": loss, "gradient_norm": norm}, 12, skips=True)
    assert first["skipped"].tolist() == [1, 0]
    assert second["skipped"].tolist() == [0, 2]
    assert first["loss"] == pytest.approx([42 / 9, 16.5])
    assert np.isnan(second["loss"][1])


def test_a_log_goes_on_where_its_checkpoint_was(tmp_path):
    file = tmp_path / "log.jsonl"
    Log(file, 0).add([{"step": 2, "loss": np.float32(1.5)}, {"step": 4, "loss": np.array([1.0, np.nan])}])
    with file.open("a") as opened:
        opened.write('{"step": 6, "lo')
    log = Log(file, 2)
    log.add([{"step": 3, "loss": 0.5}])
    assert read(file) == [{"step": 2, "loss": 1.5}, {"step": 3, "loss": 0.5}]
    assert json.loads('{"loss": [1.0, null]}') == {"loss": [1.0, None]}


def test_statistics_go_on_where_their_checkpoint_was(tmp_path):
    file = tmp_path / "s.safetensors"
    first = Looks(file, 0)
    for step in (0, 5, 10):
        first.add(step, {"entropy": np.full((2, 3), step, np.float32)})
    first.write()
    again = Looks(file, 5)
    again.add(7, {"entropy": np.full((2, 3), 7, np.float32)})
    again.write()
    assert Looks(file, 100).steps == [0, 5, 7]
    file.write_bytes(file.read_bytes()[:40])
    damaged = Looks(file, 100)
    assert damaged.steps == []
    damaged.add(101, {"entropy": np.zeros((2, 3), np.float32)})
    damaged.write()
    assert Looks(file, 101).steps == [101]


def test_statistics_say_what_they_are():
    config = ModelConfig(vocabulary=9, layers=2, width=8, heads=2, length=6, biases=True)
    parameters = initialize(config, jax.random.key(0))
    batch = next_token(jax.random.randint(jax.random.key(1), (3, 7), 0, 9))
    found = jax.jit(lambda p: statistics(p, batch, config))(parameters)
    assert not any(name.endswith(("bias", "gain", "offset")) for name in found)
    for name, value in found.items():
        _, axes = LABELS["rank" if name.startswith("rank_") else name]
        assert value.ndim == len(axes), name
    walked = walk(parameters, batch.tokens, config)
    ends = np.asarray(walked.end).reshape(-1, 8)
    values = np.linalg.eigvalsh(np.cov(ends.T))
    np.testing.assert_allclose(found["stream_rank"][-1], values.sum() ** 2 / (values**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(found["stream_norm"][-1], np.linalg.norm(ends, axis=1).mean(), rtol=1e-5)
    singular = np.linalg.svd(np.asarray(parameters.layers.feed_forward.into)[1], compute_uv=False) ** 2
    np.testing.assert_allclose(found["rank_into"][1], singular.sum() ** 2 / (singular**2).sum(), rtol=1e-4)
    output = np.asarray(parameters.layers.attention.output)[0].reshape(8, 8)
    singular = np.linalg.svd(output, compute_uv=False) ** 2
    np.testing.assert_allclose(found["rank_output"][0], singular.sum() ** 2 / (singular**2).sum(), rtol=1e-4)


def test_the_rank_of_scores_for_every_head_is_that_of_their_matrix_side_by_side():
    config = ModelConfig(vocabulary=9, layers=2, width=8, heads=2, length=6, mixer=mixers.Synthesizer("trained"))
    parameters = initialize(config, jax.random.key(0))
    scores = np.asarray(parameters.layers.attention["scores"])[1]
    singular = np.linalg.svd(np.concatenate(list(scores), axis=1), compute_uv=False) ** 2
    found = weight_ranks(parameters, config)["rank_scores"]
    np.testing.assert_allclose(found[1], singular.sum() ** 2 / (singular**2).sum(), rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_what_fills_sequences_up_is_not_looked_at(causal):
    config = ModelConfig(vocabulary=10, layers=2, width=8, heads=2, length=9, causal=causal)
    parameters = random_parameters(config)
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 9)
    whole = Batch(tokens[:, :6], tokens[:, :6])
    full = Batch(tokens.at[:, 6:].set(9), tokens)
    found = jax.jit(lambda p: statistics(p, full, config, filler=9))(parameters)
    if causal:  # what comes later changes nothing
        for name, value in jax.jit(lambda p: statistics(p, whole, config))(parameters).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, err_msg=name)
    ends = np.asarray(walk(parameters, full.tokens, config).end)[:, :6].reshape(-1, 8)
    np.testing.assert_allclose(found["stream_norm"][-1], np.linalg.norm(ends, axis=1).mean(), rtol=1e-5)
    values = np.linalg.eigvalsh(np.cov(ends.T))
    np.testing.assert_allclose(found["stream_rank"][-1], values.sum() ** 2 / (values**2).sum(), rtol=1e-4)
    assert (found["entropy"] <= 1).all()


def test_attention_is_looked_at_where_heads_have_shares_of_what_they_see():
    mixing = (mixers.Softmax(), mixers.Retention(), mixers.Proximity())
    config = ModelConfig(vocabulary=9, layers=3, width=8, heads=2, length=6, mixer=mixing)
    parameters = random_parameters(config)
    batch = next_token(jax.random.randint(jax.random.key(1), (3, 7), 0, 9))
    found = jax.jit(lambda p: statistics(p, batch, config))(parameters)
    assert np.isfinite(found["entropy"]).tolist() == [[True, True], [False, False], [True, False]]
    pattern = walk(parameters, batch.tokens, config).layers.pattern[0]
    back = np.arange(6)[:, None] - np.arange(6)
    np.testing.assert_allclose(
        found["distance"][0], np.mean(np.sum(pattern * back, axis=-1), axis=(0, 2)), rtol=1e-5
    )
    alone = dataclasses.replace(config, layers=1, mixer=mixers.Retention())
    shapes = jax.eval_shape(lambda key: initialize(alone, key), jax.random.key(0))
    assert "entropy" not in jax.eval_shape(lambda p: statistics(p, batch, alone), shapes)


def test_of_many_models_statistics_are_those_of_each_also_side_by_side(monkeypatch):
    config = ModelConfig(vocabulary=9, layers=1, width=8, heads=2, length=6)
    keys = jax.random.split(jax.random.key(0), 3)
    models = jax.vmap(lambda key: initialize(config, key))(keys)
    batch = next_token(jax.random.randint(jax.random.key(1), (3, 7), 0, 9))
    one_by_one = looker(batch, config, batched=True)(models)
    # Two at a time, and one is left over.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(training_statistics, "NUMBERS_AT_ONCE", 2 * 18 * (12 * 8 + 2 * 2 * 6))
    assert training_statistics.walks_at_once(18, config) == 2
    found = looker(batch, config, batched=True)(models)
    for name, values in found.items():
        np.testing.assert_allclose(values, one_by_one[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_dimensions_are_counted_as_the_participation_ratio():
    rows = np.random.default_rng(0).normal(size=(4000, 6)) * np.array([1, 1, 1, 0, 0, 0])
    # Three equal eigenvalues, up to the noise of 4000 samples: a relative 2 / sqrt(4000) each.
    assert float(participation(jnp.asarray(rows))) == pytest.approx(3, rel=0.03)
    assert float(participation(jnp.zeros((5, 6)))) == 0


def test_peaks_are_known_by_name_and_not_guessed():
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("TPU v5p") == 459e12
    assert peak("TPU v5 lite") == 197e12
    assert peak("cpu") is None


class Wandb(types.ModuleType):
    """A stand-in for wandb that keeps what it is told."""

    class Error(Exception):
        pass

    Settings = staticmethod(lambda **settings: settings)

    def __init__(self, told, refuses=False):
        super().__init__("wandb")
        self.told, self.refuses, self.begun = told, refuses, []

    def init(self, **settings):
        if self.refuses:
            raise self.Error("No API key.")
        self.begun.append(settings)
        return types.SimpleNamespace(
            log=lambda numbers, step: self.told.append((numbers, step)),
            finish=lambda exit_code: self.told.append(f"ended with {exit_code}"),
        )


def test_boards_get_the_same_numbers(tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append(purge_step)

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def flush(self):
            told.append("flushed")

        def close(self):
            told.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", Wandb(told))
    with boards(KeepSettings(tensorboard=True, wandb="toys"), tmp_path / "run", done=2) as found:
        # A model that is lost is none of those that the mean is of.
        show(found, [{"step": 4, "steps": 2, "loss": np.array([1.0, np.nan, 3.0])}])
    assert told == [3, ("loss", 2.0, 4), "flushed", ({"loss": 2.0}, 4), "ended with 0", "closed"]
    told.clear()
    with pytest.raises(KeyboardInterrupt), boards(KeepSettings(wandb="toys"), tmp_path / "run"):
        raise KeyboardInterrupt
    assert told == ["ended with 1"]


def test_a_run_is_one_run_of_weights_and_biases_and_another_folder_another(tmp_path, monkeypatch):
    wandb = Wandb([])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in ("a/lr=1:2", "a/lr=1:2", "b/lr=1:2"):
        with boards(KeepSettings(wandb="toys"), tmp_path / folder, settings={"optimizer.rate": 0.1}, quiet=True):
            pass
    first, again, other = wandb.begun
    assert first == again and first["id"].isalnum() and first["id"] != other["id"]
    assert first["name"] == other["name"] == "lr=1:2"
    assert first["config"] == {"optimizer.rate": 0.1} and first["settings"] == {"silent": True}


def test_a_board_that_cannot_be_used_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb([], refuses=True))
    with (
        pytest.raises(ValueError, match=r"^keep.wandb is toys, but Weights & Biases says: No API key.$"),
        boards(KeepSettings(wandb="toys"), tmp_path),
    ):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ValueError, match=r"^keep.wandb needs the package wandb: pip install wandb$"),
        boards(KeepSettings(wandb="toys"), tmp_path),
    ):
        pass


def test_a_table_with_labels_is_learned_and_told_where_a_sequence_ends(tmp_path):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ab"), size=rng.integers(1, 6))) for _ in range(400)]
    rows = "".join(f"{sequence},{'ends b' if sequence[-1] == 'b' else 'ends a'}\n" for sequence in sequences)
    (tmp_path / "table.csv").write_text("s,kind\n" + rows)
    data = {"format": "csv", "paths": [str(tmp_path / "table.csv")], "columns": ["s"], "label": "kind"}
    tables = {
        "data": data,
        "model": {"layers": 1, "width": 16, "heads": 2, "length": 8},
        "training": {"steps": 200, "batch": 16, "steps_per_call": 100},
        "optimizer": {"rate": 1e-2, "warm_up": 5},
        "keep": {"evaluate_every": 200},
    }
    job.run(as_config(tables), tmp_path / "run", quiet=True)
    assert read(tmp_path / "run" / "metrics.jsonl")[-1]["validation_accuracy"] == 1.0
    model = load(tmp_path / "run" / "model")
    said = walk(model.parameters, jnp.array([model.tokenizer.encode("aab")]), model.config).logits[0, -1]
    assert model.tokenizer.decode([int(jnp.argmax(said))]) == "[ends b]"
    assert "the labels&#39; frequencies" in (tmp_path / "run" / "report.html").read_text()
    started = {**tables, "training": {"steps": 1, "batch": 4, "start_from": str(tmp_path / "run" / "model")}}
    job.run(as_config({**started, "model": {}}), tmp_path / "again", quiet=True)
    (tmp_path / "others.csv").write_text("s,kind\n" + rows.replace("ends b", "stops"))
    others = {**started, "model": {}, "data": {**data, "paths": [str(tmp_path / "others.csv")]}}
    with pytest.raises(Problem, match="'stops' is none of the labels 'ends a', 'ends b'. A model that tells labe"):
        job.run(as_config(others), tmp_path / "others", quiet=True)
    with pytest.raises(Problem, match="or tables with a column data.label for classification, or data.target"):
        job.run(as_config({**tables, "objective": {"kind": "next_token"}}), tmp_path / "other", quiet=True)


def test_numbers_are_told_of_sequences_by_a_fresh_model_and_by_one_that_had_read_others(tmp_path):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ab"), size=rng.integers(2, 8))) for _ in range(600)]
    rows = "".join(f"{one},{100 + 10 * one.count('b') / len(one)},{one[-1] == 'b'}\n" for one in sequences)
    (tmp_path / "table.csv").write_text("s,share,last\n" + rows)
    data = {"format": "csv", "paths": [str(tmp_path / "table.csv")], "columns": ["s"]}
    tables = {
        "data": data,
        "model": {"layers": 1, "width": 16, "heads": 2, "length": 8},
        "training": {"steps": 200, "batch": 32, "steps_per_call": 100},
        "optimizer": {"rate": 1e-2, "warm_up": 5},
        "keep": {"evaluate_every": 200},
    }
    job.run(as_config({**tables, "data": {**data, "target": "share"}}), tmp_path / "fresh", quiet=True)
    last = read(tmp_path / "fresh" / "metrics.jsonl")[-1]
    assert last["validation_loss"] < 0.05 and "validation_accuracy" not in last
    model = load(tmp_path / "fresh" / "model")
    said = walk(model.parameters, jnp.array([model.tokenizer.encode("abbb")]), model.config).logits[0, -1, 0]
    assert abs(float(model.tokenizer.vocabulary.number(said)) - 107.5) < 2
    asked = WalkConfig(str(tmp_path / "fresh" / "model"), "abbb")
    walked = walk_job.run(asked, tmp_path / "walk")
    told = json.loads(walked.with_name("walk.json").read_text())["told"]
    assert told["name"] == "share" and abs(told["numbers"][0] - 107.5) < 2
    assert f"the share of this sequence is {told['numbers'][0]:.4g}. That is its first logit" in walked.read_text()
    page = (tmp_path / "fresh" / "report.html").read_text()
    assert "squared error" in page and "% right" not in page and "in deviations of" in page
    # One that sees both ways is asked as it was trained, on sequences filled up to its length.
    both_ways = {**tables, "data": {**data, "target": "share"}, "model": {**tables["model"], "causal": False}}
    job.run(as_config(both_ways), tmp_path / "both", quiet=True)
    asked = WalkConfig(str(tmp_path / "both" / "model"), "abbb", ablate=("0.1",))
    walked = walk_job.run(asked, tmp_path / "walk-both")
    told = json.loads(walked.with_name("walk.json").read_text())["told"]["numbers"]
    assert abs(told[0] - 107.5) < 2 and abs(told[1] - told[0]) > 0.01
    for name in ("label_smoothing", "z_loss"):
        with pytest.raises(Problem, match=f"objective.{name} is for tokens that are told; this run tells numbers"):
            job.run(as_config({**both_ways, "objective": {name: 0.1}}), tmp_path / "never", quiet=True)
        with pytest.raises(Problem, match=f"objective.{name} is for tokens"):
            job.run(
                as_config({**both_ways, "sweep": {f"objective.{name}": [0.0, 0.1]}}),
                tmp_path / "never",
                quiet=True,
            )
    # Pretrained on the sequences alone, whose tokens are fewer than those that a label and filling rows up need.
    short = {**tables["training"], "steps": 50}
    job.run(as_config({**tables, "training": short}), tmp_path / "read", quiet=True)
    begun = load(tmp_path / "read" / "model")
    for name, told in (("target", "share"), ("label", "last")):
        on = {**short, "steps": 1, "start_from": str(tmp_path / "read" / "model")}
        out = tmp_path / name
        job.run(as_config({**tables, "data": {**data, name: told}, "training": on, "model": {}}), out, quiet=True)
        went = load(out / "model")
        assert went.config.vocabulary == begun.config.vocabulary + (1 if name == "target" else 3)
        moved = went.parameters.embedding[: begun.config.vocabulary] - begun.parameters.embedding
        assert float(jnp.max(jnp.abs(moved))) < 0.05
