"""What needs more than one process or more than one host, and no lesson shows.

Lesson 13 itself kills a host, pulls its cable, and counts bytes.
"""
import json
import shutil

import pytest
from conftest import ROOT
from hosts import Hosts, impossible
from small_runs import losses

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
