"The site and JupyterLab, as a reader sees them in a browser."
import http.server
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
from conftest import ROOT
from processes import free_port
from test_project import ENTRIES, LESSONS, PAGES, SOLUTIONS

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the site needs Quarto, or Python 3.11 or newer"
)


@pytest.fixture(scope="session")
def site(copy, python, once):   # Path
    "The site, built once for all tests; the builder refuses pages with faults."
    def build(folder):
        done = python("tools/docs.py", cwd=copy)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        shutil.copytree(copy / "_docs", folder, dirs_exist_ok=True)

    return once("site", build)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder):   # str: address
    handler = partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium
        started = chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


# ---- what the builder says


def test_site_has_a_page_for_each_lesson(site):
    lessons = {path.stem.split("_", 1)[1] for path in LESSONS}
    for folder, stems in (
        ("", lessons | {path.stem for path in ENTRIES}),
        ("reference", {path.stem for path in PAGES}),
        ("solutions", {path.stem.split("_", 1)[1] for path in SOLUTIONS}),
    ):
        assert {path.stem for path in (site / folder).glob("*.html")} == stems
    for name in lessons:
        assert "本课小结" in (site / f"{name}.html").read_text(encoding="utf-8"), name


SOURCES = "https://github.com/minikl/minikl/blob/main/"


def test_every_page_links_to_its_notebook(site):
    "The builder refuses links to files that are not there."
    texts = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    for path in [*LESSONS, *ENTRIES, *PAGES, *SOLUTIONS]:
        link = f'href="{SOURCES}{path.relative_to(ROOT)}" class="toc-action"'
        assert sum(link in text for text in texts) == 1, path


BAD_PAGES = {   # what stands on a page: what the builder says of it
    '<a href="none.html">x</a>': "none.html leads nowhere",
    f'<a href="{SOURCES}none.md">x</a>': "none.md is not in the repository",
    '<a href="#none">x</a>': "#none has no such place",
    '<img alt="x" src="https://a.example/x.png">': "loads https://a.example/x.png",
    '<img src="here.png">': "1 pictures say nothing (alt)",
    "<p>Call self as a function.</p>": "an entry that says nothing",
    f"<p>{ROOT}/x.py</p>": "a path of the machine",
    "<p>[`x`](y)</p>": "a link that was not rendered",
}


@pytest.mark.parametrize("html", BAD_PAGES)
def test_the_builder_refuses_a_bad_page(html, tmp_path):
    import docs
    (tmp_path / "a.html").write_text('<h2 id="here">x</h2><a href="#here">y</a>')
    assert docs.faults(tmp_path) == []
    (tmp_path / "b.html").write_text(html)
    (fault,) = docs.faults(tmp_path)
    assert fault.startswith("b.html: ") and BAD_PAGES[html] in fault


# ---- what a browser says

VIEWS = [(1400, "light"), (1400, "dark"), (390, "light"), (390, "dark")]


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_page_loads(site, browser, width, scheme):
    "No error on the console, no request to another host, nothing wider than the page."
    screen = {"width": width, "height": 900}
    page = browser.new_page(viewport=screen, color_scheme=scheme)
    problems = []
    with served(site) as address:
        def look(request):
            if not request.url.startswith((address, "data:")):
                problems.append(f"asks for {request.url}")

        page.on("request", look)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda said: said.type == "error" and problems.append(said.text),
        )
        paths = sorted(site.rglob("*.html"))
        for path in paths:
            page.goto(f"{address}/{path.relative_to(site)}")
            too_wide = page.evaluate(
                "document.documentElement.scrollWidth - window.innerWidth"
            )
            if too_wide > 0:
                problems.append(f"{path.name} is {too_wide} pixels too wide")
    page.close()
    assert len(paths) >= 60
    assert not problems, "\n".join(problems)


@needs_browser
@pytest.mark.parametrize("words", ["RoPE", "注意力", "诗", "gradient clipping"])
def test_search_finds(site, browser, words):
    page = browser.new_page()
    with served(site) as address:
        page.goto(f"{address}/index.html")
        page.fill(".smalldocs-search input", words)
        page.wait_for_selector(".search-result", timeout=10_000)
        assert page.locator(".search-result").count() > 0
    page.close()


@needs_browser
def test_hints_are_folded_and_open(site, browser):
    page = browser.new_page()
    with served(site) as address:
        page.goto(f"{address}/rope.html")
        hint = page.locator("details:not(.code-fold, .contents)").first
        assert hint.get_attribute("open") is None
        hint.locator("summary").click()
        assert hint.get_attribute("open") is not None
    page.close()


@needs_browser
@pytest.mark.parametrize("width", [1400, 1024, 390])
def test_contents_of_a_page_are_at_hand(site, browser, width):
    "In the margin, or folded under the title."
    page = browser.new_page(viewport={"width": width, "height": 900})
    with served(site) as address:
        page.goto(f"{address}/rope.html")
        assert page.locator("#TOC").is_visible() == (width == 1400)
        folded = page.locator("details.contents")
        assert folded.is_visible() == (width < 1400)
        if width < 1400:
            folded.locator("summary").click()
            folded.get_by_role("link", name="Exercises").click()
            assert page.url.endswith("#exercises")
    page.close()


# ---- JupyterLab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):   # str: address
    "JupyterLab over a copy of the lessons, as `make lab` starts it."
    folder = tmp_path_factory.mktemp("lab")
    for name in ("nbs", "data", "tools"):
        ignore = shutil.ignore_patterns("cache", "*.tgz")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    port = free_port()
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    as_make_does = shlex.split(re.search(r"^LAB := (.*)$", makefile, re.M)[1])
    options = [f"--port={port}", "--IdentityProvider.token=", *as_make_does]
    server = subprocess.Popen(
        [*command, *options, "nbs/index.ipynb"], cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield address, folder / "nbs"
    server.terminate()
    server.wait(30)


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()


def saved_code(page, path):   # list of code cells that are not empty
    page.wait_for_timeout(2000)
    page.keyboard.press("Control+s")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code" and cell["source"]]


@needs_browser
def test_jupyterlab_opens_the_home_page(lab, browser):
    "Its pictures are seen, nothing asks a question, and no style file is listed."
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"{lab[0]}/lab/tree/index.ipynb?reset")
    page.get_by_text("Start here").first.wait_for(timeout=120_000)
    page.wait_for_selector('.jp-DirListing-item:has-text("index.ipynb")')
    page.wait_for_timeout(5000)   # a window about news would come by now
    pictures = page.locator(".jp-MarkdownOutput img")
    widths = pictures.evaluate_all("found => found.map(image => image.naturalWidth)")
    assert len(widths) == 2 and min(widths) > 100
    assert page.locator(".Toastify__toast, .jp-Dialog").count() == 0
    listed = page.locator(".jp-DirListing-itemName").all_inner_texts()
    assert not [name for name in listed if name.endswith((".yml", ".css", ".svg"))]
    page.close()


@needs_browser
def test_three_lessons_run_in_jupyterlab(lab, browser):
    "From top to bottom, by the menu; then no cell has an error, and all have run."
    address, folder = lab
    idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
    for name in ("00_first_verse", "03_rope", "05_model"):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{address}/lab/tree/{name}.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        page.wait_for_selector(idle, timeout=120_000)
        deadline = time.time() + 400
        asked = 0
        missing = n_cells = 1
        while missing and time.time() < deadline:
            if missing == n_cells and time.time() > asked + 60:
                run_all(page)   # again, where the first click came too early
                asked = time.time()
            code = saved_code(page, folder / f"{name}.ipynb")
            n_cells = len(code)
            missing = sum(not cell["execution_count"] for cell in code)
        page.close()
        outputs = [output for cell in code for output in cell["outputs"]]
        errors = [output for output in outputs if output["output_type"] == "error"]
        assert not errors and not missing, (name, missing, errors)
