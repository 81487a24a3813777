"The notebooks are the source: everything else follows from them."
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
SOURCES = [*LESSONS, ROOT / "nbs" / "index.ipynb"]


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    "The project without what is built, to let nbdev loose on."
    folder = tmp_path_factory.mktemp("project") / "minikl"
    ignore = shutil.ignore_patterns(".git", ".venv", "out", "_docs", "_proc", "data", "__pycache__", "*.egg-info", ".ipynb_checkpoints")
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def files(folder, pattern): return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def test_package_is_what_the_lessons_export(copy, python):
    shutil.rmtree(copy / "minikl")
    done = python("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)
    assert done.returncode == 0, done.stderr
    assert files(copy / "minikl", "*.py") == files(ROOT / "minikl", "*.py"), "edit the lessons, never minikl/; then: make export"


def test_lessons_are_clean(copy, python):
    before = files(copy / "nbs", "*.ipynb")
    done = python("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copy)
    assert done.returncode == 0, done.stderr
    assert files(copy / "nbs", "*.ipynb") == before, "run nbdev_clean"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_shows_its_outputs(path):
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot: run make execute"


def test_no_class_is_defined_twice():
    names = [name for path in LESSONS for cell in cells(path) if cell["cell_type"] == "code"
             for name in set(re.findall(r"^class (\w+)", "".join(cell["source"]), re.M))]
    assert sorted(names) == sorted(set(names))


def test_rooms_import_only_from_lower_rooms():
    exported = {path.stem: re.search(r"#\| *default_exp (\w+)", path.read_text(encoding="utf-8")) for path in LESSONS}
    module = {name: found[1] for name, found in exported.items() if found}   # some lessons only show
    names = list(module)
    for i, name in enumerate(names):
        source = (ROOT / "minikl" / f"{module[name]}.py").read_text(encoding="utf-8")
        used = set(re.findall(r"^from (?:minikl)?\.(\w+) import", source, re.M))
        assert used <= {module[lower] for lower in names[:i]}, f"{name} reaches upwards"


def test_no_module_hides_the_standard_library():
    assert not {path.stem for path in (ROOT / "minikl").glob("*.py")} & set(sys.stdlib_module_names)


def test_package_is_plain_pytorch(python):
    code = ("import sys, pkgutil, importlib, minikl\n"
            "for module in pkgutil.iter_modules(minikl.__path__): importlib.import_module('minikl.' + module.name)\n"
            "print(sorted({'transformers', 'tokenizers', 'deepspeed', 'lightning', 'wandb'} & set(sys.modules)))")
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_lesson_runs(path, python):
    done = python("-c", f"from nbdev.test import nbdev_test; nbdev_test(path={str(path)!r}, n_workers=0)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the site needs Quarto, or Python 3.11 or newer")
def test_site_has_a_page_for_each_lesson(copy, python):
    done = python("tools/docs.py", cwd=copy)
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (copy / "_docs").glob("*.html")}
    assert set(pages) == {"index", *(path.stem.split("_", 1)[1] for path in LESSONS)}
    assert all("本课小结" in page for name, page in pages.items() if name != "index")
