"""The commands around training, through the command line."""

import dataclasses
import json
import shlex
import tomllib

import pytest

from minitf import cli
from minitf.analysis.claims import claim
from minitf.analysis.fourbit import job
from minitf.train.settings import as_config, preset_names, read_preset


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(one) for one in arguments])
    return ended.value.code


def test_show_lists_the_presets_and_what_each_trains(capsys):
    assert run("train", "--show") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == preset_names()
    assert all(len(line.split()) > 5 for line in told)


def test_show_prints_every_setting_as_a_file_that_means_the_same(capsys):
    words = ["model.layers=3", "optimizer.name=lion"]
    assert run("train", "--show", "--preset", "recall", *words, "--steps", 7, "--sweep", "lr=1e-3,1e-2") == 0
    tables = tomllib.loads(capsys.readouterr().out)
    config = as_config(tables)
    assert config.model == {**read_preset("recall")["model"], "layers": 3}
    assert (config.optimizer.name, config.training.steps) == ("lion", 7)
    assert config.sweep == {"optimizer.rate": (1e-3, 1e-2)}


@pytest.mark.parametrize(
    "words",
    [
        "train model.layers=6 data.columns=x,y --preset recall --text a b --sweep lr=1e-3,1e-2 --steps 7",
        "train --preset recall --text a b model.layers=6 data.columns=x,y --sweep lr=1e-3,1e-2 --steps 7",
        "train model.layers=6 --preset recall --steps 7 --sweep lr=1e-3,1e-2 --text a b data.columns=x,y",
        "train --text a b --quiet model.layers=6 --preset recall data.columns=x,y --sweep lr=1e-3,1e-2 --steps 7",
    ],
)
def test_settings_may_stand_anywhere(words):
    found = dataclasses.replace(cli.parsed(words.split()), quiet=False)
    expected = {"settings": ("model.layers=6", "data.columns=x,y"), "text": ("a", "b"), "steps": 7}
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.sweep == ("lr=1e-3,1e-2",)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --model.layers 6", "'--model.layers' is a setting, not an option: write model.layers=6"),
        ("plan --model.layers=6 --preset recall", "write model.layers=6"),
        ("train --training.rematerialize --quiet", "write training.rematerialize=VALUE"),
        ("train --text a --keep.last", "write keep.last=VALUE"),
    ],
)
def test_a_setting_written_as_an_option_is_told_how_it_is_written(capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        cli.parsed(words.split())
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_what_is_set_and_swept_at_once_is_refused():
    command = cli.parsed("train optimizer.rate=0.5 --preset copy --sweep lr=1e-3,1e-2".split())
    with pytest.raises(ValueError, match="optimizer.rate is set to 0.5, and swept with --sweep: leave out one"):
        command.tables()


@pytest.mark.parametrize(
    "words",
    [
        "--ablate 0.1 --generate 3 --ablate 1.3 0.2",
        "--ablate=0.1 --ablate 1.3 0.2 --generate 3",
        "--ablate 0.1 1.3 0.2",
    ],
)
def test_an_option_that_takes_several_may_be_given_again(words):
    found = cli.parsed(["walk", "model", "a text", *words.split()])
    assert found.ablate == ("0.1", "1.3", "0.2") and (found.model, found.text) == ("model", "a text")


def test_what_is_given_again_takes_nothing_that_is_not_its_own():
    found = cli.parsed(shlex.split("walk --ablate=0.1 --seed 1 --ablate=1.3 model 'a text' --seed 2"))
    assert (found.ablate, found.model, found.text, found.seed) == (("0.1", "1.3"), "model", "a text", 2)
    found = cli.parsed(
        "train --text a model.layers=3 --sweep lr=1,2 --text b --sweep z_loss=1,2 keep.last=2".split()
    )
    assert (found.text, found.sweep) == (("a", "b"), ("lr=1,2", "z_loss=1,2"))
    assert found.settings == ("model.layers=3", "keep.last=2")
    found = cli.parsed("train --sweep lr=1,2 --text a --sweep optimizer.weight_decay=0.1 --text b.c=d".split())
    assert (found.sweep, found.text) == (("lr=1,2", "optimizer.weight_decay=0.1"), ("a", "b.c=d"))
    found = cli.parsed(shlex.split("walk --ablate 0.1 --ablate 0.2 -- model 'a text'"))
    assert (found.ablate, found.model) == (("0.1", "0.2"), "model")
    assert cli.parsed(["train", "--text=-a", "--text=b"]).text == ("b",)


def test_what_follows_an_option_is_its_value_though_it_looks_like_a_setting():
    of = lambda words: cli.parsed(words.split())
    assert of("train --out a.b=c model.layers=2").out.name == "a.b=c"
    assert of("train --text a.b=c").text == ("a.b=c",)
    swept = of("train --sweep lr=1e-3:1e-2:3 optimizer.weight_decay=0,0.1 model.layers=2")
    assert swept.sweep == ("lr=1e-3:1e-2:3", "optimizer.weight_decay=0,0.1")
    assert swept.settings == ("model.layers=2",)
    columns = of("train --sweep lr=1e-3,1e-2 data.columns=x,y --out=here model.layers=2")
    assert (columns.sweep, columns.settings) == (("lr=1e-3,1e-2",), ("data.columns=x,y", "model.layers=2"))


def test_a_plan_is_printed_and_kept(capsys, tmp_path):
    assert run("plan", "--preset", "gpt2-124m", "mesh.data=8", "--devices", 8, "--out", tmp_path / "plan") == 0
    told = capsys.readouterr().out
    assert "H100" in told
    assert "its own mesh" not in told
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert run("plan", "--preset", "gpt2-124m", "mesh.data=8", "--devices", 4) == 0
    assert "the best way to divide it; its own mesh is of 8" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("plan", "--preset", "recall", "--device", "abacus"), "abacus"),
        (("plan", "--preset", "nothing"), "there is no preset 'nothing'"),
        (("train", "layers=3"), "write group.field=value"),
        (("train", "--sweep", "model.width=1:2:3"), "'model.width' cannot be swept"),
        (("train", "--config", "nowhere.toml"), "nowhere.toml cannot be read"),
        (("train", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(capsys, tmp_path, arguments, told):
    assert run(*arguments, "--out", tmp_path / "run") == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert "Traceback" not in errors


def test_claims_on_few_bits_are_printed_and_kept(capsys, tmp_path, monkeypatch):
    given = {"source": "a paper", "statistic": "a number", "direction": "<", "threshold": 1.0}
    claims = [claim("a", "It is small.", value=0.5, **given), claim("b", "It is smaller.", value=2.0, **given)]
    monkeypatch.setattr(job, "measure", lambda quick: claims)
    assert run("fourbit", "--no-training", "--out", tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert "holds: It is small." in told
    assert "does not hold: It is smaller." in told
    assert "1 of the 2 claims" in told
    assert [one["id"] for one in json.loads((tmp_path / "run" / "claims.json").read_text())] == ["a", "b"]
