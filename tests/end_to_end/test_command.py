"""The command as a user meets it: what it is given, what it prints, what it leaves, how it ends."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy
from compiled_once import INTERRUPTIBLE, quickly

from minitf import cli
from minitf.analysis import bench
from minitf.analysis.claims import claim
from minitf.analysis.scan_snap import job

QUICK = ["scan-snap", "--quick", "--text-steps", "40"]
STORY = [*QUICK, "--vocabulary", "500"]
MINITF = [sys.executable, "-m", "minitf"]
MINUTES = 60


def start(*arguments):
    """The real command in a process of its own."""
    return subprocess.Popen(
        [*INTERRUPTIBLE, *arguments],
        env=quickly(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*arguments, command=MINITF):
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=quickly(),
        capture_output=True,
        text=True,
        check=False,
        timeout=15 * MINUTES,
    )


def wait_for(process, file):
    """Until the file is there."""
    end = time.monotonic() + 10 * MINUTES
    while not file.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def interrupt(process):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5 * MINUTES)
    return process.returncode, out, err


def within(capsys, *arguments):
    """Exit code, stdout and stderr of the command, run in this process."""
    with pytest.raises(SystemExit) as exited:
        cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return exited.value.code, captured.out, captured.err


def one_line(text):
    """What a box of tyro's says, without the box."""
    return " ".join(text.replace("│", " ").split())


def installed():
    """The command that the package is installed with."""
    script = shutil.which("minitf", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert script, "the package is installed without its command"
    return script


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A quick run of the module, interrupted once its first stage was done; the installed command ended it."""
    out = tmp_path_factory.mktemp("run") / "quick"
    process = start(*STORY, "--out", str(out))
    wait_for(process, out / "arrays" / "small_4.json")
    interrupted = interrupt(process)
    kept = {p.name: p.stat().st_mtime_ns for p in (out / "arrays").iterdir()}
    resumed = finish(*STORY, "--out", out, "--resume", "--strict", command=[installed()])
    return {"out": out, "interrupted": interrupted, "kept": kept, "resumed": resumed}


@pytest.fixture
def out(story):
    return story["out"]


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A small file that is text enough."""
    chosen = random.Random(0)
    words = ["the", "cat", "sees", "a", "dog", "house", "and", "never", "finds", "it"]
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("\n\n".join(" ".join(chosen.choices(words, k=40)) + "." for _ in range(200)))
    return file


# A run from beginning to end


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(story):
    code, _, err = story["interrupted"]
    assert code == 130
    assert (
        f"What was finished is in {story['out']}; run the same command with --resume to go on from there." in err
    )
    assert "Traceback" not in err


def test_ctrl_c_keeps_finished_stages_and_nothing_half_done(story):
    stage = {f"small_{i}.{ending}" for i in range(5) for ending in ("json", "safetensors")}
    assert set(story["kept"]) == stage


def test_resuming_goes_on_without_repeating_what_was_finished(story, out):
    assert story["resumed"].returncode == 0, story["resumed"].stderr
    assert "Syn-Small (Fig. 4, 5): finished before" in story["resumed"].stderr
    now = {p.name: p.stat().st_mtime_ns for p in (out / "arrays").iterdir()}
    assert now.items() >= story["kept"].items()


def test_a_run_ends_with_its_claims_and_the_place_of_its_report(story, out):
    *_, report = story["resumed"].stdout.splitlines()
    assert "claims that should hold do hold." in story["resumed"].stdout
    assert report == f"Report: {out.resolve() / 'report.html'}"


def test_without_a_terminal_progress_is_one_plain_line_per_stage(story):
    lines = story["resumed"].stderr.splitlines()
    assert "\x1b" not in story["resumed"].stderr
    done = [line.split(":")[0] for line in lines if ": done in " in line]
    assert {"Syn-Medium 3/6", "text, SGD", "text, Adam", "theory", "JoMA", "report"} <= set(done)
    assert len(done) == len({line for line in lines if ": done in " in line})
    (adam,) = [line for line in lines if line.startswith("text, Adam: done")]
    assert "loss " in adam
    assert "steps/s" in adam


def test_a_run_leaves_what_the_readme_says(out):
    assert {p.name for p in out.iterdir()} == {
        "arrays",
        "figures",
        "config.json",
        "claims.json",
        "fig6.json",
        "report.html",
    }
    assert not list(out.rglob(".*"))


def test_the_claims_have_every_row_of_the_table_and_their_schema(out):
    rows = json.loads((out / "claims.json").read_text())
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids))
    assert {f"scan_snap.T{i}" for i in range(1, 23)} <= set(ids)
    assert any(i.startswith("joma.") for i in ids)
    keys = [
        "id",
        "statement",
        "source",
        "statistic",
        "value",
        "threshold",
        "direction",
        "holds",
        "n",
        "ci95",
        "note",
    ]
    for row in rows:
        assert list(row) == [*keys, "expected"]
        assert all(row[key] and isinstance(row[key], str) for key in ("id", "statement", "source", "statistic"))
        assert row["direction"] in ("<", ">", "within", "==")
        assert isinstance(row["holds"], bool)
        assert isinstance(row["expected"], bool)
        assert row["n"] >= 1
    assert [row["id"] for row in rows if row["expected"] and not row["holds"]] == []


def test_fig6_has_one_row_per_cell(out):
    rows = json.loads((out / "fig6.json").read_text())
    cells = {(row["queries"], row["next_per_query"], row["eta_z"], row["ratio"]) for row in rows}
    assert cells == {(3, 2, eta, ratio) for eta in (0.5, 1.0, 2.0, 3.0) for ratio in (1.0, 2.0, 5.0, 10.0)}
    assert len(rows) == 16
    for row in rows:
        assert list(row) == ["queries", "next_per_query", "eta_z", "ratio", "mean", "sd", "n"]
        assert row["n"] == 10
        assert 0 < row["mean"] < math.log(10)
        assert 0 < row["sd"] < 0.2


def test_the_configuration_says_what_ran(out):
    config = json.loads((out / "config.json").read_text())
    expected = {"seed": 0, "quick": True, "full": False, "text_steps": 40, "length": 128, "vocabulary": 500}
    assert {key: config[key] for key in expected} == expected


def test_every_array_file_can_be_read_and_has_its_description(out):
    files = sorted((out / "arrays").glob("*.safetensors"))
    names = {file.stem for file in files}
    assert {*(f"small_{i}" for i in range(5)), "medium_3", "text_sgd_0", "text_adam_0", "joma"} == names
    for file in files:
        assert safetensors.numpy.load_file(file)
        assert file.with_suffix(".json").exists()


def test_the_report_is_one_page_and_every_figure_a_png(out):
    page = (out / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    figures = list((out / "figures").iterdir())
    assert {"fig4.png", "fig5.png", "fig6.png"} <= {p.name for p in figures}
    assert all(p.read_bytes().startswith(b"\x89PNG\r\n") for p in figures)


def test_a_finished_run_is_refused_and_stays_as_it_is(out, capsys):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, _, err = within(capsys, *QUICK, "--out", out)
    assert code == 2
    assert f"minitf: {out} already holds a run. Add --resume" in err
    assert "--overwrite" in err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_resuming_with_other_settings_is_refused(out, capsys):
    code, _, err = within(capsys, *STORY, "--out", out, "--resume", "--seed", 1)
    assert code == 2
    assert "other settings (seed was 0 and is 1)" in err


@pytest.fixture(scope="module")
def hurt(story, tmp_path_factory):
    """The finished run, with a panel cut short on disk and a rate of SGD on text that diverges, taken up again."""
    out = tmp_path_factory.mktemp("hurt") / "run"
    shutil.copytree(story["out"], out)
    panel = out / "arrays" / "medium_3.safetensors"
    whole = panel.read_bytes()
    panel.write_bytes(whole[:1000])
    (out / "arrays" / "text_sgd_0.json").unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "text_rate": 1e30}))
    done = finish(*STORY, "--out", out, "--resume", "--text-rate", "1e30")
    return {"out": out, "whole": whole, "done": done}


def test_a_damaged_stage_is_told_and_made_again_with_the_same_numbers(hurt):
    assert "medium_3.safetensors" in hurt["done"].stderr.split("is damaged")[1]
    assert (hurt["out"] / "arrays" / "medium_3.safetensors").read_bytes() == hurt["whole"]


def test_a_rate_on_text_that_diverges_ends_with_1_and_says_step_and_rate(hurt):
    assert hurt["done"].returncode == 1
    last = hurt["done"].stderr.splitlines()[-1]
    assert last.startswith("minitf: text, SGD: the loss stopped being finite at step ")
    assert "learning rate 1e+30" in last
    assert "Traceback" not in hurt["done"].stderr


def test_divergence_keeps_what_was_measured_until_then(hurt):
    kept = safetensors.numpy.load_file(hurt["out"] / "arrays" / "text_sgd_0.partial.safetensors")
    assert len(kept["train_loss"]) > 0
    assert not (hurt["out"] / "arrays" / "text_sgd_0.json").exists()


# Ends that come early


def test_a_pair_of_rates_that_diverges_ends_with_1_and_says_step_and_rates_and_nothing_else(
    tmp_path, prose, capsys
):
    out = tmp_path / "run"
    rates = ["--decoder-rate", "1e30", "--attention-rate", "1e30"]
    code, said, err = within(capsys, *QUICK, "--text", prose, "--vocabulary", 300, "--out", out, "--quiet", *rates)
    assert code == 1
    assert said == "" and len(err.splitlines()) == 1
    assert err.startswith("minitf: Syn-Small (Fig. 4, 5): the loss stopped being finite at step ")
    assert "(decoder rate 1e+30, attention rate 1e+30, seed " in err
    assert (out / "arrays" / "small_5.partial.safetensors").exists()


def test_ctrl_c_while_a_program_compiles_ends_without_a_stack_trace(tmp_path, prose):
    out = tmp_path / "run"
    process = start(*QUICK, "--text", str(prose), "--vocabulary", "300", "--out", str(out))
    wait_for(process, out / "config.json")
    time.sleep(2.0)
    code, _, err = interrupt(process)
    assert code == 130
    assert "minitf: interrupted." in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Nothing was begun yet."),
        (["--resume"], "run the same command with --resume to go on"),
        (["--overwrite"], "run the same command with --resume instead of --overwrite to go on"),
    ],
)
def test_ctrl_c_says_what_fits_the_command(tmp_path, capsys, monkeypatch, options, message):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    if options:
        (tmp_path / "config.json").write_text("{}")
    code, _, err = within(capsys, *QUICK, "--out", tmp_path, *options)
    assert code == 130
    assert message in err


def test_ctrl_c_ends_a_benchmark_though_the_training_loop_would_only_stop_early(tmp_path, capsys, monkeypatch):
    def measure(*arguments, **settings):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:  # what the loop does
            return

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(bench, "run_benchmarks", measure)
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, _, err = within(capsys, "bench", "--out", tmp_path)
    assert code == 130
    assert "minitf: interrupted. Run the command again to measure from the start." in err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_shows_itself(monkeypatch, tmp_path, error):
    def buggy(*arguments, **settings):
        raise error

    monkeypatch.setattr(job, "run", buggy)
    with pytest.raises(type(error), match="a bug"):
        cli.main([*QUICK, "--out", str(tmp_path)])


def test_strict_exits_with_1_only_for_claims_that_should_hold(tmp_path, capsys, monkeypatch):
    def a_claim(name, value, expected=True):
        return claim(
            name,
            "It is small.",
            source="s",
            statistic="s",
            value=value,
            direction="<",
            threshold=1,
            expected=expected,
        )

    known = [a_claim("scan_snap.T1", 0), a_claim("scan_snap.fig3_scale", 5, expected=False)]
    for claims, strict, expected in (
        (known, ["--strict"], 0),
        ([*known, a_claim("scan_snap.T9", 2)], [], 0),
        ([*known, a_claim("scan_snap.T9", 2)], ["--strict"], 1),
    ):
        monkeypatch.setattr(job, "run", lambda *a, claims=claims, **k: claims)
        code, out, _ = within(capsys, *QUICK, "--out", tmp_path, *strict)
        assert code == expected
        assert ("scan_snap.T9 does not: It is small." in out) == (len(claims) == 3)
        assert "fig3" not in out


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {scan-snap, walk, ablate, mixers, train, plan, fourbit, bench}"),
        (["scan-sanp"], "Available subcommands: scan-snap, walk, ablate, mixers, train, plan, fourbit, bench"),
        (["scan-snap", "--lenght", "3"], "Perhaps you meant: --length INT"),
        (["scan-snap", "--seed", "one"], "--seed: invalid literal for int() with base 10: 'one'"),
        (["scan-snap", "--text-rate", "fast"], "--text-rate: could not convert string to float: 'fast'"),
        (["scan-snap", "--text-rate"], "Missing value for argument '--text-rate'"),
        (
            ["bench", "scan-sanp"],
            "invalid choice 'scan-sanp' for argument 'names'. Expected one of",
        ),
        (["scan-snap", "--length", "1"], "minitf: length is 1; it must be at least 2"),
        (["scan-snap", "--text-rate", "-1"], "minitf: text_rate is -1.0; a learning rate must be a finite number"),
        (["scan-snap", "--text-rate", "nan"], "minitf: text_rate is nan; a learning rate must be a finite number"),
        (["scan-snap", "--decoder-rate", "-1", "--attention-rate", "1"], "minitf: decoder_rate is -1.0"),
        (
            ["scan-snap", "--decoder-rate", "1"],
            "minitf: give both --decoder-rate and --attention-rate, or neither",
        ),
        (
            ["scan-snap", "--attention-rate", "1"],
            "minitf: give both --decoder-rate and --attention-rate, or neither",
        ),
        (["scan-snap", "--vocabulary", "0"], "minitf: vocabulary is 0; a byte-pair vocabulary holds at least"),
        (["scan-snap", "--quick", "--full"], "minitf: --quick and --full exclude each other"),
        (["scan-snap", "--text-steps", "0"], "minitf: text_steps is 0; it must be at least 1"),
        (["scan-snap", "--seed", "-1"], "minitf: seed is -1; it must lie between 0 and"),
        (["scan-snap", "--text", "/no/such/file"], "minitf: There is no file or folder /no/such/file."),
        (["scan-snap", "--overwrite", "--resume"], "minitf: --overwrite and --resume exclude each other"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = within(capsys, *arguments)
    assert code == 2
    assert message in one_line(err)
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "prose.txt is empty: it holds no text."),
        (b" \n\n ", "prose.txt is empty: it holds no text."),
        (b"\x00\x01\x02" * 1000, "prose.txt is binary, not text (it holds NUL bytes)."),
        (b"\x89PNG\r\n\xff\xfe\xc1\xe2" * 1000, "prose.txt is not UTF-8 text"),
        ("Ein Satz.\n".encode("utf-16"), "prose.txt is UTF-16, but text is read as UTF-8"),
        (b"word", "cannot be split into training and validation"),
        (b"A few words.\n\nA few more.\n", "too short: it has"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_with_the_reason(tmp_path, capsys, content, message):
    file = tmp_path / "prose.txt"
    file.write_bytes(content)
    code, _, err = within(capsys, *QUICK, "--text", file, "--vocabulary", 257, "--out", tmp_path / "run")
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_text_that_may_not_be_read_is_named(tmp_path, capsys, prose, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    code, _, err = within(capsys, *QUICK, "--text", prose, "--out", tmp_path / "run")
    assert code == 2
    assert f"minitf: The file {prose} cannot be read: Permission denied." in err


def test_a_folder_without_text_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, _, err = within(capsys, *QUICK, "--text", tmp_path / "empty", "--out", tmp_path / "run")
    assert code == 2
    assert f"minitf: The folder {tmp_path / 'empty'} holds no text file" in err


def test_results_cannot_go_where_a_file_is(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        code, _, err = within(capsys, *QUICK, "--out", out)
        assert code == 2
        assert f"minitf: {out} cannot be used for the results: " in err
        assert "Choose another folder with --out." in err
    assert (tmp_path / "file").read_text() == "mine"


def test_benchmarks_cannot_go_where_a_file_is(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    code, _, err = within(capsys, "bench", "--out", tmp_path / "file" / "bench")
    assert code == 2
    assert f"{tmp_path / 'file'} is not a folder. Choose another folder with --out." in err


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
def test_results_never_go_where_something_else_is(tmp_path, capsys, option):
    (tmp_path / "thesis.tex").write_text("mine")
    code, _, err = within(capsys, *QUICK, "--out", tmp_path, *option)
    assert code == 2
    assert "is not empty and holds no run of minitf (there is thesis.tex, but no config.json)" in err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_damaged_configuration_is_named_with_the_way_out(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"seed": ')
    code, _, err = within(capsys, *QUICK, "--out", tmp_path, "--resume")
    assert code == 2
    assert f"minitf: {tmp_path / 'config.json'} is damaged. Use --overwrite" in err


# Help


def test_the_command_and_the_library_have_the_same_defaults():
    command, library = vars(cli.ScanSnap()), vars(job.ScanSnapConfig())
    assert {name: command[name] for name in library} == library


def test_help_names_both_commands_and_where_to_begin(capsys):
    code, out, _ = within(capsys, "--help")
    assert code == 0
    assert "Begin with: minitf scan-snap --quick" in one_line(out)
    assert "• scan-snap" in out
    assert "• bench" in out


def test_help_of_the_main_job_explains_every_option_in_plain_types(capsys):
    code, out, _ = within(capsys, "scan-snap", "--help")
    assert code == 0
    for option in (
        "--out DIR",
        "--seed INT",
        "--quiet",
        "--decoder-rate FLOAT",
        "--text-steps INT",
        "--text PATH",
    ):
        assert option in out
    assert "None" not in out
    assert "default: False" not in out
    assert "downloads nothing unless you name a data set" in one_line(out)
