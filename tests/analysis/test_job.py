import random

import pytest

from minitf.analysis.claims import claim
from minitf.analysis.run_folder import Problem
from minitf.analysis.scan_snap import job
from minitf.analysis.scan_snap.job import ScanSnapConfig


def some_claim(id="scan_snap.T1", value=0.5):
    return claim(id, "s", source="s", statistic="s", value=value, direction="<", threshold=1.0)


def never(*arguments):
    raise AssertionError("the text was prepared")


@pytest.fixture
def words(tmp_path):
    """A file with enough text for every window."""
    chosen = random.Random(0)
    file = tmp_path / "words.txt"
    vocabulary = ["the", "cat", "sees", "a", "dog", "house", "and", "never", "finds", "it"]
    file.write_text("\n\n".join(" ".join(chosen.choices(vocabulary, k=40)) + "." for _ in range(200)))
    return file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "length is 1; it must be at least 2"),
        ({"length": -5}, "length is -5; it must be at least 2"),
        ({"vocabulary": 0}, "vocabulary is 0; .* at least the 256 bytes"),
        ({"vocabulary": 255}, "vocabulary is 255; .* at least the 256 bytes"),
        ({"text_rate": -1.0}, "text_rate is -1.0; .* finite number of at least 0"),
        ({"text_rate": float("nan")}, "text_rate is nan; .* finite number of at least 0"),
        ({"text_rate": float("inf")}, "text_rate is inf; .* finite number of at least 0"),
        ({"decoder_rate": -0.5, "attention_rate": 1.0}, "decoder_rate is -0.5"),
        ({"decoder_rate": 1.0, "attention_rate": float("nan")}, "attention_rate is nan"),
        ({"decoder_rate": 1.0}, "both --decoder-rate and --attention-rate"),
        ({"attention_rate": 1.0}, "both --decoder-rate and --attention-rate"),
        ({"quick": True, "full": True}, "--quick and --full exclude each other"),
        ({"text_steps": 0}, "text_steps is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must lie between 0 and"),
        ({"seed": 2**31 - 1}, "seed is 2147483647; it must lie between 0 and"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_value(settings, message):
    with pytest.raises(ValueError, match=message):
        ScanSnapConfig(**settings)


def test_the_largest_seed_still_has_seeds_after_it():
    config = ScanSnapConfig(seed=job.LARGEST_SEED)
    assert job.synthetic.seed_keys(config.seed, max(job.SMALL_SEEDS, job.MEDIUM_SEEDS)).shape == (16,)


def test_a_pair_of_rates_joins_those_of_the_paper():
    own = ScanSnapConfig(decoder_rate=2.0, attention_rate=0.5).settings
    assert own[:-1] == ScanSnapConfig().settings
    assert (own[-1].optimizer, own[-1].decoder_rate, own[-1].attention_rate) == ("sgd", 2.0, 0.5)


def test_training_on_text_is_shorter_when_quick_and_as_long_as_asked():
    assert ScanSnapConfig().text_lengths == {"sgd": 1500, "adam": 1000}
    assert ScanSnapConfig(quick=True).text_lengths == {"sgd": 400, "adam": 400}
    assert ScanSnapConfig(quick=True, text_steps=7).text_lengths == {"sgd": 7, "adam": 7}


def test_claims_come_in_the_order_of_the_papers():
    ordered = ["scan_snap.T1", "scan_snap.T2", "scan_snap.T2_adam", "scan_snap.T10", "scan_snap.T10b"]
    ordered += ["scan_snap.T22", "scan_snap.fig3_order", "scan_snap.text_sparse", "joma.fig2", "joma.theorem2"]
    mixed = [some_claim(id) for id in random.Random(0).sample(ordered, len(ordered))]
    assert [c.id for c in sorted(mixed, key=job._claim_order)] == ordered


def test_too_little_text_is_told_before_anything_is_trained_or_made(tmp_path):
    (tmp_path / "short.txt").write_text("Just a few words.\n\nAnd a few more of them.\n")
    with pytest.raises(Problem, match="too short: it has .* tokens"):
        job.run(ScanSnapConfig(text=(str(tmp_path / "short.txt"),), vocabulary=260), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_refused_folder_is_told_before_the_text_is_prepared(tmp_path, words, monkeypatch):
    monkeypatch.setattr(job.text_runs, "prepare", never)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(Problem, match="holds no run"):
        job.run(ScanSnapConfig(text=(str(words),)), tmp_path / "out", quiet=True)


def test_a_run_does_not_go_on_with_a_text_that_changed(tmp_path, words, monkeypatch):
    monkeypatch.setattr(job, "_stages", lambda *arguments: [])
    config = ScanSnapConfig(text=(str(words),), vocabulary=300)
    job.run(config, tmp_path / "out", quiet=True)
    job.run(config, tmp_path / "out", resume=True, quiet=True)
    words.write_text(words.read_text().replace("cat", "cow"))
    with pytest.raises(Problem, match=r"other settings \(text_sha256 was"):
        job.run(config, tmp_path / "out", resume=True, quiet=True)


def test_a_full_disk_is_told_and_how_to_go_on(tmp_path, words, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "claims.json")

    monkeypatch.setattr(job, "_stages", full)
    config = ScanSnapConfig(text=(str(words),), vocabulary=300)
    with pytest.raises(Problem, match=r"could not be written to .*No space left on device.*--resume"):
        job.run(config, tmp_path / "out", quiet=True)
