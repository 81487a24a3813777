"tools/fair.py and tools/race.py: equal work, a queue that goes on, a table of records."
import importlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from minikl.ingredients import INGREDIENTS, REFERENCE, Entry
from minikl.learner import Learner
from minikl.model import MiniKL

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 16, "num_heads": 2, "num_kv_heads": 2, "num_layers": 1}
fair = importlib.import_module("fair")
race = importlib.import_module("race")


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


# ---- equal work


@pytest.fixture
def small(monkeypatch):
    "A race of small models: of each entry, and of the reference beside it."
    monkeypatch.setattr(fair, "REFERENCE", Entry("small", REFERENCE.options | SMALL))
    monkeypatch.setattr(fair, "TURNS", 3)


class Twice(Learner):
    "Every step is done twice, so it costs twice as much."
    def step(self, documents, step, done):
        super().step(documents, step, done)
        return super().step(documents, step, done)


class TwiceLater(Learner):
    "In the second half of the run only."
    def step(self, documents, step, done):
        if done > 0.5:
            super().step(documents, step, done)
        return super().step(documents, step, done)


class Prepared(Learner):
    "Thinks for a second before it begins."
    def __init__(self, *arguments):
        end = time.process_time() + 1
        while time.process_time() < end:
            sum(range(1000))
        super().__init__(*arguments)


COSTS = {Twice: 2, TwiceLater: 1.5, Prepared: 1}


@pytest.mark.parametrize("learner", COSTS)
def test_a_ratio_is_what_a_step_costs(small, learner):
    "Of the whole run, also where the cost changes on the way."
    found = fair.compare_speed(Entry("", {}, learner), "toy", 1000)
    assert found["ratio"] == pytest.approx(COSTS[learner], rel=0.2)
    left = (1000 - found["start"]) / found["ratio"]
    assert found["steps"] == pytest.approx(left, abs=1)
    assert (found["start"] > 20) == (learner is Prepared)


def test_half_a_batch_costs_half(small):
    "The same documents in more steps, so there are more of them."
    found = fair.compare_speed(Entry("", {"batch_size": 16}), "toy", 100)
    assert 0.4 < found["ratio"] < 0.85
    assert found["steps"] > 110


def test_the_reference_has_as_many_steps_as_there_is_work(small):
    found = fair.compare_speed(Entry("the same"), "toy", 50)
    assert (found["ratio"], found["steps"], found["start"]) == (1, 50, 0)
    assert found["turns"] != [1, 1, 1]   # measured all the same


def test_a_seed_decides_what_a_run_gives(small):
    first, again, other = (fair.train(Entry(""), "toy", seed, 5) for seed in (0, 0, 1))
    assert first == again
    assert first["bits"] != other["bits"]
    assert 0.5 < first["bits"] < 12


def test_a_run_is_a_run_of_train(small, tmp_path):
    "Equal to the last digit that is kept to what train.py makes of the same options."
    from minikl.options import parse_options
    from minikl.parallel import Ranks
    from minikl.trainer import Run

    chosen = fair.REFERENCE.options | {"corpus": "toy", "max_steps": 5, "seed": 1}
    chosen |= {"threads": 1, "device": "cpu", "out_dir": tmp_path}
    chosen |= {"first_weights": "bigrams"}
    options = parse_options([f"--{name}={value}" for name, value in chosen.items()])
    Run(options, Ranks(1)).work()
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    found = fair.train(Entry("", {"first_weights": "bigrams"}), "toy", 1, 5)
    assert found["bits"] == pytest.approx(run["bits_per_char"]["MiniKL"], abs=1e-4)


class Wider(MiniKL):
    "A table more, and a norm that begins with 2."
    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.d_model)
        self.norm.weight.data.fill_(2)


class WiderLearner(Learner):
    model_class = Wider


def test_another_model_begins_with_counts_too(small):
    "It takes over what the counts say, and keeps what is its own."
    counted = {"first_weights": "bigrams"}
    plain = fair.learner_of(Entry("", counted), "toy").model
    wider = fair.learner_of(Entry("", counted, WiderLearner), "toy").model
    assert wider.head.weight.equal(plain.head.weight)
    assert wider.embed.weight.equal(plain.embed.weight)
    assert not wider.blocks[0].state_dict()["ffn.w_down.weight"].any()
    assert (wider.norm.weight == 2).all()
    assert wider.table.weight.std() > 0.5


# ---- what is wrong with an entry

FAULTS = {   # a file: what is said about it
    "ENTRY = 3": "expected a line ENTRY = Entry(…) in it",
    "x = (": "line 1: this is no Python",
    "from minikl.ingredients import Entry\nENTRY = Entry('', {'seed': 3})":
        "the option 'seed' is not an entry's to choose",
    "from minikl.ingredients import Entry\nENTRY = Entry('', {'held_out': 0.5})":
        "the option 'held_out' is not an entry's to choose",
    "from minikl.ingredients import Entry\nENTRY = Entry('', {'lr': 'high'})":
        "argument --lr: invalid float value: 'high'",
    "from minikl.ingredients import Entry\nENTRY = Entry('', {'num_layers': 0})":
        "num_layers",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "entry.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        race.main(["run", str(path), "--corpus=toy", "--work=4"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert FAULTS[text] in said


MISTAKES = {
    "run none.py": "none.py: no such file",
    "run": "expected one file: race.py run ENTRY.py",
    "run a.py b.py": "expected one file",
    "record none.py --by=me": "needs --commit=HASH and --by=NAME",
    "measure nonsense": "nonsense: expected ENTRY.py or one of today's Llama",
    "measure --work=0": "--jobs and --work: expected 1 or more",
    "measure --seeds=9": "--seeds: invalid choice: 9",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit):
        race.main(arguments.split())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert MISTAKES[arguments] in said


# ---- the queue and the table, without a run


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Measurements that take no time: a dictionary, which a test may change.

    Its "calls" are what was asked for.
    """
    answers = {"ratio": 0.5, "steps": 600, "bits": [6.5, 6.6, 6.7], "calls": []}

    def pretend(source, *settings):
        answers["calls"].append((source, *settings))
        chosen = dict(text.removeprefix("--").split("=") for text in settings)
        if "seed" not in chosen:
            return {"ratio": answers["ratio"], "steps": answers["steps"], "turns": []}
        bits = answers["bits"][int(chosen["seed"])]
        return bits and {"bits": bits, "loss": 4.0, "parameters": 7}

    monkeypatch.setattr(race, "in_a_process", pretend)
    monkeypatch.setattr(race, "data_of", lambda entry, corpus: None)
    monkeypatch.setattr(race, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(race, "RUNS", tmp_path / "runs.json")
    monkeypatch.setattr(race, "RECORDS", tmp_path / "race.md")
    text = (ROOT / "data" / "race.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines(True) if not line.startswith("| ")]
    head = "| record | date | bits per character | steps | idea | commit | by |\n"
    table = "".join(rows).replace("|---", head + "|---", 1)
    race.RECORDS.write_text(table, encoding="utf-8")
    return answers


def test_a_queue_goes_on_where_it_was_interrupted(pretended, capsys):
    pretended["bits"] = [6.5, None, 6.7]   # one run ends in an error
    with pytest.raises(SystemExit):
        race.main(["measure", REFERENCE.idea, "NoPE layers"])
    said = capsys.readouterr()
    assert "not measured: today's Llama, NoPE layers" in said.err
    measured = json.loads(race.MEASURED.read_text(encoding="utf-8"))
    assert measured["entries"]["NoPE layers"]["bits"] == [6.5, None, 6.7]
    pretended.update(bits=[6.5, 6.6, 6.7], calls=[])
    race.main(["measure", REFERENCE.idea, "NoPE layers"])
    assert len(pretended["calls"]) == 2   # the two runs that were missing
    assert all("--seed=1" in call for call in pretended["calls"])
    found = json.loads(race.MEASURED.read_text(encoding="utf-8"))
    assert found["work"] == 300
    assert found["reference"] == REFERENCE.idea
    for name in (REFERENCE.idea, "NoPE layers"):
        entry = found["entries"][name]
        assert entry["bits"] == [6.5, 6.6, 6.7]
        assert (entry["steps"], entry["ratio"], entry["parameters"]) == (600, 0.5, 7)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "NoPE layers: ratio 0.5, 600 steps, 6.50 6.60 6.70 → 6.60 ± 0.25 bits per "
        "character; reference 6.60, 0.00 worse"
    )


def test_all_ingredients_are_measured(pretended):
    race.main(["measure", "--jobs=2"])
    found = json.loads(race.MEASURED.read_text(encoding="utf-8"))["entries"]
    assert set(found) == {REFERENCE.idea, *INGREDIENTS}
    assert len(pretended["calls"]) == 4 * len(found)
    race.main(["measure"])
    assert len(pretended["calls"]) == 4 * len(found)   # nothing is left to do


def test_other_options_are_no_longer_what_was_measured(pretended, monkeypatch, capsys):
    race.main(["measure", "NoPE layers"])
    entry = Entry("no positions", {"lr": 0.01})
    monkeypatch.setattr(race, "entry_of", lambda source: entry)
    with pytest.raises(SystemExit):
        race.main(["measure", "NoPE layers"])
    assert "NoPE layers was measured with other options" in capsys.readouterr().err


def test_a_race_of_other_length_has_its_own_file(pretended):
    race.main(["measure", "NoPE layers", "--work=5"])
    assert not race.MEASURED.exists()
    assert (race.MEASURED.parent / "poetry 5.json").exists()


def entry_file(folder, idea, decay="linear"):   # text: its path
    path = folder / "mine.py"
    entry = f"Entry({idea!r}, {{'decay': {decay!r}}})"
    text = f"from minikl.ingredients import Entry\nENTRY = {entry}\n"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_record_falls_where_the_whole_interval_is_below(pretended, tmp_path, capsys):
    enter = ["--commit=abc1234", "--by=Li"]
    pretended["bits"] = [7.0, 7.01, 7.02]
    race.main(["record", entry_file(tmp_path, "first"), *enter])
    pretended["bits"] = [6.99, 7.0, 7.005]   # a lower mean, but 7.017 at most
    second = entry_file(tmp_path, "second")
    with pytest.raises(SystemExit):
        race.main(["record", second, *enter])
    assert "no row was added" in capsys.readouterr().err
    pretended["bits"] = [6.89, 6.9, 6.91]
    third = entry_file(tmp_path, "third | idea")
    race.main(["run", third])
    assert "A new record: 6.929 at most, and the best so far is 7.01." in (
        capsys.readouterr().out
    )
    n_calls = len(pretended["calls"])
    race.main(["record", third, *enter])
    assert len(pretended["calls"]) == n_calls   # it was measured before
    rows = [row.split("|") for _, row in race.read_records()]
    assert [row[1].strip() for row in rows] == ["1", "2"]
    assert rows[1][3:8] == [
        " 6.900 ± 0.029 ", " 600 ", " third / idea ", " abc1234 ", " Li ",
    ]


def test_seeds_that_agree_are_not_enough_for_a_record(pretended, tmp_path, capsys):
    "The clock leaves 0.014 bits open; but the reference has 300 steps by definition."
    pretended["bits"] = [7.0, 7.0, 7.0]
    reference = entry_file(tmp_path, "first", "cosine")
    race.main(["record", reference, "--commit=abc1234", "--by=Li"])
    assert "| 7.000 ± 0.000 |" in race.RECORDS.read_text(encoding="utf-8")
    expected = {6.987: "No record: 7.001 at most", 6.985: "A new record: 6.999 at most"}
    for bits, said in expected.items():
        pretended["bits"] = [bits] * 3
        race.main(["run", entry_file(tmp_path, f"another {bits}")])
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--seeds=2", "--work=200", "--corpus=toy"])
def test_another_race_makes_no_record(pretended, tmp_path, option, capsys):
    race.main(["run", entry_file(tmp_path, "fast"), option])
    assert "this race is not that of the records" in capsys.readouterr().out


def test_what_is_measured_belongs_to_what_is_in_the_file(pretended, tmp_path):
    race.main(["run", entry_file(tmp_path, "one")])
    race.main(["run", entry_file(tmp_path, "another")])
    assert len(pretended["calls"]) == 8
    race.main(["run", entry_file(tmp_path, "one")])
    assert len(pretended["calls"]) == 8


# ---- the interval


def share_within(t, df):
    "How much of Student's t lies between -t and t, by Simpson's rule on its density."
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    n = 20_000
    xs = [2 * t * i / n - t for i in range(n + 1)]
    ys = [scale * (1 + x * x / df) ** (-(df + 1) / 2) for x in xs]
    odd, even = sum(ys[1:-1:2]), sum(ys[2:-1:2])
    return (ys[0] + 4 * odd + 2 * even + ys[-1]) * 2 * t / n / 3


@pytest.mark.parametrize("n", race.STUDENT)
def test_the_table_of_student(n):
    assert share_within(race.STUDENT[n], n - 1) == pytest.approx(0.95, abs=5e-5)


def test_an_interval_is_students():
    bits = [6.83, 6.84, 6.82]
    average, half = race.interval(bits)
    assert average == pytest.approx(mean(bits))
    assert half == pytest.approx(4.303 * stdev(bits) / math.sqrt(3))
    assert race.interval([6.5]) == (6.5, math.inf)


# ---- the records


ENTRIES = sorted((ROOT / "tools" / "entries").glob("*.py"))


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_of_the_records_can_race(path):
    entry = fair.entry_of(str(path))
    assert entry.idea
    fair.options_of(entry, "toy")


def test_the_table_says_where_the_rules_are():
    text = race.RECORDS.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 2
    assert all((race.RECORDS.parent / link).exists() for link in links)
    best = math.inf
    for bits, row in race.read_records():
        half = float(row.split("|")[3].split("±")[1])
        assert bits + half < best
        assert half >= race.CLOCK
        best = bits


def test_a_record_from_the_file_to_the_line(tmp_path):
    "The script and its processes, on a small corpus and for very little work."
    path = tmp_path / "tiny.py"
    entry = f"Entry('tiny', {SMALL | {'first_weights': 'bigrams', 'candidates': 50}!r})"
    text = f"from minikl.ingredients import Entry\nENTRY = {entry}\n"
    path.write_text(text, encoding="utf-8")
    options = ["--corpus=toy", "--work=4", "--seeds=1", "--jobs=1"]
    command = [sys.executable, ROOT / "tools" / "race.py", "run", path, *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "bits per character" in done.stdout
    assert "No record: this race is not that of the records." in done.stdout
