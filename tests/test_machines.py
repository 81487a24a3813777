"""What needs more than one process or more than one host, and no lesson shows.

Lesson 14 itself kills a host, pulls its cable, and counts bytes. The accidents of
lesson 13 that take two processes happen here to the real trainer.
"""
import json
import shutil

import pytest
from conftest import ROOT
from hosts import Hosts, impossible
from small_runs import GIVEN, RESULTS, everything, losses
from small_runs import SHAPE as SMALL

from minikl import train

SHAPE = [
    "--d_model=32", "--num_heads=2", "--num_kv_heads=2", "--num_layers=2",
    "--max_seq_len=64", "--threads=1", "--batch_size=8", "--log_every=1",
    "--max_steps=20",
]
TINY = [
    *SHAPE, "--corpus=toy", "--vocab_size=400", "--tie_embeddings", "--eval_every=9"
]


def almost(numbers):
    "Sums in another order: the same but for the last digits."
    return pytest.approx(numbers, rel=1e-4)


@pytest.fixture(scope="module")
def hosts():
    "Two hosts on one machine, where that is allowed: two network namespaces."
    if reason := impossible():
        pytest.skip(reason)
    with Hosts(2) as hosts:
        hosts.meeting_place()
        yield hosts


@pytest.fixture
def sharded(once, two):
    "A run of two processes that hold half of the model each, and its checkpoints."
    def make(out):
        done = two(
            *TINY, "--shard", "--save_every=8", "--keep_checkpoints=9",
            f"--out_dir={out}",
        )
        assert done.returncode == 0, done.stderr
    return once("sharded", make)


def take_checkpoint(run, step, out):
    "Begin a folder of a run with a checkpoint of another."
    name = f"step-{step:08}"
    shutil.copytree(run / "checkpoints" / name, out / "checkpoints" / name)


def size_of_optimizers(out):
    return (out / "checkpoints/step-00000020/optimizers.safetensors").stat().st_size


CASES = [(1, ["--shard"]), (2, []), (2, ["--shard"])]


@pytest.mark.parametrize("processes, options", CASES)
def test_sharded_checkpoint_goes_on_anywhere(
    processes, options, sharded, tmp_path, script, two
):
    "Alone and by two, sharded and not: the losses of the run that went through."
    take_checkpoint(sharded, 8, tmp_path)
    arguments = [*TINY, "--resume", *options, f"--out_dir={tmp_path}"]
    done = two(*arguments) if processes == 2 else script(train.main, *arguments)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "continuing from" in done.stdout, said
    alone = processes == 1 and bool(options)
    assert ("holds everything" in done.stdout) == alone
    if processes == 2 and options:   # the same computation: the same bits
        assert losses(tmp_path) == losses(sharded)
    assert losses(tmp_path) == almost(losses(sharded))
    assert size_of_optimizers(tmp_path) == size_of_optimizers(sharded)


def finish_both(processes):   # what each has said
    "Wait for two processes, both of which have to end well."
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said


def test_hosts_that_share_no_folder_go_on_from_the_newest_checkpoint(
    hosts, sharded, tmp_path
):
    "The newest is on the second host; rank 0 is on the first, which has an older one."
    for host, step in enumerate((8, 16)):
        take_checkpoint(sharded, step, tmp_path / str(host))
    said = finish_both([
        hosts.torchrun(
            host, "minikl/train.py", *TINY, "--resume", f"--out_dir={tmp_path}/{host}",
            run="newest",
        )
        for host in range(2)
    ])
    assert f"continuing from {tmp_path}/1/checkpoints/step-00000016" in said[0]
    assert losses(tmp_path / "0") == almost(losses(sharded))
    assert not (tmp_path / "1" / "run.json").exists()


@pytest.fixture
def parts(tmp_path):
    "Sixty documents in two files, one of which holds a single one, and a vocabulary."
    toy = (ROOT / "data" / "toy.jsonl").read_text(encoding="utf-8")
    lines = toy.splitlines(keepends=True)[:60]
    for name, part in (("few", lines[:1]), ("many", lines[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    letters = sorted(set("".join(json.loads(line)["content"] for line in lines)))
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *letters])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return tmp_path


def test_each_host_reads_its_own_part(hosts, parts, script):
    "Two hosts, one with nothing to do in most steps, learn what one does that has all."
    common = [*SHAPE, f"--vocab_dict_path={parts}/vocab.json"]
    finish_both([
        hosts.torchrun(
            host, "minikl/train.py", *common, "--local_data",
            f"--data_jsonl_path={parts}/{name}.jsonl", f"--out_dir={parts}/two",
            run="local",
        )
        for host, name in enumerate(("few", "many"))
    ])
    facts = json.loads((parts / "two" / "run.json").read_text(encoding="utf-8"))
    assert facts["documents"]["documents"] == 60
    assert set(facts["bits_per_char"]) == {"MiniKL"}

    def alone(*order):
        paths = [f"{parts}/{name}.jsonl" for name in order]
        out = parts / order[0]
        done = script(
            train.main, *common, "--data_jsonl_path", *paths, f"--out_dir={out}"
        )
        assert done.returncode == 0, done.stderr
        return almost(losses(out))

    together = losses(parts / "two")   # which part comes first depends on their bytes
    assert together == alone("few", "many") or together == alone("many", "few")


def test_local_data_needs_a_vocabulary(tmp_path, script):
    done = script(train.main, *TINY, "--local_data", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "needs --vocab_dict_path" in done.stderr


# ---- the accidents of lesson 13

PATCHED = """
import signal, sys, time
from minikl import learner, train, trainer
{code}
train.main(sys.argv[1:])
"""
CLOCKS_DISAGREE = """
clock = trainer.Run.clock
trainer.Run.clock = lambda run: clock(run) - run.ranks.rank
"""
SIGNAL_TO_ONE = """
step = learner.Learner.step

def interrupted(self, documents, number, done):
    if number == 5 and self.ranks.rank == 1:
        signal.raise_signal(signal.SIGINT)
    return step(self, documents, number, done)

learner.Learner.step = interrupted
"""
COMES_LATE = """
begin = trainer.begin

def late(run):
    time.sleep(run.ranks.rank)
    return begin(run)

trainer.begin = late
"""


@pytest.fixture
def patched(tmp_path, torchrun):
    "patched(code, *options): two processes train in tmp_path/out, with changed code."
    def call(code, *options):   # CompletedProcess
        path = tmp_path / "patched.py"
        path.write_text(PATCHED.format(code=code))
        common = [*SMALL, *GIVEN, "--batch_size=4", "--log_every=1", "--threads=1"]
        return torchrun(path, *common, f"--out_dir={tmp_path}/out", *options)

    return call


def test_clocks_that_disagree_end_a_run_at_one_step(patched, tmp_path):
    "By a second, in a run of two: each by its own clock, they would stop apart."
    done = patched(CLOCKS_DISAGREE, "--minutes=0.03")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "run.json").exists()


def test_a_signal_to_one_process_stops_both(patched, tmp_path):
    done = patched(SIGNAL_TO_ONE, "--max_steps=12")
    assert done.returncode == 0, done.stderr
    assert "stopped at step 6; --resume continues" in done.stderr
    done = patched("", "--max_steps=12", "--resume")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 12


def test_a_process_that_comes_late_deletes_nothing(patched, tmp_path):
    "In the folder of a finished run: its results stay, and then come the new ones."
    assert patched("", "--max_steps=6").returncode == 0
    before = everything(tmp_path / "out")
    done = patched(COMES_LATE + SIGNAL_TO_ONE, "--max_steps=12", "--seed=1")
    assert "stopped at step 6" in done.stderr, done.stderr
    assert everything(tmp_path / "out") == before
    done = patched(COMES_LATE, "--max_steps=12", "--seed=1", "--resume")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 12
    after = everything(tmp_path / "out")
    assert {*RESULTS} <= after.keys()
    assert after["model.safetensors"] != before["model.safetensors"]
