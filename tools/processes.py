"""Programs of this project as processes, for the lessons that start some.

    said = finished(python("minikl/train.py", "--max_steps=3", n_ranks=2))
"""
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port():   # int, of this computer
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def python(*arguments, n_ranks=0, **environment):   # Popen
    "Start Python in the project's folder, under torchrun where `n_ranks` is given."
    launcher = []
    if n_ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher.append(f"--nproc-per-node={n_ranks}")
    own = {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **own, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process):   # what it said
    "Wait for a process, which has to end well."
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return out
