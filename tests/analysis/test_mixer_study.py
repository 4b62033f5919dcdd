import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf import walk
from minitf.analysis import association
from minitf.analysis.claims import as_json
from minitf.analysis.mixer_study import cell as cells_of
from minitf.analysis.mixer_study import claims, job, page, tasks
from minitf.analysis.mixer_study.cell import Cell, train_cell
from minitf.analysis.mixer_study.replaced import Replaced, replace_all
from minitf.analysis.mixer_study.rows import BLIND, LAYERS, QUICK, ROWS, WIDTH, model_for, possible
from minitf.analysis.mixer_study.tasks import NO_RECALL
from minitf.analysis.page_parts import claim_rows
from minitf.analysis.run_folder import Problem
from minitf.declaration import count, initialize
from minitf.edits import set_to
from minitf.train.corpus import Corpus

FACTS = tasks.memorisation(facts=16, symbols=8, length=4)
RECALL = tasks.recall(2, 5)
CORPUS = Corpus(name="letters", train=("abcdefgh" * 60,), validation=("hgfedcba" * 60,), source="made up")
TEXT = dataclasses.replace(FACTS, name="text", measure="bits")
STEPS = 4
RATES = [1e-5, 1e-2]


@pytest.fixture(scope="module")
def trained():
    """Softmax attention and a plain average, trained for a moment."""
    common = {"seeds": 2, "rates": [1e-3, 3e-3], "steps": STEPS}
    return {row: train_cell(row, FACTS, **common) for row in ("softmax", "uniform")}


def cell(row="softmax", task="text", values=(1.0, 1.0), **changes):
    """A cell as if it had been trained; a value for each seed."""
    some = np.asarray(values, np.float64)
    return Cell(
        **{
            "row": row,
            "task": task,
            "parameters": 10,
            "hidden": 4,
            "flops": 1.0,
            "softmax_flops": 1.0,
            "rates": np.array([0.1]),
            "best": 0,
            "steps": 2,
            "matched_steps": 2.0,
            "record_steps": np.array([0, 2]),
            "values": np.stack([some + 1, some], axis=-1)[None],
            "seconds_per_step": 1.0,
            "temporary_bytes": 1,
            "geometry": np.zeros((5, len(some), 4)),
            "data_dependence": np.zeros((len(some), 2)),
            "association": np.zeros((2, 1, 3, 3)),
        }
        | changes
    )


def all_cells(values):
    """Every row and task that claims read; ``values`` by row and task, or by task."""
    found = {}
    for row in ROWS:
        for task in job.TASKS:
            value = values.get((row, task), values[task])
            found[row, task] = cell(row, task, np.array([value - 0.001, value, value + 0.001]))
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_as_large_as_softmax_attention(row):
    for task in (FACTS, RECALL):
        if possible(row, task):
            aim = count(model_for("softmax", task))
            assert abs(count(model_for(row, task)) - aim) <= LAYERS * WIDTH
            assert model_for(row, task).hidden > 40


def test_mixers_that_see_all_positions_are_left_out_where_later_tokens_tell_the_answers():
    assert possible("FNet", FACTS) and not possible("FNet", RECALL) and possible("MLP-Mixer", RECALL)
    assert possible("Mamba", RECALL)


def test_a_value_between_two_records_lies_on_the_line():
    one = cell(values=(3.0, 5.0), matched_steps=0.5)
    np.testing.assert_allclose(one.final, [3, 5])
    np.testing.assert_allclose(one.at_equal_compute, [3.75, 5.75])


def test_the_best_rate_is_the_one_with_the_best_mean_and_never_one_that_diverged():
    values = np.array([[0.1, 0.2], [0.9, np.nan], [0.3, 0.3]])
    assert cells_of.best_rate(values, FACTS) == 2
    assert cells_of.best_rate(values, TEXT) == 0


def test_data_dependence_is_none_for_constants_and_all_for_what_has_no_mean():
    constant = jnp.broadcast_to(jnp.eye(5), (2, 8, 3, 5, 5))
    np.testing.assert_allclose(cells_of.data_dependence(constant), 0, atol=1e-6)
    independent = jax.random.normal(jax.random.key(0), (2, 64, 3, 12, 12))
    np.testing.assert_allclose(cells_of.data_dependence(independent), 1, atol=0.02)


def test_a_cell_has_the_curve_of_each_seed_and_rate_and_looks_at_the_trained_models(trained):
    found, parameters = trained["softmax"]
    assert found.record_steps.tolist() == list(range(STEPS + 1))
    assert found.values.shape == (2, 2, STEPS + 1)
    config = model_for("softmax", FACTS)
    for seed in range(2):
        fresh = initialize(config, jax.random.fold_in(jax.random.key(seed), 0))
        score = FACTS.score(walk(fresh, FACTS.held_out.tokens, config).logits, FACTS.held_out)
        np.testing.assert_allclose(found.values[:, seed, 0], score.accuracy, atol=1e-6)
        last = jax.tree.map(lambda x: x[seed], parameters)  # noqa: B023
        walked = walk(last, FACTS.held_out.tokens, config)
        np.testing.assert_allclose(
            found.final[seed], FACTS.score(walked.logits, FACTS.held_out).accuracy, atol=1e-6
        )
        np.testing.assert_allclose(
            found.data_dependence[seed], cells_of.data_dependence(walked.layers.pattern), atol=1e-5
        )
    np.testing.assert_allclose(found.association.sum(axis=-1), 1, atol=1e-5)
    assert np.isnan(found.geometry[1, :, -1]).all() and np.isfinite(found.geometry[0]).all()


def test_the_rate_is_chosen_on_sequences_that_nothing_is_measured_on():
    batch = FACTS.held_out
    # What must not be told well: answers that the facts do not have.
    wrong = tasks.Batch(batch.tokens, jnp.where(batch.targets >= 0, 7 - batch.targets, -1))
    found = {}
    for name, one in (("right", batch), ("wrong", wrong)):
        task = dataclasses.replace(FACTS, measure="bits", choosing=one)
        found[name], _ = train_cell("uniform", task, seeds=1, rates=RATES, steps=60)
    assert (found["right"].best, found["wrong"].best) == (1, 0)
    np.testing.assert_array_equal(found["right"].values, found["wrong"].values)


def test_a_row_whose_layers_differ_is_looked_at_layer_by_layer():
    found, _ = train_cell("softmax, then nothing", FACTS, seeds=2, rates=[1e-3], steps=2)
    first, second = found.association
    np.testing.assert_allclose(first.sum(axis=-1), 1, atol=1e-5)
    # Nothing is mixed: each channel of a position is multiplied by a number of its own.
    assert np.all(second[:, ~np.eye(FACTS.length, dtype=bool)] == 0) and np.any(second != 0)
    assert np.all(found.data_dependence[:, 0] > 0) and np.allclose(found.data_dependence[:, 1], 0, atol=1e-5)


def test_a_cheaper_mixer_trains_on_until_it_has_spent_as_much(trained):
    found = trained["uniform"][0]
    assert found.parameters == pytest.approx(trained["softmax"][0].parameters, rel=0.01)
    assert found.matched_steps == pytest.approx(STEPS * found.softmax_flops / found.flops)
    assert found.flops == pytest.approx(found.softmax_flops, rel=0.3)
    assert found.record_steps[-1] == max(STEPS, round(found.matched_steps)) and STEPS in found.record_steps


@pytest.fixture(scope="module")
def replaced(trained):
    return replace_all(trained["softmax"][1], model_for("softmax", FACTS), FACTS)


def test_replacing_no_head_changes_nothing_and_all_heads_is_one_edit(trained, replaced):
    config, parameters = model_for("softmax", FACTS), trained["softmax"][1]
    for order in replaced.orders:
        for name in replaced.names:
            np.testing.assert_allclose(replaced.at(name, order, 0.0), replaced.intact, atol=1e-6)
    one = jax.tree.map(lambda x: x[1], parameters)
    batch = FACTS.held_out
    intact = walk(one, batch.tokens, config)
    uniform = association.uniform(intact, intact, config, jax.random.key(0))
    edit = set_to(intact, "layers.pattern", uniform)
    expected = FACTS.score(walk(one, batch.tokens, config, edit=edit).logits, batch).accuracy
    assert replaced.at("uniform", replaced.orders[0], 1.0)[1] == pytest.approx(float(expected))
    assert replaced.heads.shape == (len(replaced.names), 2, config.layers, config.heads)


AS_PUBLISHED = {
    "text": 2.0,
    "classification": 0.9,
    "recall": 1.0,
    "addition": 1.0,
    "memorisation": 1.0,
    ("synthesizer, fixed", "text"): 2.2,
    ("synthesizer, trained", "text"): 2.1,
    ("uniform", "text"): 2.4,
    ("nothing", "text"): 3.0,
    ("AFT simple", "text"): 2.05,
    ("linear attention", "text"): 2.1,
    ("synthesizer, dense", "text"): 2.2,
    ("softmax, fixed query and key", "text"): 2.1,
    ("synthesizer, fixed", "recall"): 0.2,
    ("nothing", "classification"): 0.6,
}


def constant(task, intact, half, every):
    values = np.full((1, 1, 5, 3), intact)
    values[:, :, 2], values[:, :, 4] = half, every
    return Replaced(
        task=task,
        names=("mean over data",),
        orders=("least important first",),
        fractions=np.array(association.FRACTIONS),
        intact=np.full(3, intact),
        values=values,
        heads=np.zeros((1, 3, 2, 4)),
    )


def known(values=AS_PUBLISHED, half=0.89, every=0.85, recall=0.2, text=2.2, intact=0.9):
    replaced = {
        "text": constant("text", 2.0, 2.05, text),
        "classification": constant("classification", intact, half, every),
        "recall": constant("recall", 1.0, 0.9, recall),
    }
    every_task = {task.name: task for task in (FACTS, RECALL, tasks.addition())}
    every_task |= {"classification": FACTS, "text": FACTS}
    named = {name: dataclasses.replace(task, name=name) for name, task in every_task.items()}
    return {one.id: one for one in claims.claims(all_cells(values), replaced, named)}


def test_every_claim_holds_where_everything_is_as_published():
    found = known()
    assert len(found) == 18
    assert [name for name, one in found.items() if not one.holds] == []
    assert all(one.n == 3 and one.ci95 is not None and one.source for one in found.values())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trained_beats_fixed", {"values": AS_PUBLISHED | {("synthesizer, fixed", "text"): 2.05}}),
        ("trained_near_softmax", {"values": AS_PUBLISHED | {("synthesizer, trained", "text"): 2.4}}),
        ("uniform_share", {"values": AS_PUBLISHED | {("uniform", "text"): 2.01}}),
        ("fixed_pairs_text", {"values": AS_PUBLISHED | {("softmax, fixed query and key", "text"): 2.3}}),
        ("softmax_first", {"values": AS_PUBLISHED | {("linear attention", "text"): 1.9}}),
        ("attention_in_half_of_the_layers", {"values": AS_PUBLISHED | {("softmax, then nothing", "text"): 2.1}}),
        ("gmlp_parity", {"values": AS_PUBLISHED | {("gMLP", "text"): 2.2}}),
        ("fixed_addition", {"values": AS_PUBLISHED | {("synthesizer, fixed", "addition"): 0.8}}),
        ("fixed_memorisation", {"values": AS_PUBLISHED | {("synthesizer, fixed", "memorisation"): 0.8}}),
        ("fixed_recall", {"values": AS_PUBLISHED | {("synthesizer, fixed", "recall"): 0.95}}),
        ("fixed_pairs_recall", {"values": AS_PUBLISHED | {("softmax, fixed query and key", "recall"): 0.6}}),
        ("fnet", {"values": AS_PUBLISHED | {("FNet", "classification"): 0.7}}),
        ("uniform_classification", {"values": AS_PUBLISHED | {("uniform", "classification"): 0.7}}),
        ("uniform_gain_classification", {"values": AS_PUBLISHED | {("uniform", "classification"): 0.7}}),
        ("constant_classification", {"every": 0.6}),
        ("half_constant_classification", {"half": 0.8}),
        ("constant_recall", {"recall": 0.85}),
        ("constant_text", {"text": 2.02}),
    ],
)
def test_each_claim_fails_where_its_numbers_do(name, change):
    assert not known(**change)[f"mixers.{name}"].holds


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("less", [0.0, 0.2])
def test_models_that_have_learned_nothing_hold_no_claim_of_shares(less):
    """Or less than nothing: of a recall below that without keys, a text worse than without context."""
    found = known(
        {**dict.fromkeys(job.TASKS, 0.0), "text": 3.0, "recall": RECALL.references[NO_RECALL] - less}
        | ({(row, "text"): 3.0 + less for row in ("softmax", "softmax, fixed query and key")} if less else {}),
        intact=0.0,
    )
    shares = ("constant_classification", "half_constant_classification")
    shares += ("uniform_share", "fixed_pairs_recall", "fnet", "uniform_classification")
    assert not any(found[f"mixers.{name}"].holds for name in shares)
    assert "null" in as_json(found.values())
    shown = claim_rows([found["mixers.constant_classification"]])[0]
    assert (shown["value"], shown["verdict"]) == ("no number", "cannot be told")


def test_only_what_ran_is_claimed():
    some = {key: one for key, one in all_cells(AS_PUBLISHED).items() if key[0] in ("softmax", "uniform")}
    found = claims.claims(some, {}, {"classification": FACTS})
    assert [one.id for one in found] == ["mixers.uniform_classification"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ("softmax", "nonsense")}, "there is no mixer 'nonsense'; choose from: softmax; "),
        ({"tasks": ("text", "poetry")}, "there is no task 'poetry'; choose from: text; "),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_what_cannot_be_run_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        job.StudyConfig(**changes)


def test_a_mixer_that_sees_the_answers_is_told_and_refused_where_it_can_do_nothing():
    every, said = {"recall": RECALL, "memorisation": FACTS}, []
    job._check_possible(job.StudyConfig(mixers=("all",), tasks=("recall",)), every, said.append)
    assert said == []
    job._check_possible(job.StudyConfig(mixers=("FNet",), tasks=("recall", "memorisation")), every, said.append)
    assert said == ["FNet sees later tokens, and so the answers of recall: it is not trained on that"]
    with pytest.raises(Problem, match=r"^FNet sees later tokens, .* of recall: choose other tasks for it"):
        job._check_possible(job.StudyConfig(mixers=("FNet",), tasks=("recall",)), every, said.append)


def test_presets_are_a_few_rows_or_all_and_softmax_attention_is_always_there():
    assert job.StudyConfig().rows == QUICK and job.StudyConfig(full=True).rows == tuple(ROWS)
    assert job.StudyConfig(mixers=("Mamba",)).rows == ("softmax", "Mamba")
    assert job.StudyConfig(mixers=("all",)).rows == tuple(ROWS)
    assert (job.StudyConfig().seed_count, job.StudyConfig(full=True).seed_count) == (3, 5)


@pytest.fixture
def small(monkeypatch):
    """The job with one small task, and a text that needs no reading."""
    monkeypatch.setattr(job.corpus, "python_documentation", lambda: CORPUS)
    every = {name: dataclasses.replace(FACTS, name=name) for name in job.TASKS}
    monkeypatch.setattr(job.study_tasks, "every_task", lambda texts: every)
    return job.StudyConfig(mixers=("uniform",), tasks=("memorisation",), seeds=2, steps=STEPS)


def test_a_folder_that_cannot_be_used_is_told_before_any_task_is_made(small, tmp_path, monkeypatch):
    monkeypatch.setattr(job.study_tasks, "every_task", lambda texts: pytest.fail("tasks were made"))
    (tmp_path / "else.txt").write_text("mine")
    with pytest.raises(Problem):
        job.run(small, tmp_path, quiet=True)
    assert [one.name for one in tmp_path.iterdir()] == ["else.txt"]


def test_a_run_leaves_its_files_and_goes_on_where_it_was_interrupted(small, tmp_path, monkeypatch):
    train = job.train_cell

    def interrupted(row, task, **settings):
        if row == "uniform":
            raise KeyboardInterrupt
        return train(row, task, **settings)

    monkeypatch.setattr(job, "train_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.run(small, tmp_path / "run", quiet=True)
    monkeypatch.setattr(job, "train_cell", train)
    with pytest.raises(Problem, match="--resume"):
        job.run(small, tmp_path / "run", quiet=True)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "arrays").iterdir()}
    stems = sorted(name.split(".")[0] for name in kept)
    assert stems == 2 * ["memorisation_replaced"] + 2 * ["memorisation_softmax"]
    job.run(small, tmp_path / "run", resume=True, quiet=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *("arrays", "claims.json", "config.json", "mixers.json", "report.html")
    }
    for name, time in kept.items():
        assert (tmp_path / "run" / "arrays" / name).stat().st_mtime_ns == time
    found = json.loads((tmp_path / "run" / "mixers.json").read_text())
    assert set(found["cells"]["memorisation"]) == {"softmax", "uniform"}
    assert found["cells"]["memorisation"]["softmax"]["flops"] == 1


def test_a_finished_run_takes_more_rows_and_tasks_and_shows_all_that_it_has(
    small, trained, replaced, tmp_path, monkeypatch
):
    made = []

    def train(row, task, **settings):
        made.append((row, task.name))
        cell, parameters = trained["softmax" if row == "softmax" else "uniform"]
        return dataclasses.replace(cell, row=row, task=task.name), parameters

    monkeypatch.setattr(job, "train_cell", train)
    monkeypatch.setattr(job, "replace_all", lambda parameters, config, task, *_, **__: replaced)
    job.run(small, tmp_path / "run", quiet=True)
    assert sorted(made) == [("softmax", "memorisation"), ("uniform", "memorisation")]
    more = dataclasses.replace(small, mixers=("nothing",), tasks=("addition",))
    with pytest.raises(Problem, match=r"other settings \(seeds was 2 and is 3\)"):
        job.run(dataclasses.replace(more, seeds=3), tmp_path / "run", resume=True, quiet=True)
    job.run(more, tmp_path / "run", resume=True, quiet=True)
    assert sorted(made[2:]) == [("nothing", "addition"), ("softmax", "addition")]
    found = json.loads((tmp_path / "run" / "mixers.json").read_text())
    shown = {task: set(cells) for task, cells in found["cells"].items()}
    assert shown == {"memorisation": {"softmax", "uniform"}, "addition": {"softmax", "nothing"}}
    assert found["rows"] == [row for row in ROWS if row in ("softmax", "uniform", "nothing")]


def test_rows_are_blind_whose_association_is_of_places_alone():
    for row in ROWS:
        config = model_for(row, FACTS)
        mixed = ROWS[row] if isinstance(ROWS[row], tuple) else (ROWS[row],)
        alone = not any(one.about(config).provenance for one in mixed) and row not in ("nothing", "gMLP")
        assert (row in BLIND) == alone, row


def test_the_conclusion_names_the_best_mixer_that_is_blind():
    some = {key: one for key, one in all_cells(AS_PUBLISHED).items() if key[1] in ("text", "recall")}
    some["convolution", "recall"] = cell("convolution", "recall", (0.4, 0.4))
    for row in BLIND - {"convolution"}:
        some[row, "recall"] = cell(row, "recall", (0.3, 0.3))
    named = {name: dataclasses.replace(task, name=name) for name, task in (("text", TEXT), ("recall", RECALL))}
    told = page.conclusion(page.results(tuple(ROWS), some, {}, named))
    assert "; recall 100%, and 40% (convolution)." in told and "text 2.00 bits, and 2.00 bits" in told


def test_bytes_that_are_no_letters_are_spelled():
    text = dataclasses.replace(FACTS, name="text", held_out=tasks.Batch(jnp.array([[65, 10, 60, 200]]), None))
    assert page.symbols(text) == ["A", "\\x0a", "<", "\\xc8"]
    assert page.symbols(FACTS) == [str(token) for token in np.asarray(FACTS.held_out.tokens[0])]


def test_without_looking_at_keys_answers_are_values_that_are_left():
    """What is measured of models that recall nothing: the value shown most often and answered least."""
    task = tasks.recall(pairs=6, keys=16)
    tokens = np.asarray(task.held_out.tokens)
    right = []
    for row in tokens:
        shown, answers = list(row[1:12:2]), list(row[13::2])
        for answer in answers:
            counts = {value: shown.count(value) for value in shown}
            best = max(counts.values())
            right.append(np.mean([value == answer for value, count in counts.items() if count == best]))
            shown.remove(answer)
    assert task.references[NO_RECALL] == pytest.approx(np.mean(right), abs=0.03)
    assert task.references[NO_RECALL] > 2 * task.references["chance among the values present"]


def test_seeds_that_jax_has_no_room_for_are_told():
    with pytest.raises(ValueError, match="seed is 3000000000; it must be at least 0, and below"):
        job.StudyConfig(seed=3_000_000_000)
    with pytest.raises(ValueError, match="seeds is 5000; it must be at most 1000"):
        job.StudyConfig(seeds=5000)
