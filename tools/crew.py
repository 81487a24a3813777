"""Functions of a lesson on several processes, each of which is one rank of a group.

    results = on_ranks(folder, 2, work, helper)    # what work(Ranks()) returned on each

The source of `work` and of its helpers goes into a script, which starts once for each
rank, with the variables that torchrun would set.
"""
import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch
from processes import free_port

ROOT = Path(__file__).resolve().parent.parent
HEAD = """
import faulthandler, gc, signal, time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from minikl.layouts import Nested
from minikl.model import MiniKL, MiniKLConfig
from minikl.parallel import Objective, Ranks, micro_batches, shard
"""
TAIL = """
ranks = Ranks(threads=1)
torch.save({name}(ranks), folder / f"{name}-{{ranks.rank}}.pt")
gc.collect()
dist.destroy_process_group()
"""


def start_ranks(folder, n_ranks, work, *helpers, **environment):
    "List of Popen: processes that call `work(Ranks())` and save what it returns."
    functions = "\n".join(map(inspect.getsource, (*helpers, work)))
    tail = TAIL.format(name=work.__name__)
    script = folder / f"{work.__name__}.py"
    script.write_text(f"{HEAD}\nfolder = Path({str(folder)!r})\n{functions}\n{tail}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(n_ranks)
    ]


def on_ranks(folder, n_ranks, work, *helpers):
    "List of what `work(Ranks())` returned on each of `n_ranks` processes."
    for process in start_ranks(folder, n_ranks, work, *helpers):
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-2000:]
    files = [folder / f"{work.__name__}-{rank}.pt" for rank in range(n_ranks)]
    return [torch.load(file, weights_only=False) for file in files]
