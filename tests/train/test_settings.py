"""Settings are the same in a preset, a TOML file and on the command line, and wrong ones are told apart."""

import dataclasses
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf import ModelConfig, count
from minitf.train.config import (
    KeepSettings,
    MeshSettings,
    ObjectiveSettings,
    OptimizerSettings,
    TrainConfig,
    TrainingSettings,
    unread,
)
from minitf.train.settings import (
    about_preset,
    as_config,
    as_tables,
    as_toml,
    from_words,
    laid_over,
    preset_names,
    read_preset,
    sweep_from,
    tables_of,
    told_of,
)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_configuration_and_says_what_it_trains(name):
    config = as_config(read_preset(name))
    assert config.model
    said = about_preset(name)
    assert len(said) > 20
    if millions := re.search(r"(\d+) million weights", said):
        model = ModelConfig(**{"vocabulary": config.data.vocabulary, **config.model})
        assert round(count(model) / 1e6) == int(millions[1])


@pytest.mark.parametrize("name", preset_names())
def test_a_configuration_written_as_toml_is_read_back_as_it_was(name, tmp_path):
    config = as_config(read_preset(name))
    file = tmp_path / "config.toml"
    file.write_text(as_toml(as_tables(config)), "utf-8")
    assert as_config(tables_of("", file, {})) == config


plain = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_any_table_survives_toml(table):
    assert tomllib.loads(as_toml({"group": table})) == {"group": table}


def test_words_say_what_a_file_says():
    words = [
        "model.layers=4",
        "optimizer.rate=3e-4",
        "optimizer.name=lion",
        'keep.prompt="a b"',
        "data.paths=['x']",
    ]
    assert from_words(words) == {
        "model": {"layers": 4},
        "optimizer": {"rate": 3e-4, "name": "lion"},
        "keep": {"prompt": "a b"},
        "data": {"paths": ["x"]},
    }


def test_what_is_between_brackets_with_equals_signs_may_be_text():
    assert from_words(["data.paths=[lang=en/a.txt,lang=de/b.txt]"])["data"]["paths"] == [
        "lang=en/a.txt",
        "lang=de/b.txt",
    ]


def test_a_table_is_toml_or_told():
    mixer = [{"kind": "Convolution", "taps": 4}, "Softmax"]
    assert from_words(['model.mixer=[{kind="Convolution",taps=4},"Softmax"]']) == {"model": {"mixer": mixer}}
    for table in ('[{kind="Convolution",taps=4},Softmax]', "{kind=Softmax}"):
        with pytest.raises(
            ValueError, match=r"^model.mixer is .* is not TOML; a table .* \{kind = \"Convolution\", taps = 4\}"
        ):
            from_words([f"model.mixer={table}"])


def test_a_list_may_have_bare_words_whose_quotes_a_shell_took():
    words = [
        "data.columns=[temp, wind speed]",
        "model.mixer=[Mamba,Softmax]",
        "keep.prompt=[CLS]",
        "task.x=[1,two,]",
    ]
    assert from_words(words) == {
        "data": {"columns": ["temp", "wind speed"]},
        "model": {"mixer": ["Mamba", "Softmax"]},
        "keep": {"prompt": "[CLS]"},
        "task": {"x": [1, "two"]},
    }


def test_what_is_laid_over_replaces_field_by_field_and_a_task_with_its_settings():
    below = {"model": {"layers": 1, "width": 8}, "task": {"name": "copy", "span": 3}}
    above = {"model": {"layers": 2}, "task": {"name": "recall"}}
    assert laid_over(below, above) == {"model": {"layers": 2, "width": 8}, "task": {"name": "recall"}}


def test_a_number_that_is_said_takes_the_place_of_its_sweep_below():
    below = {"sweep": {"optimizer.rate": [1e-3, 1e-2], "objective.z_loss": [0.0, 0.1]}}
    said = laid_over(below, {"optimizer": {"rate": 0.5}})
    assert said == {"optimizer": {"rate": 0.5}, "sweep": {"objective.z_loss": [0.0, 0.1]}}
    again = laid_over(below, {"optimizer": {"rate": 0.5}, "sweep": {"optimizer.rate": [1.0, 2.0]}})
    assert again["sweep"] == {"optimizer.rate": [1.0, 2.0], "objective.z_loss": [0.0, 0.1]}


def test_a_file_may_start_from_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "copy"\n[training]\nsteps = 7\n', "utf-8-sig")  # as some editors write it
    tables = tables_of("", file, {})
    assert tables["training"] == {**read_preset("copy")["training"], "steps": 7}
    assert tables["task"] == read_preset("copy")["task"]


def test_a_sweep_is_even_in_the_logarithm():
    assert sweep_from(["lr=1e-4:1e-2:3", "optimizer.weight_decay=0,0.1"]) == {
        "optimizer.rate": (1e-4, 1e-3, 1e-2),
        "optimizer.weight_decay": (0.0, 0.1),
    }


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ({"name": "adam", "weight_decay": 0.5}, ["weight_decay"]),
        (
            {"name": "adamw", "weight_decay": 0.5, "stochastic": True, "second": "block_de0"},
            ["stochastic", "second"],
        ),
        ({"name": "adamw_8bit", "stochastic": True, "signed_scale": True}, []),
        ({"name": "adamw_4bit", "second": "block_de0"}, []),
        ({"name": "sgd", "momentum": 0.5, "muon_rate": 1.0}, ["muon_rate"]),
        ({"name": "adam"}, []),
    ],
)
def test_what_an_optimizer_does_not_read_is_known(optimizer, names):
    assert unread(as_config({"optimizer": optimizer}).optimizer) == names


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"optimiser": {}}, "did you mean optimizer"),
        ({"optimizer": {"rat": 1.0}}, "did you mean rate"),
        ({"training": {"length": 64}}, "no training.length .did you mean model.length"),
        ({"optimizer": {"steps": 64}}, "did you mean training.steps"),
        ({"objective": {"name": "masked_token"}}, "there is no objective.name; objective has kind"),
        ({"optimizer": {"name": "adamx"}}, "did you mean adam"),
        ({"optimizer": {"rate": "fast"}}, "optimizer.rate is 'fast'; it must be a number"),
        ({"optimizer": {"rate": -1.0}}, "optimizer.rate is -1.0; it must be at least 0"),
        ({"optimizer": {"rate": float("nan")}}, "optimizer.rate is nan"),
        ({"optimizer": {"momentum": 1.0}}, "momentum is 1.0"),
        ({"training": {"steps": 1.5}}, "training.steps is 1.5; it must be a whole number"),
        ({"training": {"steps": True}}, "it must be a whole number"),
        ({"training": {"batch": 10, "accumulate": 3}}, "3 parts"),
        ({"training": 3}, "training is 3; it must be a table"),
        ({"objective": {"dropout": 1.0}}, "dropout is 1.0"),
        ({"objective": {"mask_share": 0.0}}, "objective.mask_share is 0; it must be above 0"),
        (
            {"task": {"name": "copy"}, "data": {"paths": ["x"]}},
            r"both task.name=copy and data.paths \(--",
        ),
        ({"mesh": {"data": 0}}, "mesh.data is 0; it must be at least 1"),
        ({"keep": {"last": 0}}, "keep.last is 0"),
        ({"sweep": {"model.width": [1.0]}}, "'model.width' cannot be swept"),
        ({"sweep": {"optimizer.momentum": [0.5, 1.5]}}, "sweep.optimizer.momentum is 1.5; it must be at least 0"),
        ({"sweep": {"optimizer.rate": []}}, "sweep.optimizer.rate has no values"),
        ({"sweep": {"optimizer.rate": [1e-3, 1e-3]}}, "sweep.optimizer.rate would train equal models"),
    ],
)
def test_what_cannot_be_is_told_by_name(tables, told):
    with pytest.raises(ValueError, match=told):
        as_config(tables)


def test_a_sentence_that_names_no_setting_is_of_the_whole_group():
    assert told_of("model", ValueError("layers is 0"), {"layers"}) == "model.layers is 0"
    assert told_of("model", ValueError("5 heads do not"), {"layers"}) == "model: 5 heads do not"


@pytest.mark.parametrize("word", ["rate", "rate=1", "=3", "optimizer.=1", ".rate=1"])
def test_a_word_of_another_form_is_refused(word):
    with pytest.raises(ValueError, match="group.field=value"):
        from_words([word])


def test_what_is_swept_twice_is_refused():
    with pytest.raises(ValueError, match="optimizer.rate is swept twice"):
        sweep_from(["lr=1e-3", "optimizer.rate=1e-4"])


@pytest.mark.parametrize("word", ["lr=1:2", "lr=0:1:3", "lr=1:2:1", "lr=x", "lr="])
def test_a_sweep_of_another_form_is_refused(word):
    with pytest.raises(ValueError, match="is no sweep"):
        sweep_from([word])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.toml cannot be read: No such file"):
        tables_of("", tmp_path / "nowhere.toml", {})
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"broken.toml is not TOML"):
        tables_of("", broken, {})
    with pytest.raises(ValueError, match=r"no preset 'copi' \(did you mean copy\?\)"):
        read_preset("copi")


@pytest.mark.parametrize(
    "kind", [TrainingSettings, ObjectiveSettings, OptimizerSettings, KeepSettings, MeshSettings, TrainConfig]
)
def test_every_field_has_a_default(kind):
    assert all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(kind)
    )
