"The notebooks are the source: everything else follows from them."
import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import sys
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT

LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
SOURCES = [*LESSONS, ROOT / "nbs" / "index.ipynb"]
PACKAGE = sorted((ROOT / "minikl").glob("*.py"))


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    "The project without what is built, to let nbdev loose on."
    folder = tmp_path_factory.mktemp("project") / "minikl"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "out", "_docs", "_proc", "data", "build", "__pycache__",
        "*.egg-info", ".ipynb_checkpoints",
    )
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def files(folder, pattern):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


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
    found = {}
    for path in LESSONS:
        code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
        for cell in code:
            for name in set(re.findall(r"^class (\w+)", "".join(cell["source"]), re.M)):
                found.setdefault(name, []).append(path.stem)
    assert not {name: stems for name, stems in found.items() if len(stems) > 1}


# from the lowest to the highest: a module imports only from those before it
MODULES = (
    "files tokenizer data rope attention nested model training parallel generate train "
    "bench llama report"
).split()


def imported(path):   # set of dotted names, of this package's modules as "minikl.…"
    "What a module imports anywhere, inside functions too."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["minikl" * node.level, node.module]))
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if module == "minikl" else {module}
    return found


def test_every_module_has_its_place():
    assert set(MODULES) | {"__init__", "_modidx"} == {path.stem for path in PACKAGE}


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_only_from_lower_ones(name):
    names = imported(ROOT / "minikl" / f"{name}.py")
    own = {name.split(".")[1] for name in names if name.startswith("minikl.")}
    lower = MODULES[:MODULES.index(name)]
    assert own <= set(lower), f"{name} imports {sorted(own - set(lower))}"


def declared(key):   # list of names of packages
    "What settings.ini asks for, without versions."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return [re.split("[<>=;]", name)[0] for name in config["DEFAULT"][key].split()]


def test_what_the_package_imports_is_declared():
    names = set().union(*map(imported, PACKAGE))
    others = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    known = {*declared("requirements"), *declared("wandb_requirements")}
    assert others - {"minikl"} <= known


def test_what_is_declared_is_imported():
    "By an import, or by a name in quotes where not every Python needs it."
    names = {name.split(".")[0] for path in PACKAGE for name in imported(path)}
    code = "".join(path.read_text(encoding="utf-8") for path in PACKAGE)
    required = declared("requirements")
    unused = [name for name in required if name not in names and f'"{name}' not in code]
    assert not unused


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


@pytest.fixture
def installed(tmp_path, copy, python):
    "The package as `pip install .` puts it into site-packages, away from the project."
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    offline = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    for command in (
        ["wheel", "--wheel-dir", wheels, "."],
        ["install", "--target", site, "--find-links", wheels, "minikl"],
    ):
        done = python("-m", "pip", command[0], *offline, *command[1:], cwd=copy)
        assert done.returncode == 0, done.stderr
    return site


def tree(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_wheel_trains_in_an_empty_folder(installed, tmp_path, python):
    "Its corpora go to the user's cache or to MINIKL_HOME, never into the package."
    found = importlib.metadata.distributions(name="minikl", path=[str(installed)])
    scripts = {entry.name for entry in next(iter(found)).entry_points}
    assert {"minikl-train", "minikl-generate", "minikl-report"} <= scripts
    before = tree(installed)
    assert installed / "minikl" / "train.py" in before
    home, elsewhere, empty = (tmp_path / name for name in ("home", "other", "empty"))
    for folder in (home, empty):
        folder.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home), "USERPROFILE": str(home), "LOCALAPPDATA": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),   # its list of fonts takes seconds
    }
    environment.pop("MINIKL_HOME", None)
    done = python(
        "-m", "minikl.train", "--corpus=toy", "--max_steps=3", "--eval_documents=8",
        "--d_model=32", "--num_heads=2", "--num_kv_heads=2", "--num_layers=1",
        "--threads=1", cwd=empty, env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (empty / "out" / "model.safetensors").exists()
    assert [path.name for path in empty.iterdir()] == ["out"]
    assert any(path.name == "toy.jsonl" for path in tree(home))
    code = "from minikl.data import build_toy; print(build_toy())"
    environment["MINIKL_HOME"] = str(elsewhere)
    done = python("-c", code, cwd=empty, env=environment)
    assert elsewhere in Path(done.stdout.strip()).parents, done.stdout + done.stderr
    assert tree(installed) == before
