"The poetry corpus, if it can be had; and a last line that counts."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_sessionstart(session):
    "Build the poetry corpus once, so that lessons that run side by side find it."
    build = "from minikl.data import build_poetry; build_poetry()"
    session.config.poetry = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def python():
    "Run Python in the root of the project: python('minikl/train.py', '--max_steps=3') → CompletedProcess."
    def call(*arguments, cwd=ROOT, **options):
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600, **options)
    return call


@pytest.fixture(scope="session")
def torchrun(python):
    "The same under torchrun with two processes."
    return lambda *arguments, **options: python("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *arguments, **options)


def pytest_unconfigure(config):
    "What was left out and why, and the line that continuous integration counts."
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not reporter: return
    count = lambda *kinds: sum(len(reporter.stats.get(kind, [])) for kind in kinds)
    skipped = f", {count('skipped')} skipped" if count("skipped") else ""
    if config.poetry.returncode: print(f"\nno poetry corpus, so lessons skipped their poetry parts: {config.poetry.stderr.strip().splitlines()[-1]}")
    print(f"\n{count('passed')} passed, {count('failed', 'error')} failed{skipped}")
