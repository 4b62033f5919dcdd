"""On a mesh of devices, or on several processes, a run computes what it does on one device."""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from compiled_once import lightly

from minitf import ModelConfig
from minitf.declaration import declare
from minitf.train import sharding
from minitf.train.checkpoints import Checkpoints
from minitf.train.config import KeepSettings, MeshSettings

COMMON = """
import sys, jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from minitf import ModelConfig
from minitf.train import sharding, trainer
from minitf.train.batch import next_token
from minitf.train.checkpoints import Checkpoints
from minitf.train.config import KeepSettings, MeshSettings
from minitf.train.settings import as_config
from minitf.train.step import Program

MODEL = ModelConfig(vocabulary=16, layers=2, width=16, heads=8, length=8, biases=True)

def windows(first, steps):
    of = lambda step: np.random.default_rng(step).integers(0, 16, (16, 9), np.int32)
    return np.stack([of(step) for step in range(first, first + steps)])[None]

def program_of(mesh, **optimizer):
    config = as_config({"training": {"steps": 6, "batch": 16, "steps_per_call": 3, "accumulate": 2, "unroll": 1},
                        "optimizer": {"warm_up": 0, "rate": 0.01, "average": 0.9, **optimizer}, "mesh": mesh})
    return Program(config, MODEL, "next_token", as_batch=lambda window, key: next_token(window))

def compiled(mesh, initial=None, **optimizer):
    program = program_of(mesh, **optimizer)
    devices = sharding.mesh_of(program.config.mesh)
    return trainer.compiled(program, devices, 1e9, 8, initial=initial), devices

def train(programs, devices, stops=(6,), kept=None, mine=windows):
    done, state = kept.restore(programs.state) if kept and kept.steps() else (0, programs.start())
    losses = []
    for taken in trainer.run(programs, state, done, stops, mine, devices):
        losses.append(np.asarray(taken.measures.loss)[: taken.done - taken.first])
        state = taken.state
    return state, np.concatenate(losses)
"""

SHARDED = (
    COMMON
    + """
def assert_alike(state):
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-3, atol=1e-5)

whole, losses = train(*compiled({}))
last = None
for data, fsdp, tensor in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2), (1, 2, 4), (2, 2, 2)]:
    programs, devices = compiled({"data": data, "fsdp": fsdp, "tensor": tensor})
    state, found = train(programs, devices)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_alike(state)
    weight = state.parameters.layers.feed_forward.into
    moment = state.moments[1][0].mu.layers.feed_forward.into
    assert weight.sharding == moment.sharding
    assert weight.addressable_shards[0].data.size * fsdp * tensor == weight.size
    if last is not None:  # what was written on one mesh is read on another
        step, read = last.restore(programs.state)
        assert step == 6
        assert jax.tree.all(jax.tree.map(lambda x, like: x.sharding == like.sharding, read, programs.state))
        assert_alike(read)
    if data == fsdp == tensor:  # what was trained on one device is where another training starts
        given = jax.tree.map(np.asarray, whole.parameters)
        begun = compiled({"data": data, "fsdp": fsdp, "tensor": tensor}, lambda: given)[0].start()
        jax.tree.map(np.testing.assert_array_equal, begun.parameters, given)
        assert begun.parameters.layers.feed_forward.into.sharding == weight.sharding
    last = None
    if (data, fsdp, tensor) in [(1, 8, 1), (1, 2, 4)]:  # each before a mesh of all other divisions
        last = Checkpoints(Path(sys.argv[1]) / f"{data}{fsdp}{tensor}", KeepSettings(), 6)
        last.save(6, state)
        last.wait()
with Checkpoints(Path(sys.argv[1]) / "eight", KeepSettings(), 6) as kept:
    kept.save(6, jax.device_put({"x": jnp.arange(8.0)}, sharding.NamedSharding(devices, sharding.P("fsdp"))))
print("alike")
print("losses", losses.tolist())
"""
)

# Each of two processes has two devices and makes its own half of every batch; killed and begun again, they go on.
TWO = (
    COMMON
    + """
folder, port, number, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, number)
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
from minitf.analysis.training.distributed import agreed
assert agreed(15 if number else None) == 15 and agreed(None) is None
half_each, whole = (number, 2), (0, 1)
for divided, part in (((2, 2, 1), half_each), ((4, 1, 1), half_each), ((1, 2, 2), half_each), ((1, 1, 4), whole)):
    assert sharding.part_of_batch(sharding.mesh_of(MeshSettings(*divided)), 16) == part
half = lambda first, steps: windows(first, steps)[:, :, 8 * number : 8 * (number + 1)]
with Checkpoints(folder, KeepSettings(), 6) as kept:
    state, losses = train(*compiled({"data": 2, "fsdp": 2}), stops=(end,), kept=kept, mine=half)
    kept.save(end, state)
    kept.wait()
    print("losses", losses.tolist(), flush=True)
    if end < 6:
        import time
        time.sleep(300)
"""
)


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """What a process of eight devices says, which trains on one of them first; and where its checkpoints are."""
    folder = tmp_path_factory.mktemp("kept")
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(folder)],
        env=lightly(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, folder


def test_training_on_eight_devices_is_training_on_one(eight_devices):
    output, _ = eight_devices
    assert output.startswith("alike\n")


@pytest.mark.parametrize(
    "where", [sharding.everywhere(sharding.mesh_of(MeshSettings())), None], ids=["mesh", "any"]
)
def test_what_eight_devices_wrote_a_machine_with_one_reads(eight_devices, where):
    _, folder = eight_devices
    with Checkpoints(folder / "eight", KeepSettings(), 6) as kept:
        step, state = kept.restore({"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=where)})
    assert step == 6 and state["x"].tolist() == list(range(8))


def _two_processes(folder, end):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", TWO, str(folder), str(port)]
    both = [
        subprocess.Popen(
            [*arguments, str(number), str(end)],
            env=lightly(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = ["", ""]
    if end < 6:
        told = [next((line for line in process.stdout if line.startswith("losses")), "") for process in both]
        # At once: who is left alone ends by itself.
        for process in both:
            process.kill()
    ends = [process.communicate(timeout=300) for process in both]
    return [
        (line + output, errors, process.returncode)
        for line, (output, errors), process in zip(told, ends, both, strict=True)
    ]


def _losses(output):
    line = next(line for line in output.splitlines() if line.startswith("losses"))
    return [float(number) for number in line.removeprefix("losses [").rstrip("]").split(",")]


def test_two_processes_that_are_killed_go_on_as_one_would(eight_devices, tmp_path):
    expected = _losses(eight_devices[0])
    for end, steps in ((3, slice(0, 3)), (6, slice(3, 6))):
        for output, errors, code in _two_processes(tmp_path / "kept", end):
            assert code == (0 if end == 6 else -9), errors[-3000:]
            assert _losses(output) == pytest.approx(expected[steps], rel=1e-5)


def test_each_weight_is_divided_where_its_declaration_says_and_it_can_be():
    config = ModelConfig(vocabulary=15, layers=2, width=16, heads=4, length=8)
    mesh = sharding.mesh_of(MeshSettings())
    spec = lambda declaration: sharding.of_weight(declaration, {"data": 2, "fsdp": 2, "tensor": 4})
    declared = declare(config)
    assert spec(declared.layers.attention.query) == sharding.P(None, "fsdp", "tensor", None)
    assert spec(declared.layers.attention.output) == sharding.P(None, "tensor", None, "fsdp")
    # 15 tokens cannot be divided by 4.
    assert spec(declared.embedding) == sharding.P(None, "fsdp")
    assert spec(declared.final_norm.gain) == sharding.P("fsdp")
    assert mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"needs 2 x 3 x 4 = 24 devices, and there is 1"):
        sharding.mesh_of(MeshSettings(2, 3, 4))
