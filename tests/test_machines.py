"""What needs more than one process or more than one host, and no lesson shows.

Lesson 13 itself kills a host, pulls its cable, and counts bytes.
"""
import json
import shutil
import sys

import pytest
from conftest import ROOT
from test_scripts import losses

sys.path.insert(0, str(ROOT / "tools"))
from hosts import Hosts, impossible

SHAPE = ["--d_model=32", "--num_heads=2", "--num_kv_heads=2", "--num_layers=2", "--max_seq_len=64", "--threads=1", "--batch_size=8", "--log_every=1", "--max_steps=20"]
TINY = [*SHAPE, "--corpus=toy", "--vocab_size=400", "--tie_embeddings", "--eval_every=9"]


@pytest.fixture(scope="module")
def hosts():
    "Two hosts on one machine, where that is allowed: two network namespaces."
    if reason := impossible(): pytest.skip(reason)
    with Hosts(2) as hosts:
        hosts.meeting_place()
        yield hosts


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, torchrun):
    "A run of two processes that hold half of the model each, and its checkpoints."
    out = tmp_path_factory.mktemp("sharded")
    done = torchrun("minikl/train.py", *TINY, "--shard", "--save_every=8", "--keep_checkpoints=9", f"--out_dir={out}")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("processes, options", [(1, ["--shard"]), (2, []), (2, ["--shard"])])
def test_sharded_checkpoint_goes_on_anywhere(processes, options, sharded, tmp_path, python, torchrun):
    "Alone and by two, sharded and not: the losses are those of the run that was not interrupted; with as many processes, to the last bit."
    shutil.copytree(sharded / "checkpoints" / "step-00000008", tmp_path / "checkpoints" / "step-00000008")
    done = (python, torchrun)[processes - 1]("minikl/train.py", *TINY, "--resume", *options, f"--out_dir={tmp_path}")
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stdout + done.stderr
    assert ("holds everything" in done.stdout) == (processes == 1 and bool(options))
    assert losses(tmp_path) == (losses(sharded) if processes == 2 else pytest.approx(losses(sharded), rel=1e-5))
    written = [(out / "checkpoints" / "step-00000020" / "optimizers.safetensors").stat().st_size for out in (tmp_path, sharded)]
    assert written[0] == written[1]


def test_hosts_that_share_no_folder_go_on_from_the_newest_checkpoint(hosts, sharded, tmp_path):
    "The checkpoint is on the second host, and rank 0 on the first, which has an older one."
    for host, step in enumerate((8, 16)):
        shutil.copytree(sharded / "checkpoints" / f"step-{step:08}", tmp_path / str(host) / "checkpoints" / f"step-{step:08}")
    processes = [hosts.torchrun(host, "minikl/train.py", *TINY, "--resume", f"--out_dir={tmp_path}/{host}", run="newest") for host in range(2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert f"continuing from {tmp_path}/1/checkpoints/step-00000016" in said[0]
    assert losses(tmp_path / "0") == losses(sharded)
    assert not (tmp_path / "1" / "run.json").exists()


def test_each_host_reads_its_own_part(hosts, tmp_path, python):
    "Two hosts, one of which has a single document and so nothing to do in most steps, learn what one does that has all."
    lines = (ROOT / "data" / "toy.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    for name, part in (("few", lines[:1]), ("many", lines[1:])): (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *sorted(set("".join(json.loads(line)["content"] for line in lines)))])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    common = ["minikl/train.py", *SHAPE, f"--vocab_dict_path={tmp_path}/vocab.json"]
    processes = [hosts.torchrun(host, *common, "--local_data", f"--data_jsonl_path={tmp_path}/{name}.jsonl", f"--out_dir={tmp_path}/two", run="local")
                 for host, name in enumerate(("few", "many"))]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert facts["documents"]["documents"] == 60 and set(facts["bits_per_char"]) == {"MiniKL"}
    def alone(*order):   # which part comes first depends on their fingerprints
        done = python(*common, "--data_jsonl_path", *(f"{tmp_path}/{name}.jsonl" for name in order), f"--out_dir={tmp_path}/{order[0]}")
        assert done.returncode == 0, done.stderr
        return pytest.approx(losses(tmp_path / order[0]), rel=1e-5)
    two = losses(tmp_path / "two")
    assert two == alone("few", "many") or two == alone("many", "few")


def test_local_data_needs_a_vocabulary(tmp_path, python):
    done = python("minikl/train.py", *TINY, "--local_data", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and "needs --vocab_dict_path" in done.stderr and done.stderr.count("\n") == 1, done.stderr
