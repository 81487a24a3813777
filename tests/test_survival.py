"""Runs that are killed come back exact; if something broke that, it would be noticed.

All in this process: from some operation on nothing happens any more, which is what
SIGKILL means. `make soak` kills real processes, for many minutes.
"""
import random
from pathlib import Path

import pytest
from small_runs import Killed, everything, kill_after, result, well

from minikl import checkpoint, resume, trainer
from minikl.files import write_atomically
from minikl.learner import Learner

pytestmark = pytest.mark.usefixtures("home")
STEPS = ["--max_steps=8", "--save_every=2", "--log_every=3", "--eval_every=3"]


def attempt(run, name, *options):  # whether it got to its end
    try:
        well(run(name, *STEPS, *options))
        return True
    except Killed:
        return False


@pytest.mark.parametrize("seed", range(3))
def test_killed_runs_come_back_exact(seed, run, tmp_path, monkeypatch):
    "In the folder of a finished run, which keeps all it has until the new one ends."
    out = tmp_path / "out"
    well(run("whole", *STEPS))
    well(run("out", *STEPS, "--seed=1"))
    yesterday = everything(out)
    chance = random.Random(seed)
    kills = 0
    alive = False
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
    monkeypatch.setattr(checkpoint, "read_memory", lambda *arguments: {})


def change_what_is_resumed(monkeypatch, change):
    "Have `change(run)` spoil a run after it has read its checkpoint."
    begin = trainer.begin

    def changed(run):
        is_left = begin(run)
        change(run)
        return is_left

    monkeypatch.setattr(trainer, "begin", changed)


def skips_a_step(monkeypatch):
    def skip(run):
        run.progress.step += bool(run.lines)

    change_what_is_resumed(monkeypatch, skip)


def forgets_half_a_line(monkeypatch):
    def forget(run):
        run.progress.nats = 0
        run.progress.targets = 0

    change_what_is_resumed(monkeypatch, forget)


def writes_in_place_unchecked(monkeypatch):
    def write(folder, step, files, keep=2):
        place = Path(folder) / f"step-{step:08}"
        for i, (name, data) in enumerate(files.items()):
            if step == 6 and i == 2 and not (place / "state.json").exists():
                raise Killed
            write_atomically(place / name, data)

    def newest(folder):
        return max(Path(folder).glob("step-*"), default=None)

    monkeypatch.setattr(trainer, "write_checkpoint", write)
    monkeypatch.setattr(resume, "newest_checkpoint", newest)


def die_once(monkeypatch):
    "Before the fourth step; a run that comes after takes it."
    take = Learner.step

    def dies(self, documents, step, done):
        if step == 4:
            monkeypatch.setattr(Learner, "step", take)
            raise Killed
        return take(self, documents, step, done)

    monkeypatch.setattr(Learner, "step", dies)


SABOTAGES = [
    None,
    forgets_the_optimizers,
    skips_a_step,
    forgets_half_a_line,
    writes_in_place_unchecked,
]


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_broken_resume_is_noticed(sabotage, run, tmp_path, monkeypatch):
    "Without sabotage the same check is content."
    well(run("whole", *STEPS))
    if sabotage:
        sabotage(monkeypatch)
    if sabotage is not writes_in_place_unchecked:   # that one dies by itself
        die_once(monkeypatch)
    assert not attempt(run, "out")
    done = run("out", *STEPS, "--resume")
    whole = result(tmp_path / "whole")
    same = done.returncode == 0 and result(tmp_path / "out") == whole
    assert same == (sabotage is None)
