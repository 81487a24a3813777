"Programs of this project as processes, for the lessons that start some."
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, n_ranks=0, **environment):   # Popen
    "Start Python on `arguments` from the project's folder, under torchrun where `n_ranks` is given."
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"] if n_ranks else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", **environment}
    return subprocess.Popen([sys.executable, *launcher, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process):   # what it said
    "Wait for a process, which has to end well."
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return out
