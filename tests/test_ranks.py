"Two processes under torchrun: who speaks, who waits, and what nobody holds whole."
import pytest
from small_runs import GIVEN, SHAPE

TINY = [
    *SHAPE, *GIVEN, "--batch_size=4", "--threads=1", "--max_steps=6", "--save_every=2",
]
PATCHED = """
import os, sys, time
from minikl import files, learner, model, train, trainer
{code}
train.main(sys.argv[1:])
"""


@pytest.fixture
def patched(tmp_path, torchrun):
    "patched(code, *options): train in two processes, with code that changes things."
    def call(code, *options):   # CompletedProcess
        script = tmp_path / "patched.py"
        script.write_text(PATCHED.format(code=code))
        return torchrun(script, *TINY, f"--out_dir={tmp_path}/out", *options)

    return call


FAILS = """
step = learner.Learner.step

def fails(self, documents, number, done):
    if number == 3 and self.ranks.rank == 1:
        {}
    return step(self, documents, number, done)

learner.Learner.step = fails
"""
SLOW = """
write = trainer.write_checkpoint

def slow(*arguments):
    time.sleep(2.5)
    write(*arguments)

trainer.write_checkpoint = slow
"""
ONLY_META = """
import torch
init = model.MiniKL.__init__

def checked(self, config):
    assert torch.get_default_device().type == "meta"
    init(self, config)

model.MiniKL.__init__ = checked
"""


def test_the_first_error_of_any_rank_is_printed_and_no_other(patched):
    done = patched(FAILS.format("raise files.UserError('rank 1 has found it')"))
    assert done.returncode == 1
    line = "process 1: error: rank 1 has found it\n"
    assert done.stderr.count(line) == 1, done.stderr
    assert "another process" not in done.stderr


def test_a_bug_on_one_rank_shows_its_traceback_and_no_consequences(patched):
    done = patched(FAILS.format("1 / 0"))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "another process" not in done.stderr


def test_a_mistake_that_all_find_is_told_once(patched):
    done = patched("", "--lr=fast")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("invalid float value") == 1, done.stderr


def test_a_disk_slower_than_the_timeout_of_a_step_ends_no_run(patched, tmp_path):
    done = patched(SLOW, "--timeout=0.02")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "checkpoints" / "step-00000006").exists()


def test_no_process_ever_builds_a_sharded_model(patched):
    "Only on the device meta, where tensors have no numbers."
    assert patched(ONLY_META, "--shard").returncode == 0
