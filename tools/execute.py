"""Execute lessons in place and store their outputs.

    python tools/execute.py [nbs/01_tokenizer.ipynb …]

Without arguments: all of them.
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbdev.clean import nbdev_clean

ROOT = Path(__file__).resolve().parent.parent
SKIP = re.compile(r"^\s*#\s*\|\s*eval\s*:\s*false", re.M)


class Client(NotebookClient):
    """Leaves cells marked `#| eval: false` and their outputs alone.

    Unlike nbdev_test it does run slow cells.
    """
    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type == "code" and SKIP.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, **options)


def execute(path):
    "Execute a notebook, and store it as nbdev wants it."
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    Client(notebook, timeout=1200, kernel_name="python3", resources=place).execute()
    notebook, _ = CoalesceStreamsPreprocessor(enabled=True).preprocess(notebook, {})
    nbformat.write(notebook, path)
    nbdev_clean.__wrapped__(str(path))


def main():
    # progress bars make poor stored outputs, and so does tqdm's wish for widgets
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    lessons = sorted((ROOT / "nbs").glob("*.ipynb"))
    pages = sorted((ROOT / "nbs" / "reference").glob("*.ipynb"))
    for path in paths or [*lessons, *pages]:
        print(path.name, flush=True)
        execute(path)


if __name__ == "__main__":
    main()
