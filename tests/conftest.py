"""What all tests share: scripts called here or as processes, a last line that counts.

`make test` runs the tests side by side (pytest-xdist); `python -m pytest tests` runs
them one after the other. `--long` adds those that take minutes.
"""
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))   # tests import hosts.py
# before minikl and torch are imported
os.environ.setdefault("TQDM_DISABLE", "1")
# threads that wait for one another sleep: where cores are shared, waiting at full speed
# took five times the computing
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# parts of names of tests that take long, in this order: they begin first
LONGEST = (
    "runs[nbs-13", "runs[nbs-12", "runs[nbs-11", "jupyterlab", "runs[nbs-15",
    "runs[nbs-14", "runs[nbs-00", "every_page", "runs[nbs-06", "runs[nbs-07",
    "killed_runs", "broken_resume", "lesson_runs",
    "no_process_ever", "slower_than", "hosts", "each_host_reads", "wheel",
    "of_any_rank", "on_one_rank", "all_find", "compiled_blocks", "any_jsonl",
    "two_processes", "without_network", "checkpoint_goes_on", "plan_measures",
    "no_damage", "ctrl_c",
)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests of minutes too")


def is_worker(config):
    return hasattr(config, "workerinput")


def pytest_configure(config):
    long = "long: takes minutes, and runs under --long only"
    config.addinivalue_line("markers", long)
    if is_worker(config):   # the cores are shared with its neighbours
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart(session):
    "Build the poetry corpus once, before lessons that run side by side want it."
    session.config.no_poetry = ""
    if is_worker(session.config):
        return
    build = "from minikl.corpora import build_poetry; build_poetry()"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        session.config.no_poetry = done.stderr.strip().splitlines()[-1]


def pytest_collection_modifyitems(config, items):
    "Leave out what takes minutes. Side by side, the longest begin first."
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
    if is_worker(config):
        items.sort(key=place)


def place(item):
    "The place of a test in LONGEST, or after all of them."
    found = (i for i, part in enumerate(LONGEST) if part in item.name)
    return next(found, len(LONGEST))


@pytest.fixture(autouse=True)
def same_draws():
    "Every test draws the same numbers, alone or among others: none fails by luck."
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def script(capfd):
    "Call a script without a process: script(train.main, '--max_steps=3')."
    import torch

    def call(main, *arguments):   # CompletedProcess
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        threads = torch.get_num_threads()
        capfd.readouterr()
        code = 0
        try:
            main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code or 0
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if hasattr(signal, "SIGUSR1"):
                faulthandler.unregister(signal.SIGUSR1)
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return call


@pytest.fixture
def run(script, tmp_path):
    "run('name', *options) trains a small run in this process, into tmp_path/name."
    from small_runs import GIVEN, TINY

    from minikl import train

    def call(name, *options):   # CompletedProcess
        out = tmp_path / name
        small = [*TINY, "--max_steps=8", *GIVEN]
        return script(train.main, *small, f"--out_dir={out}", *options)

    return call


@pytest.fixture
def home(tmp_path, monkeypatch):
    "Caches of a test go to a folder of its own; Ctrl-C is not ignored."
    from minikl import prepare
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def python():
    "Run Python in the root of the project: python('minikl/train.py', …)."
    def call(*arguments, cwd=ROOT, **options):   # CompletedProcess
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
            **options,
        )

    return call


@pytest.fixture(scope="session")
def torchrun(python):
    "The same under torchrun with two processes."
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")

    def call(*arguments, **options):   # CompletedProcess
        return python(*launcher, *arguments, **options)

    return call


@pytest.fixture
def two(tmp_path_factory):
    "train.main in two processes, as torchrun starts it but without its launcher."
    import two_processes

    def call(*arguments):   # CompletedProcess
        folder = tmp_path_factory.mktemp("two")
        return two_processes.run(map(str, arguments), folder)

    return call


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    "Make a folder once, whoever of the workers comes first: once('name', make)."
    from filelock import FileLock
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def call(name, make):   # Path; `make` fills the empty folder that it is given
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                unfinished = tmp_path_factory.mktemp(name)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return call


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    "The project without what is built, to let nbdev loose on."
    folder = tmp_path_factory.mktemp("project") / "minikl"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "out", "out-*", "_docs", "_proc", "data", "build",
        "__pycache__", "*.egg-info", ".ipynb_checkpoints",
    )
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def pytest_unconfigure(config):
    "What was left out and why, and the line that continuous integration counts."
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if is_worker(config) or not reporter:
        return

    def count(*kinds):
        return sum(len(reporter.stats.get(kind, [])) for kind in kinds)

    reason = getattr(config, "no_poetry", "")
    if reason:
        print(f"\nno poetry corpus, so lessons skipped their poetry parts: {reason}")
    skipped = f", {count('skipped')} skipped" if count("skipped") else ""
    print(f"\n{count('passed')} passed, {count('failed', 'error')} failed{skipped}")
