"Execute lessons in place and store their outputs: python tools/execute.py [nbs/01_tokenizer.ipynb …]"
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbdev.clean import nbdev_clean

SKIP = re.compile(r"^\s*#\s*\|\s*eval\s*:\s*false", re.M)


class Client(NotebookClient):
    "Leaves cells marked `#| eval: false` and their outputs alone; unlike nbdev_test it does run slow cells."
    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type == "code" and SKIP.search(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **options)


def execute(path):
    notebook = nbformat.read(path, as_version=4)
    Client(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook, _ = CoalesceStreamsPreprocessor(enabled=True).preprocess(notebook, {})
    nbformat.write(notebook, path)
    nbdev_clean.__wrapped__(str(path))


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")   # progress bars make poor stored outputs
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")   # so does tqdm's wish for widgets
    root = Path(__file__).resolve().parent.parent
    for path in [Path(name).resolve() for name in sys.argv[1:]] or sorted((root / "nbs").glob("*.ipynb")):
        print(path.name, flush=True)
        execute(path)
