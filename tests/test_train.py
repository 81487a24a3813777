"""What may happen to a training run, and what it must not lose. All in this process.

Runs here are as small as they can be: a model of a few thousand weights, 24 documents.
"""
import errno
import json
import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import (
    GIVEN,
    OLD,
    RESULTS,
    TINY,
    Killed,
    before_each_step,
    everything,
    interrupt_at,
    kill_after,
    losses,
    metrics,
    one_line,
    result,
    well,
)

from minikl import data, files, parallel, prepare, train, trainer
from minikl.checkpoint import checksums
from minikl.corpora import CORPORA, CannotFetch
from minikl.folder import RunFolder
from minikl.layouts import Nested
from minikl.model import MiniKL, write_weights
from minikl.options import Options
from minikl.record import Recorder
from minikl.step import Precision

pytestmark = pytest.mark.usefixtures("home")


def die_at_once(monkeypatch):
    "No run takes a single step."
    def dies(step):
        raise Killed

    before_each_step(monkeypatch, dies)


def no_space(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- nothing of a finished run is lost

BAD_ENDS = {
    "diverges": (["--seed=1", "--lr=1e30"], 2),
    "refused": (["--seed=-1"], 2),
    "ctrl-c": (["--seed=1"], 130),
    "sigterm": (["--seed=1"], 143),
    "full disk": (["--seed=1"], 2),
}


@pytest.mark.parametrize("end", BAD_ENDS)
def test_a_new_run_that_ends_badly_leaves_a_finished_one_alone(
    end, run, tmp_path, monkeypatch
):
    well(run("out"))
    before = everything(tmp_path / "out")
    assert before.keys() >= {*RESULTS, "checkpoints/step-00000008/SHA256SUMS"}
    options, code = BAD_ENDS[end]
    if end in ("ctrl-c", "sigterm"):
        number = signal.SIGINT if end == "ctrl-c" else signal.SIGTERM
        interrupt_at(monkeypatch, 3, number)
    if end == "full disk":
        monkeypatch.setattr(files.os, "fsync", no_space)
    done = run("out", *options, "--save_every=2")
    assert done.returncode == code, done.stderr
    assert everything(tmp_path / "out") == before


def test_the_unfinished_run_goes_on_and_replaces_the_finished_one(
    run, tmp_path, monkeypatch
):
    well(run("out"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5, signal.SIGINT)
        assert run("out", "--seed=1").returncode == 130
    one_line(run("out", "--seed=1"), "go on with it by --resume")
    assert "continuing from" in well(run("out", "--seed=1", "--resume"))
    well(run("other", "--seed=1"))
    assert result(tmp_path / "out") == result(tmp_path / "other")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."}
    assert names == {*RESULTS, "checkpoints"}


def test_without_the_folder_running_yesterday_is_back(run, tmp_path, monkeypatch):
    well(run("out"))
    before = everything(tmp_path / "out")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5, signal.SIGINT)
        run("out", "--seed=1")
    shutil.rmtree(tmp_path / "out" / "running")
    run("out", "--seed=1", "--lr=1e30")
    assert everything(tmp_path / "out") == before


def test_files_of_other_programs_are_left_alone(run, tmp_path):
    own = tmp_path / "out" / "checkpoints" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("years of work")
    one_line(run("out"), f"{own} is not of a training run")
    assert own.read_text() == "years of work"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").symlink_to(tmp_path / "disk")
    one_line(run("out"), "is a link; link the whole --out_dir instead")


def test_files_of_others_that_come_later_survive_every_run(run, tmp_path):
    "A hidden file, a file that came during a run, and copies with names like ours."
    out = tmp_path / "out"
    well(run("out"))
    hidden = out / "checkpoints" / ".DS_Store"
    hidden.write_text("mine")
    well(run("out", "--seed=1"))
    later = [out / "checkpoints" / name for name in ("step-by-step", "step-8-good")]
    for path in later:
        path.mkdir()
    one_line(run("out", "--seed=2"), "is not of a training run")
    for path in later:
        path.rmdir()
    well(run("out", "--seed=2"))
    assert hidden.read_text() == "mine"
    assert not (out / "running").exists()


def finish_or_die(call, monkeypatch, n):   # whether it got to its end
    "Kill a run after `n` operations of its end."
    finish = RunFolder.finish
    with monkeypatch.context() as patched:
        def killed(self, results):
            kill_after(patched, n)
            finish(self, results)

        patched.setattr(RunFolder, "finish", killed)
        with suppress(Killed):
            return call().returncode == 0
    return False


def test_a_kill_at_any_moment_of_the_end_is_mended_by_resume(
    run, tmp_path, monkeypatch
):
    "A model of another shape replaces the finished one; killed before every operation."
    def plot_nothing(lines, compare, path):
        Path(path).write_bytes(b"")

    monkeypatch.setattr(trainer, "plot_run", plot_nothing)
    wider = ["--num_kv_heads=2", "--seed=1"]
    well(run("new", *wider))
    well(run("old"))
    n = 0
    alive = False
    while not alive:
        out = tmp_path / f"out-{n}"
        shutil.copytree(tmp_path / "old", out)
        name = out.name
        alive = finish_or_die(lambda name=name: run(name, *wider), monkeypatch, n)
        if not alive:
            well(run(name, *wider, "--resume"))
        assert result(out) == result(tmp_path / "new")
        checkpoints = [path.name for path in (out / "checkpoints").glob("step-*")]
        assert checkpoints == ["step-00000008"]
        assert MiniKL.load(out).config.num_kv_heads == 2
        n += 1
    assert n > 12


def test_two_runs_in_one_folder(run, tmp_path):
    well(run("out"))
    before = everything(tmp_path / "out")
    with files.locked(tmp_path / "out"):
        one_line(run("out", "--seed=1"), "another run is writing to this folder")
        one_line(run("out", "--resume"), "another run is writing to this folder")
    assert everything(tmp_path / "out") == before
    assert "nothing to do" in well(run("out", "--resume"))


# ---- resuming


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_checkpoint_of_an_older_version_goes_on(kind, run, tmp_path):
    "Written by the version before this one, in the middle of an unfinished run."
    out = tmp_path / kind
    checkpoint = "step-00000004"
    shutil.copytree(OLD / kind / checkpoint, out / "checkpoints" / checkpoint)
    for name in ("metrics", "samples"):
        (out / f"{name}.jsonl.running").touch()
    options = ["--max_steps=12", f"--optimizer={kind}", "--save_every=4", "--resume"]
    one_line(run(kind, *options), "of another run: decay=linear, there cosine")
    options += ["--decay=cosine", "--first_weights=random", "--candidates=0"]
    assert "continuing from" in well(run(kind, *options))
    assert not list(out.glob("*running"))
    expected = json.loads((OLD / kind / "losses.json").read_text())
    assert losses(out) == pytest.approx(expected, rel=1e-3)


OPTIONS = "optimizer=adamw", "dtype=bf16", "candidates=3", "first_weights=random"


@pytest.mark.parametrize("options", [[], *([f"--{option}"] for option in OPTIONS)])
def test_a_stopped_run_goes_on_to_the_bit(options, run, tmp_path, monkeypatch):
    well(run("whole", *options))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4, signal.SIGTERM)
        assert run("out", *options).returncode == 143
    well(run("out", *options, "--resume"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_finished_run_is_extended(run, tmp_path):
    well(run("out"))
    before = everything(tmp_path / "out")
    assert "nothing to do" in well(run("out", "--resume"))
    assert everything(tmp_path / "out") == before
    said = well(run("out", "--resume", "--max_steps=12"))
    assert "max_steps=12, there 8" in said and "71% of it is done" in said
    lines = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert lines[8]["lr"] > lines[7]["lr"]
    done = run("out", "--resume", "--max_steps=20", "--seed=1")
    one_line(done, "is of another run: seed=1")


def test_an_extension_that_is_killed_at_once_still_extends(run, tmp_path, monkeypatch):
    well(run("out"))
    with monkeypatch.context() as patched:
        die_at_once(patched)
        with pytest.raises(Killed):
            run("out", "--resume", "--max_steps=12")
    assert "continuing from" in well(run("out", "--resume", "--max_steps=12"))
    assert metrics(tmp_path / "out")[-1]["step"] == 12


def interrupted_checkpoint(run, tmp_path, monkeypatch):   # Path
    "What a run leaves in tmp_path/out when it is stopped after four steps."
    interrupt_at(monkeypatch, 4, signal.SIGTERM)
    run("out")
    return next((tmp_path / "out" / "running" / "checkpoints").glob("step-*"))


STATES = ["{}", "[]", "null", '{"settings": {"options": 1}}', "x", "[" * 10**5]


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_that_somebody_else_has_signed(state, run, tmp_path, monkeypatch):
    checkpoint = interrupted_checkpoint(run, tmp_path, monkeypatch)
    (checkpoint / "state.json").write_text(state)
    (checkpoint / "SHA256SUMS").write_text(checksums(checkpoint))
    one_line(run("out", "--resume"), f"{checkpoint}/state.json: not ")


@pytest.mark.parametrize("name", ["model", "optimizers"])
def test_a_checkpoint_with_other_tensors(name, run, tmp_path, monkeypatch):
    checkpoint = interrupted_checkpoint(run, tmp_path, monkeypatch)
    weights = {"0.0.mean": torch.zeros(3)}
    write_weights(weights, checkpoint / f"{name}.safetensors")
    (checkpoint / "SHA256SUMS").write_text(checksums(checkpoint))
    one_line(run("out", "--resume"), f"{checkpoint}/{name}.safetensors: ")


def not_a_number_in(monkeypatch, step):
    "A run whose gradient is not finite in one step."
    def failing(number):
        if number == step:
            raise FloatingPointError("the gradient has norm nan")

    before_each_step(monkeypatch, failing)


def test_what_diverges_twice_is_put_aside_twice(run, tmp_path, monkeypatch):
    well(run("whole"))
    with monkeypatch.context() as patched:
        not_a_number_in(patched, 5)
        last = f"{tmp_path}/out/running/checkpoints/step-00000004"
        for more in ([], ["--resume"]):
            done = run("out", "--save_every=1", *more)
            one_line(done, f"last good checkpoint: {last}")
    well(run("out", "--save_every=1", "--resume"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_an_extension_that_diverges_at_once_still_extends(run, tmp_path, monkeypatch):
    well(run("out"))
    before = everything(tmp_path / "out")
    with monkeypatch.context() as patched:
        not_a_number_in(patched, 8)
        done = run("out", "--resume", "--max_steps=12")
        assert done.returncode == 2 and "step-00000008" in done.stderr
    assert everything(tmp_path / "out") == before
    said = well(run("out", "--resume", "--max_steps=12", "--lr=0.001"))
    assert "continuing from" in said and metrics(tmp_path / "out")[-1]["step"] == 12


def test_a_run_does_not_go_on_with_other_data(run, script, tmp_path, monkeypatch):
    "Somebody has added a document to the file; the vocabulary is given and the same."
    longer = tmp_path / "longer.jsonl"
    text = (OLD / "data.jsonl").read_text(encoding="utf-8")
    longer.write_text(text + text.splitlines()[0] + "\n", encoding="utf-8")
    other = [arg for arg in GIVEN if "data_jsonl_path" not in arg]
    other = [*TINY, "--max_steps=8", *other, f"--data_jsonl_path={longer}"]
    well(run("whole"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4, signal.SIGINT)
        assert run("out").returncode == 130
    before = everything(tmp_path / "out")
    done = script(train.main, *other, f"--out_dir={tmp_path}/out", "--resume")
    one_line(done, "is of another run: data and vocabulary=")
    assert everything(tmp_path / "out") == before
    well(run("out", "--resume"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_run_that_was_never_saved_hides_no_finished_one(run, tmp_path, monkeypatch):
    well(run("out"))
    with monkeypatch.context() as patched:
        die_at_once(patched)
        for seed in (0, 1):
            with pytest.raises(Killed):
                run("out", f"--seed={seed}")
    assert "continuing from" in well(run("out", "--resume", "--max_steps=12"))
    with monkeypatch.context() as patched:
        die_at_once(patched)
        with pytest.raises(Killed):
            run("out", "--seed=1")
    assert "beginning at step 0" in well(run("out", "--seed=1", "--resume"))


def test_a_run_cannot_end_before_it_has_come_so_far(run, tmp_path, monkeypatch):
    well(run("out"))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 9, signal.SIGTERM)
        run("out", "--resume", "--max_steps=16")
    done = run("out", "--resume")
    assert done.returncode == 2
    assert "is past the end of this run: max_steps=8, there 16" in done.stderr


def test_another_precision_is_announced(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4, signal.SIGTERM)
        run("out")
    bf16 = staticmethod(lambda device: "bf16")
    monkeypatch.setattr(Precision, "best", bf16)
    assert "dtype=bf16, there fp32" in well(run("out", "--resume"))


# ---- text that is not text


@pytest.fixture
def half(tmp_path):
    "Documents and a vocabulary with halves of emojis."
    texts = ["\\ud83d风吹\\ud83d过", "雨\\ude00落", "花\\ud83d\\ud83d开"] * 8
    lines = [f'{{"text": "{i}{text}"}}\n' for i, text in enumerate(texts)]
    (tmp_path / "half.jsonl").write_text("".join(lines))
    chars = sorted(set("0123456789风吹过雨落花开\ud83d\ude00"))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *chars])}
    (tmp_path / "half.json").write_text(json.dumps(vocab))
    return tmp_path


@pytest.mark.parametrize("own_vocabulary", [True, False])
def test_half_an_emoji_ends_no_run(own_vocabulary, half, script, monkeypatch):
    out = half / "out"
    options = [
        *TINY, "--max_steps=6", "--held_out=0.9", "--eval_every=2",
        f"--data_jsonl_path={half}/half.jsonl", "--vocab_size=300", f"--out_dir={out}",
    ]
    if own_vocabulary:
        options.append(f"--vocab_dict_path={half}/half.json")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4, signal.SIGTERM)
        assert script(train.main, *options).returncode == 143
    well(script(train.main, *options, "--resume"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(out / name, encoding="utf-8") as file:
            for line in file:
                json.loads(line)
    vocab = json.loads((out / "vocab_dict.json").read_text(encoding="utf-8"))
    assert ("\ud83d" in vocab) == own_vocabulary


def test_names_and_prompts_that_are_not_utf8(run, tmp_path):
    name = os.fsdecode(b"out-\xff")
    prompt = os.fsdecode(b"A\xff")
    well(run(name, f"--sample_prompts={prompt}"))
    facts = (tmp_path / name / "run.json").read_text(encoding="utf-8")
    assert "\\udcff" in facts
    assert json.loads(facts)


def test_a_run_keeps_its_first_start(run, tmp_path, monkeypatch):
    "After --resume too; the checkpoint of an older version has none."
    times = iter(f"2026-11-28T10:00:{second:02}+00:00" for second in range(60))
    monkeypatch.setattr(trainer, "time_stamp", lambda: next(times))
    for number in (1, 2):
        with monkeypatch.context() as patched:
            interrupt_at(patched, 4, signal.SIGTERM)
            options = [f"out{number}", "--max_steps=8", "--save_every=2"]
            assert run(*options).returncode == 143
    path, = (tmp_path / "out2" / "running" / "checkpoints").glob("*5/state.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    assert state["settings"].pop("started").endswith(":01+00:00")
    path.write_text(json.dumps(state), encoding="utf-8")
    checked = checksums(path.parent)
    (path.parent / "SHA256SUMS").write_text(checked, encoding="utf-8")
    starts = []
    for number in (1, 2):
        well(run(f"out{number}", "--max_steps=8", "--save_every=2", "--resume"))
        facts = json.loads((tmp_path / f"out{number}" / "run.json").read_text("utf-8"))
        starts.append(facts["started"])
        assert facts["ended"] > "2026-11-28T10:00:02" and facts["device_name"]
    assert starts == ["2026-11-28T10:00:00+00:00", ""]


# ---- mistakes and bugs

TWICE = f"--data_jsonl_path={OLD}/data.jsonl {OLD}/data.jsonl"
ABSURD = {
    "--batch_size=1000000000000":
        "batch_size=1000000000000: expected at least 1, and below",
    "--threads=100000": "threads=100000: expected at least 0, and below 1024",
    "--epochs=1.7e308": "epochs=1.7e+308: expected at least 0, and below",
    "--seed=9223372036854775808": "seed=9223372036854775808: expected",
    "--num_layers=1000000000": "num_layers=1000000000",
    "--d_model=262144": "GiB to train here",
    "--max_seq_len=10000000000000000000": "max_seq_len=",
    "--norm_eps=-1": "norm_eps=-1",
    "--norm_eps=nan": "norm_eps=nan",
    "--out_dir=": "out_dir=''",
    "--device=gpu": "device='gpu'",
    "--device=cuda": "device='cuda'",
    "--minutes=inf": "minutes=inf",
    TWICE: "without quotes it is 2 files",
}


@pytest.mark.parametrize("option", ABSURD)
def test_absurd_options_are_refused_before_anything_is_allocated(
    option, run, tmp_path
):
    if option == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has it")
    one_line(run("out", option), ABSURD[option])
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("seed", [20250101123456, 2**63 - 1])
def test_any_seed_trains(seed, run):
    well(run("out", f"--seed={seed}", "--max_steps=2"))


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(prepare, "find_data", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("out")


def test_a_full_disk_is_not_no_network(script, tmp_path, monkeypatch):
    "The toy corpus takes over where the corpus cannot be fetched, and only there."
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "poetry.jsonl")

    def unreachable():
        raise CannotFetch("no route to host")

    options = [*TINY, "--max_steps=2", "--vocab_size=300", f"--out_dir={tmp_path}/out"]
    monkeypatch.setitem(CORPORA, "poetry", full)
    one_line(script(train.main, *options), "poetry.jsonl: No space left on device")
    monkeypatch.setitem(CORPORA, "poetry", unreachable)
    said = well(script(train.main, *options))
    assert "no route to host. Training on the toy corpus" in said


def test_a_signal_before_the_first_step(run, monkeypatch):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        def during(*arguments, number=number):
            signal.raise_signal(number)

        monkeypatch.setattr(prepare, "prepare", during)
        one_line(run("out"), "finished runs are as they were", code)


def test_documents_with_nothing_to_predict(script, tmp_path):
    "One character each, and a vocabulary without <s> and </s>: not a perfect 0 bits."
    lines = [f'{{"text": "{char}"}}\n' for char in "ab" * 20]
    (tmp_path / "ab.jsonl").write_text("".join(lines))
    (tmp_path / "ab.json").write_text('{"a": 0, "b": 1}')
    options = [
        *TINY, "--held_out=0.6", f"--data_jsonl_path={tmp_path}/ab.jsonl",
        f"--vocab_dict_path={tmp_path}/ab.json", f"--out_dir={tmp_path}/out",
    ]
    one_line(script(train.main, *options), "nothing to predict")


def test_results_of_a_full_disk_name_the_file_and_come_with_resume(
    run, tmp_path, monkeypatch
):
    well(run("whole"))
    with monkeypatch.context() as patched:
        def files_that_do_not_fit(self, weights):
            return {"model.safetensors": no_space}

        patched.setattr(MiniKL, "files", files_that_do_not_fit)
        path = tmp_path / "out" / "model.safetensors"
        one_line(run("out"), f"{path}: No space left on device")
    well(run("out", "--resume"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


# ---- what a line of metrics covers


def lines_of(tmp_path, lr, **length):   # (Run, its lines of metrics)
    "Train without a folder of results, on the toy corpus."
    options = Options()
    options.model = replace(options.model, d_model=8, num_heads=2, num_kv_heads=1)
    options.data.corpus = "toy"
    options.run = replace(options.run, out_dir=str(tmp_path / "out"), **length)
    rates = {"lr": lr, "muon_lr": lr}
    options.learning = replace(options.learning, batch_size=4, candidates=0, **rates)
    run = trainer.Run(options, parallel.Ranks(threads=1))
    run.recorder = Recorder(options.run, {}, run.lines)
    try:
        run.train()
    finally:
        run.recorder.close()
    return run, [line for line in run.lines if "text" not in line]


def test_every_token_is_in_one_line(tmp_path):
    "With rates of 0 the weights stay as they are, and losses are known from outside."
    run, lines = lines_of(tmp_path, 0.0, max_steps=6, log_every=4, eval_every=3)
    assert [line["step"] for line in lines] == [3, 4, 6]
    for line, first in ((lines[1], 0), (lines[2], 4)):
        docs = []
        for step in range(first, line["step"]):
            docs += run.data.documents.batch(step, 4, 0)
        summed, n_targets = run.learner.model.loss(Nested(docs))
        mean = float(summed.detach() / n_targets)
        assert line["loss"] == pytest.approx(mean, rel=1e-5)
    assert lines[0]["bits_per_char"] == pytest.approx(run.bits_per_char(), rel=1e-6)
    assert lines[2]["tokens"] == run.progress.tokens


def test_a_run_shorter_than_a_step_takes_one(tmp_path):
    _, lines = lines_of(tmp_path, 0.02, minutes=1e-6)
    assert [line["step"] for line in lines] == [1]


def test_a_rate_that_is_far_too_high_is_one_line(run):
    one_line(run("out", "--lr=1e30", "--max_steps=20"), "lower --lr and --muon_lr")


# ---- several processes, as far as one can tell in one


def test_an_error_that_cannot_travel_is_still_told(monkeypatch):
    class TakesTwo(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def fails():
        raise TakesTwo("one", "two")

    ranks = parallel.Ranks(threads=1)
    with pytest.raises(TakesTwo):
        ranks.once_per_host(fails)
    shown = []

    def gather(self, thing):
        shown.append(thing)
        return [thing]

    monkeypatch.setattr(parallel.Ranks, "all", gather)
    with pytest.raises(TakesTwo):
        ranks.once_per_host(fails)
    assert type(shown[0]) is RuntimeError and "TakesTwo" in str(shown[0])


def test_only_one_process_of_a_host_hashes_the_tokens(run, tmp_path, monkeypatch):
    hashed = []
    true_hash = data.file_sha256

    def counted(path):
        hashed.append(path.name)
        return true_hash(path)

    monkeypatch.setattr(data, "file_sha256", counted)
    well(run("out", "--max_steps=1"))
    well(run("out-2", "--max_steps=1"))
    assert hashed.count("tokens") == 2 + 1   # built and checked, then checked once
