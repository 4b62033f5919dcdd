"""Checkpoints are whole or not there, the newest is read, and a damaged one says which older one is left."""

import gc
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf.train.checkpoints import ASIDE, Checkpoints, digests, dynamics_steps
from minitf.train.config import KeepSettings

STATE = {"weights": jnp.arange(600.0).reshape(20, 30), "moments": (jnp.ones(3), None), "step": jnp.int32(7)}
LIKE = jax.eval_shape(lambda: STATE)


def written(folder, steps, keep=None, last=100):
    with Checkpoints(folder, keep or KeepSettings(), last) as checkpoints:
        for step in steps:
            checkpoints.save(step, {**STATE, "step": jnp.int32(step)})
    return folder


def test_what_is_read_has_the_bits_of_what_was_written(tmp_path):
    with Checkpoints(written(tmp_path / "c", [3, 5]), KeepSettings(), 100) as checkpoints:
        assert checkpoints.steps() == [3, 5]
        step, state = checkpoints.restore(LIKE)
        assert step == state["step"] == 5
        np.testing.assert_array_equal(state["weights"], STATE["weights"])
        assert checkpoints.restore(LIKE, 3)[1]["step"] == 3


def test_those_that_are_to_be_kept_are_kept(tmp_path):
    keep = KeepSettings(last=2, every=40, dynamics=True)
    written(tmp_path / "c", [0, 1, 3, 10, 40, 50, 60, 70], keep)
    with Checkpoints(tmp_path / "c", keep, 100) as checkpoints:
        assert checkpoints.steps() == [0, 1, 40, 60, 70]


def test_what_is_not_kept_is_moved_aside_first_and_then_removed(tmp_path, monkeypatch):
    removed, remove = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (removed.append(Path(path)), remove(path, **how)))
    folder = written(tmp_path / "c", [1, 2, 3, 4], KeepSettings(last=1))
    assert {path.name for path in folder.iterdir()} == {"4"}
    # Killed in the middle of that, no ruin is left under a step's name.
    assert all(path.name == ASIDE for path in removed)
    (folder / ASIDE / "3" / "default").mkdir(parents=True)
    with Checkpoints(folder, KeepSettings(last=1), 100) as checkpoints:
        assert checkpoints.steps() == [4]
        assert not (folder / ASIDE).exists()


def test_of_all_that_goes_wrong_where_there_is_no_room_people_are_told_the_first(tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("RESOURCE_EXHAUSTED: close")

    def writes():
        with Checkpoints(tmp_path / "c", KeepSettings(), 100) as checkpoints:
            checkpoints.save(1, STATE)
            checkpoints.wait()
            monkeypatch.setattr(checkpoints._manager, "check_for_errors", lambda: 1 / 0)
            checkpoints.save(2, STATE)

    heard = sys.unraisablehook
    monkeypatch.setattr(ocp.CheckpointManager, "close", fails)
    with pytest.raises(ValueError, match=r"division by zero\. Those before it are whole"):
        writes()
    with (
        pytest.raises(ValueError, match="RESOURCE_EXHAUSTED: close. Those before"),
        Checkpoints(tmp_path / "d", KeepSettings(), 100),
    ):
        pass
    assert sys.unraisablehook is heard


def test_what_other_writes_say_when_one_has_failed_is_not_repeated(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: heard.append(str(one.exc_value)))
    with Checkpoints(tmp_path / "c", KeepSettings(), 100):
        for said in ("Event loop is closed", "another"):
            sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(said)))
    assert heard == ["another"]


def test_training_may_use_the_memory_again_while_it_is_written(tmp_path):
    zero = jax.jit(jnp.zeros_like, donate_argnums=0)
    with Checkpoints(tmp_path / "c", KeepSettings(), 100) as checkpoints:
        large = jnp.ones((500, 500))
        checkpoints.save(1, {"large": large})
        for _ in range(5):
            large = zero(large)
        checkpoints.wait()
        _, state = checkpoints.restore({"large": jax.ShapeDtypeStruct((500, 500), jnp.float32)})
        assert bool(jnp.all(state["large"] == 1))


# What Orbax leaves behind when reading fails says so when it is collected: here, not in some later test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["emptied", "removed", "changed"])
def test_a_damaged_one_is_named_and_so_is_the_older_one(tmp_path, how):
    folder = written(tmp_path / "c", [3, 5])
    files = [file for file in (folder / "5").rglob("*") if file.is_file() and file.parent.name == "d"]
    largest = max(files, key=lambda file: file.stat().st_size)
    if how == "emptied":
        largest.write_bytes(b"")
    elif how == "removed":
        largest.unlink()
    else:
        data = bytearray(largest.read_bytes())
        for place in range(len(data) // 3, len(data) // 3 + 40):
            data[place] ^= 0xFF
        largest.write_bytes(bytes(data))
    with Checkpoints(folder, KeepSettings(), 100) as checkpoints:
        with pytest.raises(ValueError, match=r"c/5 cannot be read: .*goes on from step 3"):
            checkpoints.restore(LIKE)
        assert checkpoints.restore(LIKE, 3)[0] == 3
        assert (folder / "5").exists()
    gc.collect()


def test_where_there_is_none_it_says_so(tmp_path):
    with Checkpoints(tmp_path / "c", KeepSettings(), 100) as checkpoints:
        with pytest.raises(ValueError, match="holds no checkpoint"):
            checkpoints.restore(LIKE)
        with pytest.raises(ValueError, match="holds no checkpoint of step 3"):
            checkpoints.restore(LIKE, 3)


def test_a_folder_that_cannot_be_is_an_error_for_people(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file" / "c", KeepSettings(), 100)


def test_dynamics_are_kept_where_pythia_kept_them():
    assert dynamics_steps(3500) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 3500]
    assert dynamics_steps(5) == [0, 1, 2, 4, 5]


@given(st.integers(0, 11), st.integers(0, 31))
def test_a_digest_changes_with_every_bit(place, bit):
    bits = np.arange(12, dtype=np.uint32) * 77
    changed = bits.copy()
    changed[place] ^= np.uint32(1 << bit)
    of = lambda x: digests({"a": x.view(np.float32), "b": x.view(np.uint8)})
    assert np.all(of(bits) != of(changed))


def test_a_digest_changes_when_numbers_change_places():
    x = np.arange(12.0, dtype=np.float32)
    assert digests([x]) != digests([x[::-1].copy()])
