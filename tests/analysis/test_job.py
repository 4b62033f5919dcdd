import dataclasses
import json
import os
import random
import signal
import threading

import numpy as np
import pytest

from minitf.analysis.claims import claim
from minitf.analysis.run_folder import Diverged, Problem
from minitf.analysis.scan_snap import job
from minitf.analysis.scan_snap.job import ScanSnapConfig
from minitf.analysis.scan_snap.results import SmallRun
from minitf.train.loop import History
from minitf.train.progress import Progress


def small_run(name="a", value=1.5):
    return SmallRun(
        name=name,
        optimizer="sgd",
        decoder_rate=1.0,
        attention_rate=1.0,
        record_steps=np.array([0, 2]),
        loss=np.full((1, 2), value, np.float32),
        association=np.zeros((1, 2, 2, 4)),
        attention_logits=np.zeros((1, 2, 2, 4)),
        probability=np.ones((2, 4)),
        distinct=np.ones((2, 4), bool),
        common=np.zeros(4, bool),
    )


def history(diverged=((-1,),), finished=True):
    return History(
        loss=np.zeros((len(diverged), len(diverged[0]), 2)),
        records=(),
        record_steps=np.array([0, 2]),
        parameters=(),
        diverged=np.array(diverged),
        finished=finished,
    )


def some_claim(id="scan_snap.T1", value=0.5):
    return claim(id, "s", source="s", statistic="s", value=value, direction="<", threshold=1.0)


def stages(folder, interrupted=lambda: False, seed=0):
    return job._Job(ScanSnapConfig(seed=seed), folder, Progress(True), interrupted)


def never(*arguments):
    raise AssertionError("the stage ran again")


def run_stage(folder, make, names=("a",), interrupted=lambda: False, seed=0, rates=(("rate 1",),)):
    return stages(folder, interrupted, seed).runs(list(names), SmallRun, "the stage", make, rates=rates)


def make_one(report):
    return [small_run()], [history()]


@pytest.fixture
def words(tmp_path):
    """A file with enough text for every window."""
    chosen = random.Random(0)
    file = tmp_path / "words.txt"
    vocabulary = ["the", "cat", "sees", "a", "dog", "house", "and", "never", "finds", "it"]
    file.write_text("\n\n".join(" ".join(chosen.choices(vocabulary, k=40)) + "." for _ in range(200)))
    return file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length is 1; it must be at least 2"),
        ({"length": -5}, "length is -5; it must be at least 2"),
        ({"vocabulary": 0}, "vocabulary is 0; .* at least the 256 bytes"),
        ({"vocabulary": 255}, "vocabulary is 255; .* at least the 256 bytes"),
        ({"text_rate": -1.0}, "text_rate is -1.0; .* finite number of at least 0"),
        ({"text_rate": float("nan")}, "text_rate is nan; .* finite number of at least 0"),
        ({"text_rate": float("inf")}, "text_rate is inf; .* finite number of at least 0"),
        ({"decoder_rate": -0.5, "attention_rate": 1.0}, "decoder_rate is -0.5"),
        ({"decoder_rate": 1.0, "attention_rate": float("nan")}, "attention_rate is nan"),
        ({"decoder_rate": 1.0}, "both --decoder-rate and --attention-rate"),
        ({"attention_rate": 1.0}, "both --decoder-rate and --attention-rate"),
        ({"quick": True, "full": True}, "--quick and --full exclude each other"),
        ({"text_steps": 0}, "text_steps is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must lie between 0 and"),
        ({"seed": 2**31 - 1}, "seed is 2147483647; it must lie between 0 and"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_value(settings, message):
    with pytest.raises(ValueError, match=message):
        ScanSnapConfig(**settings)


def test_the_largest_seed_still_has_seeds_after_it():
    config = ScanSnapConfig(seed=job.LARGEST_SEED)
    assert job.synthetic.seed_keys(config.seed, max(job.SMALL_SEEDS, job.MEDIUM_SEEDS)).shape == (16,)


def test_a_pair_of_rates_joins_those_of_the_paper():
    own = ScanSnapConfig(decoder_rate=2.0, attention_rate=0.5).settings
    assert own[:-1] == ScanSnapConfig().settings
    assert (own[-1].optimizer, own[-1].decoder_rate, own[-1].attention_rate) == ("sgd", 2.0, 0.5)


def test_training_on_text_is_shorter_when_quick_and_as_long_as_asked():
    assert ScanSnapConfig().text_lengths == {"sgd": 1500, "adam": 1000}
    assert ScanSnapConfig(quick=True).text_lengths == {"sgd": 400, "adam": 400}
    assert ScanSnapConfig(quick=True, text_steps=7).text_lengths == {"sgd": 7, "adam": 7}


def test_claims_come_in_the_order_of_the_papers():
    ordered = ["scan_snap.T1", "scan_snap.T2", "scan_snap.T2_adam", "scan_snap.T10", "scan_snap.T10b"]
    ordered += ["scan_snap.T22", "scan_snap.fig3_order", "scan_snap.text_sparse", "joma.fig2", "joma.theorem2"]
    mixed = [some_claim(id) for id in random.Random(0).sample(ordered, len(ordered))]
    assert [c.id for c in sorted(mixed, key=job._claim_order)] == ordered


def test_a_finished_stage_is_read_and_not_run_again(tmp_path):
    (first,) = run_stage(tmp_path, make_one)
    (again,) = run_stage(tmp_path, never)
    for field in dataclasses.fields(SmallRun):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(small_run(), field.name))
        np.testing.assert_array_equal(getattr(again, field.name), getattr(first, field.name))


def test_finished_claims_are_read_and_not_made_again(tmp_path):
    made = [some_claim(), some_claim("scan_snap.T2", float("nan"))]
    first = stages(tmp_path).claims("theory", "theory", lambda: made)
    again = stages(tmp_path).claims("theory", "theory", never)
    assert [(c.id, c.holds) for c in again] == [("scan_snap.T1", True), ("scan_snap.T2", False)]
    assert str(first) == str(again)


@pytest.mark.parametrize("ending", ["json", "safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 40]
)
def test_a_damaged_stage_is_made_again(tmp_path, ending, damage):
    run_stage(tmp_path, make_one)
    file = tmp_path / "arrays" / f"a.{ending}"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    run_stage(tmp_path, make_one)
    assert file.read_bytes() == whole


def test_a_stage_that_lacks_a_file_or_an_array_is_made_again(tmp_path):
    run_stage(tmp_path, make_one)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "arrays").iterdir()}
    (tmp_path / "arrays" / "a.safetensors").unlink()
    run_stage(tmp_path, make_one)
    rest = json.loads(whole["a.json"])
    del rest["name"]
    (tmp_path / "arrays" / "a.json").write_text(json.dumps(rest))
    run_stage(tmp_path, make_one)
    assert {p.name: p.read_bytes() for p in (tmp_path / "arrays").iterdir()} == whole


@pytest.mark.parametrize("damaged", ["", "[", "[{}]", "[1]", "{}", '{"id": 1}'])
def test_damaged_claims_are_made_again(tmp_path, damaged):
    file = tmp_path / "arrays" / "theory.claims.json"
    file.parent.mkdir()
    file.write_text(damaged)
    (made,) = stages(tmp_path).claims("theory", "theory", lambda: [some_claim()])
    assert made.id == "scan_snap.T1"
    assert json.loads(file.read_text())[0]["id"] == "scan_snap.T1"


def test_a_damaged_file_is_told_by_name(tmp_path, capsys):
    run_stage(tmp_path, make_one)
    (tmp_path / "arrays" / "a.safetensors").write_bytes(b"")
    talking = job._Job(ScanSnapConfig(), tmp_path, Progress(False), lambda: False)
    talking.runs(["a"], SmallRun, "the stage", make_one)
    assert "a.safetensors" in capsys.readouterr().err.split("is damaged")[1]


def test_a_stage_of_several_runs_is_finished_with_the_last(tmp_path):
    def make(report):
        return [small_run("a"), small_run("b")], [history()]

    run_stage(tmp_path, make, names=("a", "b"))
    (tmp_path / "arrays" / "b.json").unlink()
    again = run_stage(tmp_path, make, names=("a", "b"))
    assert [run.name for run in again] == ["a", "b"]


def test_divergence_says_step_rate_and_seed_and_keeps_what_there_was(tmp_path):
    def make(report):
        return [small_run("a"), small_run("b")], [history(), history([[-1, 9], [-1, 5]])]

    rates = (("rate 1",), ("rate 2", "rate 1e+30"))
    with pytest.raises(Diverged, match=r"the stage: .* at step 5 \(rate 1e\+30, seed 8\).*smaller.*arrays"):
        run_stage(tmp_path, make, names=("a", "b"), seed=7, rates=rates)
    assert sorted(p.name for p in (tmp_path / "arrays").iterdir()) == [
        "a.partial.json",
        "a.partial.safetensors",
        "b.partial.json",
        "b.partial.safetensors",
    ]


def test_an_unfinished_stage_is_kept_apart_and_gone_when_it_is_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, lambda report: ([small_run(value=0.1)], [history(finished=False)]))
    assert sorted(p.name for p in (tmp_path / "arrays").iterdir()) == ["a.partial.json", "a.partial.safetensors"]
    (run,) = run_stage(tmp_path, make_one)
    assert run.loss[0, 0] == np.float32(1.5)
    assert sorted(p.name for p in (tmp_path / "arrays").iterdir()) == ["a.json", "a.safetensors"]


def test_a_bug_in_a_stage_shows(tmp_path):
    for error in (ValueError("bug"), KeyError(100)):

        def make(*arguments, error=error):
            raise error

        with pytest.raises(type(error)):
            run_stage(tmp_path, make)
        with pytest.raises(type(error)):
            stages(tmp_path).claims("theory", "theory", make)


@pytest.mark.parametrize("fails", [True, False])
def test_claims_made_during_an_interrupt_are_not_kept(tmp_path, fails):
    """The loop ends early on Ctrl-C, so what is claimed of it lacks numbers or is of too short a run."""

    def make():
        if fails:
            raise KeyError(1000)
        return [some_claim()]

    with pytest.raises(KeyboardInterrupt):
        stages(tmp_path, lambda: True).claims("theory", "theory", make)
    assert not (tmp_path / "arrays").exists()


def test_an_interrupt_stops_every_later_program_of_a_stage(tmp_path):
    def make(report):
        with pytest.raises(KeyboardInterrupt):
            report(10, 1.0)
        return [small_run()], [history()]

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, make, interrupted=lambda: True)


@pytest.fixture
def usual_interrupts():
    """Python's own handler of Ctrl-C, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_noticed_even_where_it_is_dropped(usual_interrupts):
    before = signal.getsignal(signal.SIGINT)
    with job._noticing_interrupts() as interrupted:
        assert not interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_another_handler_and_other_threads_are_left_alone():
    def handler(number, frame):
        pass

    before = signal.signal(signal.SIGINT, handler)
    try:
        with job._noticing_interrupts():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def in_thread():
        with job._noticing_interrupts() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [False]


def test_too_little_text_is_told_before_anything_is_trained_or_made(tmp_path):
    (tmp_path / "short.txt").write_text("Just a few words.\n\nAnd a few more of them.\n")
    with pytest.raises(Problem, match="too short: it has .* tokens"):
        job.run(ScanSnapConfig(text=(str(tmp_path / "short.txt"),), vocabulary=260), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_refused_folder_is_told_before_the_text_is_prepared(tmp_path, words, monkeypatch):
    monkeypatch.setattr(job.text_runs, "prepare", never)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(Problem, match="holds no run"):
        job.run(ScanSnapConfig(text=(str(words),)), tmp_path / "out", quiet=True)


def test_a_run_does_not_go_on_with_a_text_that_changed(tmp_path, words, monkeypatch):
    monkeypatch.setattr(job, "_stages", lambda *arguments: [])
    config = ScanSnapConfig(text=(str(words),), vocabulary=300)
    job.run(config, tmp_path / "out", quiet=True)
    job.run(config, tmp_path / "out", resume=True, quiet=True)
    words.write_text(words.read_text().replace("cat", "cow"))
    with pytest.raises(Problem, match=r"other settings \(text_sha256 was"):
        job.run(config, tmp_path / "out", resume=True, quiet=True)


def test_a_full_disk_is_told_and_how_to_go_on(tmp_path, words, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "claims.json")

    monkeypatch.setattr(job, "_stages", full)
    config = ScanSnapConfig(text=(str(words),), vocabulary=300)
    with pytest.raises(Problem, match=r"could not be written to .*No space left on device.*--resume"):
        job.run(config, tmp_path / "out", quiet=True)
