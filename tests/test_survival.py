"""Runs that are killed come back exact; and if something broke that, it would be noticed.

All in this process: from some operation on nothing happens any more, which is what
SIGKILL means. `make soak` kills real processes, for many minutes.
"""
import random
from pathlib import Path

import pytest
from test_train import Killed, everything, home, kill_after, result, run, well  # noqa: F401

from minikl import train, training

STEPS = ["--max_steps=8", "--save_every=2", "--log_every=3", "--eval_every=3"]


def attempt(run, name, *options):  # whether it got to its end
    try:
        well(run(name, *STEPS, *options))
        return True
    except Killed:
        return False


@pytest.mark.parametrize("seed", range(3))
def test_killed_runs_come_back_exact(seed, run, tmp_path, monkeypatch):
    "In the folder of a finished run, which keeps all it has until the new one has ended."
    well(run("whole", *STEPS))
    well(run("out", *STEPS, "--seed=1"))
    yesterday, out = everything(tmp_path / "out"), tmp_path / "out"
    chance, kills, alive = random.Random(seed), 0, False
    while not alive:
        more = ["--resume"] if any(out.glob("running/checkpoints/step-*")) else []
        with monkeypatch.context() as patched:
            if kills < 4:
                kill_after(patched, chance.randrange(1, 25))
            alive = attempt(run, "out", *more)
        kills += not alive
        ended = alive or (out / "running" / "results").exists()
        assert ended or everything(out) == yesterday
    assert kills == 4
    assert result(out) == result(tmp_path / "whole")


def forgets_the_optimizers(monkeypatch):
    monkeypatch.setattr(training, "read_memory", lambda *arguments: {})


def skips_a_step(monkeypatch):
    begin = train.Run.begin
    def skipping(self):
        lines = begin(self)
        self.at["step"] += bool(lines)
        return lines
    monkeypatch.setattr(train.Run, "begin", skipping)


def forgets_half_a_line(monkeypatch):
    begin = train.Run.begin
    def forgetting(self):
        lines = begin(self)
        self.at.update(nats=0, targets=0)
        return lines
    monkeypatch.setattr(train.Run, "begin", forgetting)


def writes_in_place_unchecked(monkeypatch):
    def write(folder, step, files, keep=2):
        place = Path(folder) / f"step-{step:08}"
        for i, (name, data) in enumerate(files.items()):
            if step == 6 and i == 2 and not (place / "state.json").exists():
                raise Killed
            training.write_atomically(place / name, data)
    monkeypatch.setattr(train, "write_checkpoint", write)
    newest = lambda folder: max(Path(folder).glob("step-*"), default=None)  # noqa: E731
    monkeypatch.setattr(train, "newest_checkpoint", newest)


@pytest.mark.parametrize("sabotage", [
    None, forgets_the_optimizers, skips_a_step, forgets_half_a_line, writes_in_place_unchecked
])
def test_a_broken_resume_is_noticed(sabotage, run, tmp_path, monkeypatch):
    "Without sabotage the same check is content."
    well(run("whole", *STEPS))
    if sabotage:
        sabotage(monkeypatch)
    take = train.Run.step
    def dies_once(self, step, progress):
        if step == 4:
            monkeypatch.setattr(train.Run, "step", take)
            raise Killed
        return take(self, step, progress)
    if sabotage is not writes_in_place_unchecked:
        monkeypatch.setattr(train.Run, "step", dies_once)
    assert not attempt(run, "out")
    done = run("out", *STEPS, "--resume")
    same = done.returncode == 0 and result(tmp_path / "out") == result(tmp_path / "whole")
    assert same == (sabotage is None)
