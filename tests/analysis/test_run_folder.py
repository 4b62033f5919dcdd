import json
from contextlib import ExitStack

import jax.numpy as jnp
import pytest

from minitf.analysis.run_folder import (
    Diverged,
    Problem,
    check_run_folder,
    hold,
    open_run_folder,
    telling_of_memory,
    told_to_people,
    writing_results,
)

CONFIG = {"seed": 0, "text": ("a", "b")}


@pytest.fixture
def run(tmp_path):
    """A folder that holds a run."""
    folder = open_run_folder(tmp_path / "run", CONFIG)
    for name in ("arrays/small_0.json", "figures/fig4.png", "report.html", "claims.json", "fig6.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("made by the run")
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", [".probe-", ".probe.", ".config.json."])
def test_what_a_killed_first_write_left_is_no_run_and_goes(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{name}{'0a' * 16}").write_bytes(b"half")
    open_run_folder(folder, CONFIG)
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    (folder / ".config.json.mine").write_bytes(b"")
    (folder / "config.json").write_bytes(b"{")
    with pytest.raises(Problem, match="is not that of a run"):
        open_run_folder(folder, CONFIG, overwrite=True)


def test_what_killed_writes_left_of_a_run_goes_with_its_next_command(run):
    before = contents(run)
    for name in (".report.html.", "arrays/.small_0.json.", "models/0/.model.safetensors."):
        (run / f"{name}{'1f' * 16}").parent.mkdir(parents=True, exist_ok=True)
        (run / f"{name}{'1f' * 16}").write_bytes(b"half")
    check_run_folder(run, CONFIG, resume=True)
    assert len(contents(run)) == len(before) + 3  # asking writes nothing
    open_run_folder(run, CONFIG, resume=True)
    assert contents(run) == before


def test_a_new_folder_is_made_with_its_parents_and_says_what_runs(tmp_path):
    folder = open_run_folder(tmp_path / "a" / "b", CONFIG)
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text()).items() >= {"seed": 0, "text": ["a", "b"]}.items()


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with ExitStack() as ours:
        hold(tmp_path / "new", ours)
        assert (tmp_path / "new").is_dir()
        hold(tmp_path, ours)
        with ExitStack() as theirs, pytest.raises(Problem, match=r"another process is at work in .*--out"):
            hold(tmp_path, theirs)
    with ExitStack() as theirs:
        hold(tmp_path, theirs)


def test_an_empty_folder_is_used(tmp_path):
    open_run_folder(tmp_path, CONFIG)
    assert (tmp_path / "config.json").exists()


def test_a_folder_that_holds_a_run_is_refused_with_the_ways_out(run):
    before = contents(run)
    with pytest.raises(Problem, match=r"already holds a run.*--resume.*--overwrite.*--out"):
        open_run_folder(run, CONFIG)
    assert contents(run) == before


def test_overwriting_removes_what_the_run_made_and_nothing_else(run):
    (run / "notes.txt").write_text("mine")
    open_run_folder(run, {"seed": 1}, overwrite=True)
    assert set(contents(run)) == {"config.json", "notes.txt"}
    assert json.loads((run / "config.json").read_text())["seed"] == 1


def test_resuming_with_the_same_settings_keeps_everything(run):
    before = contents(run)
    open_run_folder(run, CONFIG, resume=True)
    assert contents(run) == before


@pytest.mark.parametrize(
    "now", [{"seed": 1, "text": ("a", "b")}, {"seed": 0, "text": ("a",)}, {**CONFIG, "new": 2}]
)
def test_resuming_with_other_settings_is_refused_and_they_are_named(run, now):
    before = contents(run)
    changed = next(k for k in now if now[k] != CONFIG.get(k))
    with pytest.raises(Problem, match=rf"other settings \({changed} was .* and is .*\).*--overwrite"):
        open_run_folder(run, now, resume=True)
    assert contents(run) == before


def test_replacing_and_going_on_at_once_is_refused(run):
    with pytest.raises(Problem, match="exclude each other"):
        open_run_folder(run, CONFIG, overwrite=True, resume=True)


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("held", ["thesis.tex", "arrays/mine.npy"])
def test_a_folder_that_holds_no_run_is_never_touched(tmp_path, how, held):
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("mine")
    with pytest.raises(Problem, match=r"not empty and holds no run.*--out"):
        open_run_folder(tmp_path, CONFIG, **how)
    assert contents(tmp_path) == {held: b"mine"}


@pytest.mark.parametrize("config", [b'{"model": "mine"}', b"[1]", b"\xff\xfe\x00", b""])
@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_config_of_another_program_beside_other_files_is_never_touched(tmp_path, config, how):
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "weights.bin").write_bytes(b"mine")
    with pytest.raises(Problem, match=r"config\.json is not that of a run of minitf.*--out"):
        open_run_folder(tmp_path, CONFIG, **how)
    assert contents(tmp_path) == {"config.json": config, "weights.bin": b"mine"}


@pytest.mark.parametrize("damaged", [b'{"seed": 0, "te', b"", b"\xff\xfe\x00", b"null"])
def test_a_damaged_config_is_named_and_overwriting_helps(run, damaged):
    (run / "config.json").write_bytes(damaged)
    for how in ({}, {"resume": True}):
        with pytest.raises(Problem, match=r"config\.json is damaged.*--overwrite"):
            open_run_folder(run, CONFIG, **how)
    open_run_folder(run, CONFIG, overwrite=True)
    assert set(contents(run)) == {"config.json"}


def test_a_file_in_the_place_of_the_folder_is_refused_and_kept(tmp_path):
    file = tmp_path / "results"
    file.write_text("mine")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(Problem, match=r"results cannot be used for the results: Not a directory.*--out"):
            open_run_folder(file, CONFIG, **how)
    assert file.read_text() == "mine"


def test_a_folder_under_a_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Problem, match=r"file/run cannot be used.*file is not a folder.*--out"):
        check_run_folder(tmp_path / "file" / "run", CONFIG)


def test_a_folder_in_a_read_only_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *arguments: False)  # root may write everywhere
    with pytest.raises(Problem, match=rf"run cannot be used.*{tmp_path} is not yours to write in.*--out"):
        check_run_folder(tmp_path / "run", CONFIG)


def test_checking_writes_nothing(tmp_path):
    check_run_folder(tmp_path / "a" / "b", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_errors_in_what_a_person_gave_become_problems_and_other_errors_stay():
    for error in (ValueError("T is 1"), OSError("no such file"), Diverged("at step 3")):
        with pytest.raises(Problem, match=str(error)) as caught, told_to_people():
            raise error
        assert isinstance(caught.value, Diverged) == isinstance(error, Diverged)
    with pytest.raises(KeyError), told_to_people():
        raise KeyError("a bug")


def test_a_file_that_vanished_is_told_by_its_name_and_is_no_full_disk(tmp_path):
    gone = tmp_path / "data" / "train.bin"
    message = rf"^{gone} is not there any more\. Begin again\.$"
    with pytest.raises(Problem, match=message), writing_results(tmp_path, "Begin again."):
        gone.read_bytes()
    message = rf"^the results could not be written to {tmp_path}: full\. Begin again\.$"
    with pytest.raises(Problem, match=message), writing_results(tmp_path, "Begin again."):
        raise OSError("full")


def test_bad_input_exits_with_2_and_divergence_with_1():
    assert (Problem.exit_code, Diverged.exit_code) == (2, 1)


def test_too_little_memory_is_a_sentence_and_other_errors_are_not_taken_for_it():
    said = r"not enough memory on the device: Out of memory allocating 40000000000000 bytes\. Ask for less\."
    with pytest.raises(Problem, match=said), telling_of_memory("Ask for less."):
        jnp.zeros(10**13)
    with pytest.raises(RuntimeError, match="mistake"), telling_of_memory("Ask for less."):
        raise RuntimeError("a mistake")
