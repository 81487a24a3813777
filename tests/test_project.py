"The notebooks are the source: everything else follows from them."
import ast
import configparser
import importlib.metadata
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import pytest
from conftest import ROOT

LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
PAGES = sorted((ROOT / "nbs" / "reference").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "nbs" / "solutions").glob("*.ipynb"))
ENTRIES = [ROOT / "nbs" / "index.ipynb", ROOT / "nbs" / "glossary.ipynb"]
SOURCES = [*LESSONS, *PAGES, *SOLUTIONS, *ENTRIES]
PACKAGE = sorted((ROOT / "minikl").glob("*.py"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def files(folder, pattern):   # {path inside the folder: bytes}
    paths = folder.glob(pattern)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_package_is_what_the_lessons_export(copy, python):
    for path in (copy / "minikl").rglob("*.py"):
        path.unlink()
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    done = python("-c", export, cwd=copy)
    assert done.returncode == 0, done.stderr
    exported = files(copy / "minikl", "**/*.py")
    fix = "edit the lessons, never minikl/; then: make export"
    assert exported == files(ROOT / "minikl", "**/*.py"), fix


def test_lessons_are_clean(copy, python):
    before = files(copy / "nbs", "**/*.ipynb")
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    done = python("-c", clean, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert files(copy / "nbs", "**/*.ipynb") == before, "run nbdev_clean"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_shows_its_outputs(path):
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "text/html"}, "no plot: run make execute"


def test_no_class_is_defined_twice():
    lessons_of = defaultdict(list)
    for path in [*LESSONS, *PAGES]:
        for cell in cells(path):
            if cell["cell_type"] != "code":
                continue
            code = "".join(cell["source"])
            for name in set(re.findall(r"^class (\w+)", code, re.M)):
                lessons_of[name].append(path.stem)
    assert not {name: stems for name, stems in lessons_of.items() if len(stems) > 1}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_first_cell_is_title_and_summary(path):
    "nbdev drops what else stands in it."
    lines = "".join(cells(path)[0]["source"]).splitlines()
    assert lines[0].startswith("# ")
    assert [line for line in lines[1:] if line and not line.startswith("> ")] == []


@pytest.mark.parametrize("path", [*LESSONS, *PAGES], ids=lambda path: path.stem)
def test_what_a_page_exports_is_shown(path):
    "`#| export` hides a cell on the site; imports may be hidden, definitions not."
    for cell in cells(path):
        code = "".join(cell["source"])
        is_hidden = cell["cell_type"] == "code" and re.match(r"#\| exporti?\s", code)
        assert not (is_hidden and re.search(r"^(def|class) ", code, re.M)), code


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_says_what_it_is_about(path):
    "In Chinese and in English, what one needs to know, and how long it takes."
    texts = [cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"]
    beginning = "".join("".join(text) for text in texts[:6])
    for part in ("**导读", "**The question.**", "**You need**", "**It takes**"):
        assert part in beginning, part


# ---- the first reader

PART_ONE = [path for path in LESSONS if "01" <= path.stem[:2] <= "07"]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def words(text):
    "Words of prose; two Chinese characters count as one word."
    return len(re.findall(r"[A-Za-z0-9_']+", text)) + len(CHINESE.findall(text)) // 2


def lines_of_lesson(path):
    "Lines of code in a lesson, directives and empty lines left out."
    total = 0
    for cell in cells(path):
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            lines = [line.strip() for line in lines]
            total += sum(bool(line) and not line.startswith("#|") for line in lines)
    return total


def words_of_lesson(path):
    texts = [cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"]
    return sum(words("".join(text)) for text in texts)


@pytest.mark.parametrize("path", PART_ONE, ids=lambda path: path.stem)
def test_a_lesson_of_part_one_is_short(path):
    assert len(cells(path)) <= 60


def test_part_one_is_read_in_a_weekend():
    assert len(PART_ONE) == 7
    assert sum(map(words_of_lesson, PART_ONE)) <= 16_000
    assert sum(map(lines_of_lesson, PART_ONE)) <= 1_600


# ---- layers

# from below to above: a module imports only from those before it
MODULES = (
    "files chat jsonl bpe tokenizer data rope attention layouts limits model step lora "
    "generate policy parallel checkpoint corpora rhyme form instruct dpo options "
    "record prepare folder shortcuts learner ingredients resume trainer law plan "
    "train grpo recorded charts words page report bench llama writer api serve asking "
    "compared compare"
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


def own_modules(path):   # set of names; "__init__" for the package itself
    "The modules of this package that one of them imports."
    found = set()
    for name in imported(path):
        package, _, rest = name.partition(".")
        module = rest.split(".")[0]
        if package == "minikl":
            found.add("__init__" if module.startswith("__") else module or "__init__")
    return found


def reaches(imports, start, goal):
    "Whether one module leads to another, through any number of imports."
    seen = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            waiting.extend(imports.get(name, ()))
    return False


def misplaced_imports(
    folder,  # of the package
    order,   # names of its modules, from below to above
):           # list of lines; each names the module that imports and what it imports
    "Imports upwards, in a circle, or of modules that have no place in the order."
    imports = {path.stem: own_modules(path) for path in sorted(folder.glob("*.py"))}
    place = {name: i for i, name in enumerate(["__init__", *order, "_modidx"])}
    faults = [f"{name} has no place" for name in imports if name not in place]
    for name in imports.keys() & place.keys():
        for other in imports[name]:
            if other not in place or other not in imports:
                faults.append(f"{name} imports {other}, which is unknown")
            elif place[other] >= place[name]:
                circle = ", in a circle" if reaches(imports, other, name) else ""
                faults.append(f"{name} imports {other} upwards{circle}")
    return sorted(faults)


def test_modules_import_only_from_lower_ones():
    faults = misplaced_imports(ROOT / "minikl", MODULES)
    assert not faults, "\n".join(faults)


def test_every_module_has_its_place():
    assert {*MODULES, "__init__", "_modidx"} == {path.stem for path in PACKAGE}


def test_contributing_lists_the_modules_in_order():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = page.split("```")[1]
    listed = re.findall(r"^(\w+) ", house, re.MULTILINE)
    assert listed == MODULES


INDENTED = "def f():\n    if True:\n        {}\n"
UPWARDS = ["low imports high upwards"]
CIRCLE = ["low imports high upwards, in a circle"]
ITSELF = ["low imports low upwards, in a circle"]
UNKNOWN = ["high imports none, which is unknown"]
IMPORTS = {   # what happens: (code of low, code of high, what has to be found)
    "downwards": ("", "from minikl.low import x", []),
    "package": ("from minikl import __version__", "from . import low", []),
    "upwards": ("from minikl.high import x", "", UPWARDS),
    "indented": (INDENTED.format("from minikl.high import x"), "", UPWARDS),
    "indented module": (INDENTED.format("from minikl import high"), "", UPWARDS),
    "indented name": (INDENTED.format("import minikl.high"), "", UPWARDS),
    "indented relative": (INDENTED.format("from .high import x"), "", UPWARDS),
    "indented dot": (INDENTED.format("from . import high"), "", UPWARDS),
    "circle": ("from .high import x", "from .low import x", CIRCLE),
    "itself": ("from minikl import low", "", ITSELF),
    "unknown": ("", "import minikl.none", UNKNOWN),
    "indented unknown": ("", INDENTED.format("from . import none"), UNKNOWN),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_a_misplaced_import_is_found(name, tmp_path):
    low, high, faults = IMPORTS[name]
    for module, code in {"low": low, "high": high, "__init__": ""}.items():
        (tmp_path / f"{module}.py").write_text(code)
    assert misplaced_imports(tmp_path, ["low", "high"]) == faults


def test_a_module_without_a_place_is_found(tmp_path):
    (tmp_path / "other.py").write_text("")
    assert misplaced_imports(tmp_path, ["low"]) == ["other has no place"]


# ---- how the code is written


def test_ruff(python):
    folders = ["nbs", "minikl", "tests", "tools", "setup.py"]
    done = python("-m", "ruff", "check", "--output-format=concise", *folders)
    last_lines = (done.stdout + done.stderr).splitlines()[-20:]
    assert done.returncode == 0, "\n".join(last_lines)


WRITTEN = [path for path in PACKAGE if not path.name.startswith("_")]


def lines_with_code(path):   # number of lines that are neither empty nor a comment
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(bool(line.strip()) and line.strip()[0] != "#" for line in lines)


def syntax_nodes(path):   # number of nodes of the syntax tree
    return len(list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


each_module = pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)


@each_module
def test_a_module_is_short(path):
    "At most 300 lines with code."
    assert lines_with_code(path) <= 300


@each_module
def test_a_module_is_not_dense(path):
    "At most 10.5 syntax nodes a line."
    assert syntax_nodes(path) / lines_with_code(path) <= 10.5


@each_module
def test_a_module_fits_on_a_page(path):
    "At most 88 columns, but for `__all__`, which nbdev writes."
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^__all__ = \[.*?\]$", "", text, flags=re.M | re.S)
    assert not [line for line in text.splitlines() if len(line) > 88]


def test_the_package_is_not_dense():
    "At most 9 syntax nodes a line."
    n_lines = sum(map(lines_with_code, WRITTEN))
    assert sum(map(syntax_nodes, WRITTEN)) / n_lines <= 9.0


# ---- links

TEXTS = [
    *SOURCES,
    *sorted(ROOT.glob("*.md")),
    ROOT / "data" / "README.md",
]
FENCED = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.M | re.S)
LINK = re.compile(
    r"""\]\([ ]*<?([^)\s>]+)                  # [text](target "title"), ![image](target)
    |^\[[^\]]+\]:[ ]+(\S+)                  # [text]: target
    |<[^<>]*\b(?:src|href)=["']([^"']+)      # <img src="target">
    """,
    re.M | re.X,
)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.I)   # https:, mailto:, attachment:


def markdown(path):
    "What a markdown file says, or the markdown cells of a notebook; without programs."
    if path.suffix == ".ipynb":
        texts = [cell for cell in cells(path) if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in texts)
    else:
        text = path.read_text(encoding="utf-8")
    return FENCED.sub("", text)


def anchors(path):   # set of what may stand behind # in a link
    "The headings as GitHub and nbdev name them: lower case, hyphens, no punctuation."
    found = set()
    times = Counter()
    text = markdown(path)
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", text, re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return found | set(re.findall(r"<[^<>]*\b(?:id|name)=[\"']([^\"']+)", text))


def broken_links(path):   # list of links as they are written
    "Relative links to files or headings that are not there."
    text = re.sub(r"`[^`\n]+`", "", markdown(path))
    links = ["".join(found) for found in LINK.findall(text)]
    broken = []
    for link in links:
        if ELSEWHERE.match(link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_picture_says_what_is_seen(path):
    "To somebody who cannot see it."
    assert "![](" not in markdown(path)


def test_every_schema_is_shown():
    lessons = "".join(map(markdown, [*LESSONS, ROOT / "nbs" / "index.ipynb"]))
    schemas = {path.name for path in (ROOT / "nbs" / "images").glob("*.svg")}
    assert schemas
    assert not {name for name in schemas if f"images/{name})" not in lessons}


def test_a_broken_link_is_found(tmp_path):
    cell = {"cell_type": "markdown", "source": ["## `share`: dealing, a *step*\n", "x"]}
    notebook = json.dumps({"cells": [cell]})
    (tmp_path / "a.ipynb").write_text(notebook, encoding="utf-8")
    good = (
        "[a](a.ipynb#share-dealing-a-step) [b](#你好-x) [c](https://x.y/none) "
        "[`d`](a.ipynb \"title\") `[e](none)` ![f](t.md#x-1)\n\n"
        "## 你好 x\n# x\n# X\n```\n# program [g](none)\n```\n"
    )
    bad = (
        "[a](none.ipynb) [b](a.ipynb#share) ![c](none.png) [d](#program-g)\n"
        "<img width=3 src='none.svg'>\n[e]: none.md\n"
    )
    (tmp_path / "t.md").write_text(good + bad, encoding="utf-8")
    assert broken_links(tmp_path / "t.md") == [
        "none.ipynb", "a.ipynb#share", "none.png", "#program-g", "none.svg", "none.md",
    ]


# ---- a page has one name, wherever it is named

SIDEBAR = (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8")
HOME = ROOT / "nbs" / "index.ipynb"


def title(path):   # what stands behind the first #
    return "".join(cells(path)[0]["source"]).splitlines()[0].removeprefix("# ")


def path_table(path):   # {number of a lesson: [lesson, question, needs, minutes]}
    "The table of the path, as a README or the home page shows it."
    table = {}
    for line in markdown(path).splitlines():
        row = [text.strip() for text in line.replace("(nbs/", "(").split("|")]
        if len(row) == 7 and row[1].isdigit():
            table[row[1]] = row[2:6]
    return table


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_one_name(path):
    "In its title, in the sidebar, in the table of the path, and on its solutions."
    number, name = path.stem[:2], title(path)
    lesson = path_table(ROOT / "README.md")[number][0]
    assert lesson == f"[{name}]({path.name})"
    solutions = path.parent / "solutions" / path.name
    assert title(solutions) == f"Solutions: {name}"
    for place in (path.name, f"solutions/{path.name}"):
        assert re.search(rf"text: {number} {name}\n +href: {place}\n", SIDEBAR)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_reference_page_has_one_name(path):
    name = re.escape(title(path))
    assert re.search(rf"text: {name}\n +href: reference/{path.name}\n", SIDEBAR)


def test_tables_of_the_path_agree():
    "The home page says in two languages what each README says in one."
    home = path_table(HOME)
    english = path_table(ROOT / "README.md")
    chinese = path_table(ROOT / "README.zh-CN.md")
    assert list(home) == list(english) == list(chinese)
    assert list(home) == [path.stem[:2] for path in LESSONS]
    for number, (lesson, question, *rest) in home.items():
        name, file = re.fullmatch(r"\[(.*)\](\(.*\))", chinese[number][0]).groups()
        first, asked, *others = english[number]
        assert lesson == f'{first}<br><span lang="zh">{name}</span>'
        assert first.endswith(file)
        assert question == f'{asked}<br><span lang="zh">{chinese[number][1]}</span>'
        assert rest == others == chinese[number][2:]


def test_minutes_of_the_three_ways():
    "What the home page promises is the sum of the minutes of the lessons."
    minutes = {number: int(row[3]) for number, row in path_table(HOME).items()}
    weekend = sum(minutes[path.stem[:2]] for path in PART_ONE)
    for total in (minutes["00"], weekend, sum(minutes.values())):
        assert f"*{total} minutes*" in markdown(HOME)


# ---- what is declared, and what is installed


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
    assert not {path.stem for path in PACKAGE} & set(sys.stdlib_module_names)


IMPORT_ALL = """
import importlib, pkgutil, sys
import minikl
for module in pkgutil.iter_modules(minikl.__path__):
    importlib.import_module("minikl." + module.name)
others = {"transformers", "tokenizers", "deepspeed", "lightning", "wandb"}
print(sorted(others & set(sys.modules)))
"""


def test_package_is_plain_pytorch(python):
    done = python("-c", IMPORT_ALL)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def place(path):   # "nbs-03_rope", "solutions-03_rope"
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_lesson_runs(path, python):
    call = f"nbdev_test(path={str(path)!r}, n_workers=0)"
    done = python("-c", f"from nbdev.test import nbdev_test; {call}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture
def installed(tmp_path, copy, python):
    "The package as `pip install .` puts it into site-packages, away from the project."
    wheels = tmp_path / "wheels"
    site = tmp_path / "site"
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
    assert installed / "minikl" / "serve.html" in before
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
    code = "from minikl.corpora import build_toy; print(build_toy())"
    environment["MINIKL_HOME"] = str(elsewhere)
    done = python("-c", code, cwd=empty, env=environment)
    assert elsewhere in Path(done.stdout.strip()).parents, done.stdout + done.stderr
    assert tree(installed) == before
