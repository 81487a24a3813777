"""Two processes of one run, without torchrun.

A server imports PyTorch once and forks itself for each process, where that is possible:
a run starts in a tenth of a second instead of several.
"""
import importlib
import multiprocessing
import os
import subprocess
import sys

from processes import free_port

WAYS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in WAYS else "spawn")
CONTEXT.set_forkserver_preload(["minikl.train"])


def run(
    arguments,  # of the script minikl/train.py
    folder,     # where what the processes print is kept
    script="minikl.train",  # module with a `main`
):              # CompletedProcess; its exit code is the first that is not 0
    "Train with two processes."
    port = free_port()
    arguments = list(arguments)
    ranks = [
        CONTEXT.Process(target=begin, args=(rank, port, arguments, folder, script))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
        process.join()
    code = next((p.exitcode for p in ranks if p.exitcode), 0)
    said = [(folder / name).read_text(encoding="utf-8") for name in ("out", "errors")]
    return subprocess.CompletedProcess(arguments, code, *said)


def begin(rank, port, arguments, folder, script):
    "What each process does."
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "errors")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
        stream.reconfigure(encoding="utf-8")
    importlib.import_module(script).main(arguments)
