import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import types

import numpy as np
import pytest

from minitf.analysis.claims import claim
from minitf.analysis.run_folder import Diverged
from minitf.analysis.scan_snap.results import SmallRun
from minitf.analysis.stages import Stages, noticing_interrupts
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
        largest_row_sum=np.zeros(1),
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
    return Stages(folder / "arrays", Progress(True), interrupted, seed)


def never(*arguments):
    raise AssertionError("the stage ran again")


def run_stage(folder, make, names=("a",), interrupted=lambda: False, seed=0, rates=(("rate 1",),)):
    return stages(folder, interrupted, seed).runs(dict.fromkeys(names, SmallRun), "the stage", make, rates=rates)


def make_one(report):
    return [small_run()], [history()]


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
    talking = Stages(tmp_path / "arrays", Progress(False), lambda: False, 0)
    talking.runs({"a": SmallRun}, "the stage", make_one)
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
    with noticing_interrupts() as interrupted:
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
        with noticing_interrupts():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def in_thread():
        with noticing_interrupts() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [False]


def test_ctrl_c_that_python_drops_in_a_callback_is_noticed_and_not_printed(usual_interrupts, capsys):
    pressed = lambda phase, info: signal.raise_signal(signal.SIGINT)
    with noticing_interrupts() as interrupted:
        gc.callbacks.append(pressed)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(pressed)
        assert interrupted()
    assert capsys.readouterr().err == ""


def test_other_exceptions_that_python_drops_are_told_as_ever(usual_interrupts):
    told, before = [], sys.unraisablehook
    sys.unraisablehook = told.append
    try:
        with noticing_interrupts():
            sys.unraisablehook(types.SimpleNamespace(exc_type=ValueError))
            sys.unraisablehook(types.SimpleNamespace(exc_type=KeyboardInterrupt))
        assert sys.unraisablehook == told.append
    finally:
        sys.unraisablehook = before
    assert [x.exc_type for x in told] == [ValueError]
