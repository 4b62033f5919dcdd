"""``minitf train`` as users run it: killed at any moment it loses nothing, and what it made can be walked."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from browsing import Opened
from compiled_once import INTERRUPTIBLE, lightly

from minitf.analysis.training.statistics import LABELS

SMALL = [
    *("model.layers=1", "model.width=16", "model.heads=2", "model.length=16", "data.encoding=bytes"),
    *("training.batch=4", "training.steps_per_call=3", "keep.checkpoint_every=12", "keep.evaluate_every=20"),
    *("keep.statistics_every=20", "keep.sample_every=30", "keep.sample_tokens=8", "keep.prompt='The '"),
    *("optimizer.average=0.9", "objective.dropout=0.1"),
]
STEPS = 108


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    words = random.Random(0)
    lines = (" ".join(words.choice(["the", "cat", "sat", "on", "a", "mat"]) for _ in range(8)) for _ in range(800))
    file.write_text("\n\n".join(lines))
    return file


def command(out, text, *more):
    arguments = ["train", *SMALL, *more, "--text", str(text), "--steps", str(STEPS), "--out", str(out), "--quiet"]
    return [*INTERRUPTIBLE, *arguments]


def run(out, text, *more):
    return subprocess.run(command(out, text, *more), env=lightly(), capture_output=True, text=True, check=False)


def started(out, text):
    return subprocess.Popen(command(out, text), env=lightly(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def killed(process):
    process.kill()
    process.communicate()


def checkpoints(out):
    folder = out / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()} if folder.exists() else set()


def wait_for(condition, process, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < until
        time.sleep(0.005)


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


def lines(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(out, text)
    assert (done.returncode, done.stderr) == (0, "")  # it was asked to be quiet
    return out


def test_a_run_leaves_everything_it_says(whole):
    assert (whole / "report.html").stat().st_size > 100_000
    assert {line["step"] for line in lines(whole) if "validation_loss" in line} == {*range(0, 101, 20), STEPS}
    assert max(line["step"] for line in lines(whole)) == STEPS
    losses = [line["loss"] for line in lines(whole) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    arrays = safetensors.numpy.load_file(whole / "statistics.safetensors")
    assert arrays["entropy"].shape == (7, 1, 2)
    assert arrays["step"].tolist() == [*range(0, 101, 20), STEPS]
    assert {"rank" if name.startswith("rank_") else name for name in arrays} == {"step", *LABELS}
    assert arrays["relative_step"].shape == (7, 2) and np.all(arrays["relative_step"] > 0)
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 30, 60, 90, STEPS]
    assert all(sample["text"].startswith("The ") for sample in samples)
    assert checkpoints(whole) == {96, STEPS}


def test_its_page_opens_without_errors_or_requests_and_heads_are_told_apart(browser, whole):
    opened = Opened(browser, (whole / "report.html").as_uri(), "#losses .scatterlayer")
    page = opened.page
    drawn = lambda: page.evaluate("document.getElementById('statistics').data.map((t) => [t.name, t.line.color])")
    page.select_option("#statistic", "entropy")
    (first, one), (second, other) = drawn()
    assert (first, second) == ("layer 0, head 0", "layer 0, head 1") and one != other
    before = page.evaluate("document.getElementById('losses').layout.xaxis.type")
    page.select_option("#scale", "log")
    assert (before, page.evaluate("document.getElementById('losses').layout.xaxis.type")) == ("linear", "log")
    assert opened.seen == [] and len(opened.requests) == 1


def test_killed_or_told_to_stop_at_any_moment_it_goes_on_to_the_same_bits(whole, text, tmp_path):
    out, chance = tmp_path / "run", random.Random(os.urandom(8))
    ends = []

    def end(process, number, code, told=""):
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        ends.append((number.name, sorted(checkpoints(out))))
        assert process.returncode == code, (ends, errors)
        assert told in errors.decode()

    def started_until_another_checkpoint():
        before, process = checkpoints(out), started(out, text)
        wait_for(lambda: checkpoints(out) - before, process)
        return process

    process = started_until_another_checkpoint()
    time.sleep(chance.uniform(0, 0.15))
    end(process, signal.SIGKILL, -signal.SIGKILL)
    # What is done is kept, and how to go on is said.
    end(started_until_another_checkpoint(), signal.SIGTERM, 143, "terminated after step")
    end(started_until_another_checkpoint(), signal.SIGINT, 130, "again to go on")
    # While a checkpoint is being written.
    process = started(out, text)
    writing = lambda: [path for path in (out / "checkpoints").iterdir() if not path.name.isdigit()]
    wait_for(lambda: writing() or process.poll() is not None, process)
    killed(process)
    done = run(out, text)
    assert done.returncode == 0, (ends, done.stderr)
    assert weights(out) == weights(whole), ends
    assert lines(out) == lines(whole), ends
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    one, other = (safetensors.numpy.load_file(run / "statistics.safetensors") for run in (out, whole))
    assert all((one[name] == other[name]).all() for name in other)


def test_a_finished_run_is_finished_and_other_settings_are_refused(whole, text):
    before = weights(whole)
    again = run(whole, text)
    assert again.returncode == 0
    assert "Report:" in again.stdout
    other = run(whole, text, "optimizer.rate=0.5")
    assert other.returncode == 2
    assert "optimizer.rate was 0.001 and is 0.5" in other.stderr
    assert weights(whole) == before


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(whole, text, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")  # as if it had not come to its end
    newest = out / "checkpoints" / str(max(checkpoints(out)))
    for file in newest.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    damaged = run(out, text)
    assert damaged.returncode == 2
    assert f"{newest} cannot be read" in damaged.stderr
    assert f"goes on from step {min(checkpoints(out))}" in damaged.stderr
    assert newest.exists()


def test_the_trained_model_is_loaded_and_walked(whole, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "minitf", "walk", str(whole / "model"), "the cat", "--out", str(tmp_path / "walk")],
        env=lightly(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "walk" / "report.html").exists()


def together(out, text, *more):
    """What two processes of one device each say of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = lambda number: {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }
    line = command(out, text, *more, "--distributed")
    both = [
        subprocess.Popen(line, env=lightly() | variables(number), stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    ends = [process.communicate(timeout=300)[1] for process in both]
    return [(process.returncode, told) for process, told in zip(both, ends, strict=True)]


def test_two_processes_may_divide_the_heads_and_read_each_batch_whole(whole, text, tmp_path):
    out = tmp_path / "two"
    for code, told in together(out, text, "mesh.tensor=2", f"keep.checkpoint_every={STEPS}"):
        assert code == 0, told[-3000:]
    one, two = (safetensors.numpy.load_file(run / "model" / "model.safetensors") for run in (whole, out))
    for name, expected in one.items():
        np.testing.assert_allclose(two[name], expected, atol=1e-4, err_msg=name)
    statistics = out / "statistics.safetensors"
    assert all(np.isfinite(x).all() for x in safetensors.numpy.load_file(statistics).values())


def test_a_process_without_a_device_of_the_mesh_is_told(text, tmp_path):
    for code, told in together(tmp_path / "run", text):
        assert code == 2 and "the mesh has 1 of the 2 devices, and none of process 1" in told
