"""The built wheel, used from a folder in which a user has a train.py and an analysis.py of their own."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tracked_files():
    """What git would hand out; without git, the packages and what they are built from."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [Path(line) for line in listed.stdout.splitlines()]
    tops = [ROOT / name for name in ("minitf", "train", "analysis", "pyproject.toml", "README.md", "LICENSE")]
    files = [f for top in tops for f in ([top] if top.is_file() else top.rglob("*"))]
    return [f.relative_to(ROOT) for f in files if f.is_file() or f.is_symlink()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for needed in ("build", "setuptools"):
        pytest.importorskip(needed, reason=f"{needed} is not installed, so no wheel can be built")
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than pyproject.toml asks for")
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in tracked_files():
        if (ROOT / file).exists():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, source / file, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = made.glob("minitf-*.whl")
    return file


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Runs python, with the wheel unpacked in front, in a folder with a user's own train.py and analysis.py."""
    installed, own = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("own")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    for name in ("train", "analysis"):
        (own / f"{name}.py").write_text(f"raise SystemExit('the {name}.py of the user was imported')\n")
    # The user's folder comes first by itself (-c and -m put it there); no other path may lead to the checkout.
    front = f"import sys; sys.path.insert(1, {str(installed)!r}); "

    def run(program):
        return subprocess.run(
            [sys.executable, "-c", front + program], capture_output=True, text=True, check=False, cwd=own
        )

    return run, installed


def test_every_module_and_data_file_is_in_the_wheel(names):
    wanted = {
        (Path("minitf") / file).as_posix() if file.parts[0] != "minitf" else file.as_posix()
        for file in tracked_files()
        if file.parts[0] in ("minitf", "train", "analysis")
        and (file.suffix in (".py", ".j2", ".css", ".js", ".toml") or file.name == "py.typed")
    }
    assert {".py", ".j2", ".css", ".js", ".toml"} <= {Path(name).suffix for name in wanted}
    assert "minitf/py.typed" in wanted
    assert wanted <= set(names)


def test_nothing_stands_at_the_top_but_minitf(names):
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"minitf"}


def test_a_users_own_train_and_analysis_never_shadow_ours(python):
    run, installed = python
    done = run("import minitf.train.loop, minitf.analysis.claims; print(minitf.train.loop.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / "minitf" / "train" / "loop.py"


def test_the_command_runs_from_there(python):
    run, _ = python
    done = run("import runpy; sys.argv = ['minitf', '--help']; runpy.run_module('minitf', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "scan-snap" in done.stdout


def test_the_reports_find_their_templates_there(python):
    run, installed = python
    done = run(
        "from minitf.analysis import page_parts; from minitf.analysis.walk_report import page; "
        "from minitf.analysis.scan_snap import report; "
        "print(*sorted(p for m in (page_parts, page, report) for p in m.HERE.iterdir() "
        "if p.suffix in ('.j2', '.css', '.js')))"
    )
    assert done.returncode == 0, done.stderr
    found = ["claims.html.j2", "report.css", "scan_snap/report.html.j2", "scan_snap/report.js"]
    found += ["walk_report/walk.html.j2", "walk_report/walk.js"]
    assert done.stdout.split() == [str(installed / "minitf" / "analysis" / name) for name in found]


def test_the_wheel_installs_its_command(wheel, tmp_path):
    target = tmp_path / "target"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run([sys.executable, *install], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "bin" / "minitf").exists()
