"""Render the lessons into _docs/.

    python tools/docs.py

By Quarto where it is installed, otherwise by smalldocs, which pip brings. Either way
nbdev prepares the notebooks in _proc/. With smalldocs, maths and fonts are served from
the site itself, and the pages are checked: the build fails on a broken link, on what
is loaded from another host, and on traces of the machine that built them.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nbdev import doclinks, quarto
from nbdev.config import get_config
from nbdev.serve import proc_nbs

from minikl.corpora import npm_pack

FOLD = '#| code-fold: true\n#| code-summary: "Imports and settings"\n'
CHINESE = re.compile(r"[\u4e00-\u9fff]")
KATEX = "0.16.11"
ROOT = Path(__file__).resolve().parent.parent
KATEX_FILES = (
    "katex.min.js",
    "katex.min.css",
    "contrib/auto-render.min.js",
    "fonts/*.woff2",
)


def prepare():   # Path of the folder with the prepared notebooks
    "nbdev's own preparation: directives obeyed, documentation and links put in."
    quarto.refresh_quarto_yml()
    doclinks._build_modidx()
    return Path(proc_nbs(n_workers=0, force=True))


def statements(code):   # list of syntax nodes
    try:
        return ast.parse(code).body
    except SyntaxError:   # a magic
        return []


def defined_names(nodes):   # names of the functions and classes that a cell defines
    kinds = ast.FunctionDef, ast.ClassDef
    return [node.name for node in nodes if isinstance(node, kinds)]


def is_setup(nodes):   # bool
    "Whether a cell only imports and sets: a reader may leave it folded."
    imports = ast.Import, ast.ImportFrom
    return (
        bool(nodes)
        and isinstance(nodes[0], imports)
        and all(isinstance(node, (*imports, ast.Expr, ast.Assign)) for node in nodes)
    )


def alt_text(code, heading):   # str
    "What a drawing shows, for those who cannot see it: its axes and its section."
    axes = []
    for name in ("ylabel", "xlabel"):
        found = re.search(rf"{name}[=(]\s*f?[\"']([^\"']*)", code)
        axes += [found[1]] if found else []
    return ": ".join(["Figure", heading, " over ".join(axes)]).removesuffix(": ")


def fold_and_name(path):
    """Fold the cells that import, say what drawings show, and give each definition a
    name to link to."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    heading = ""
    for cell in notebook["cells"]:
        code = "".join(cell["source"])
        nodes = statements(code) if cell["cell_type"] == "code" else []
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^#+ (.*)$", code, re.M)
            heading = headings[-1].replace('"', "") if headings else heading
        elif is_setup(nodes):
            cell["source"] = f"{FOLD}{code}"
        elif "image/png" in json.dumps(cell.get("outputs", [])):
            alt = json.dumps(alt_text(code, heading), ensure_ascii=False)
            cell["source"] = f"#| fig-alt: {alt}\n{code}"
        anchors = "".join(f'<a id="{name}"></a>' for name in defined_names(nodes))
        if anchors:
            text = {"cell_type": "markdown", "id": f"{cell['id']}-a"}
            cells.append({**text, "metadata": {}, "source": anchors})
        cells.append(cell)
    notebook["cells"] = cells
    path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


def page_name(path):   # file name of the notebook, as its page will be called
    "What the front matter of a prepared notebook says."
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    source = "".join(first["source"])
    found = re.search(r"^output-file: (.*)\.html$", source, re.M)
    return f"{found[1]}.ipynb" if found else path.name


def rename_pages(
    folder,  # with the prepared notebooks
    base,    # address of the site
):           # {new place in the folder: old place}
    """Name pages as Quarto would (01_tokenizer.ipynb → tokenizer.html).

    Links inside the site become relative.
    """
    notebooks = sorted(folder.rglob("*.ipynb"))
    names = {path.name: page_name(path) for path in notebooks}
    places = {}
    for path in [*notebooks, folder / "sidebar.yml"]:
        depth = len(path.relative_to(folder).parts) - 1
        text = path.read_text(encoding="utf-8").replace(f"{base}/", "../" * depth)
        for old, new in names.items():
            text = text.replace(old, new)
        text = re.sub(r"output-file: [^\\\n]*\\n", "", text)   # said by the new name
        path.unlink()
        renamed = path.with_name(names.get(path.name, path.name))
        renamed.write_text(text, encoding="utf-8")
        places[str(renamed.relative_to(folder))] = str(path.relative_to(folder))
    return places


def unpack_katex(
    archive,  # what npm packs
    target,   # folder for those of its files that a page needs
):
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary)
        source = Path(temporary) / "package" / "dist"
        for pattern in KATEX_FILES:
            for path in source.glob(pattern):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)


def substitute(pattern, replacement, path):   # how many times
    "Replace what matches in a file."
    text = path.read_text(encoding="utf-8")
    text, count = re.subn(pattern, replacement, text)
    path.write_text(text, encoding="utf-8")
    return count


def search_chinese(site):
    "One character is a word in Chinese; several words may stand apart."
    script = site / "site_libs" / "smalldocs.js"
    for pattern, replacement in (
        (r"minMatchCharLength: 2", "minMatchCharLength: 1, useExtendedSearch: true"),
        (r"q\.length < 2", "q.length < 1"),
        (r"w\.length > 1", "w.length > 0"),
        (r"trim\(\)\.length > 1", "trim().length > 0"),
    ):
        if not substitute(pattern, replacement, script):
            sys.exit(f"error: {script} has no {pattern}; is it another smalldocs?")


def say_language(found):   # a paragraph or heading, perhaps with lang="zh"
    tag, attributes, text = found.groups()
    bare = re.sub(r"<[^>]*>", "", text)
    if len(CHINESE.findall(bare)) > len(bare) / 3:
        attributes += ' lang="zh"'
    return f"<{tag}{attributes}>{text}</{tag}>"


def mark_chinese(site):
    "Say of Chinese paragraphs that they are: fonts and voices depend on it."
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(?s)<(p|h2)\b([^>]*)>(.*?)</\1>", say_language, text)
        path.write_text(text, encoding="utf-8")


def link_sources(site, places):
    "Links to the notebook of a page, below its text, where a phone shows them, too."
    for path in site.rglob("*.html"):
        page = str(path.relative_to(site).with_suffix(".ipynb"))
        text = path.read_text(encoding="utf-8")
        found = re.search(r'<div class="toc-actions">.*?</div></div>', text)
        if not found or page not in places:
            sys.exit(f"error: {page} has no link to its source; another smalldocs?")
        text = text.replace(found[0], "")
        source = found[0].replace(f"/{page}", f"/{places[page]}")
        text = text.replace("</main>", f"{source}</main>")
        path.write_text(text, encoding="utf-8")


def repeat_contents(site):
    "What stands on a page also under its title, folded, for screens without a margin."
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        found = re.search(r'<h2 id="toc-title">(.*?)</h2>(<ul>.*?)</nav>', text)
        if not found:
            continue
        links = re.sub(r' (id|class|data-scroll-target)="[^"]*"', "", found[2])
        summary = f"<summary>{found[1]}</summary>"
        folded = f'<details class="contents">{summary}{links}</details>'
        before, main, after = text.partition("<main")
        after = after.replace("</header>", f"</header>{folded}", 1)
        path.write_text(f"{before}{main}{after}", encoding="utf-8")


def localise(site):
    "Serve KaTeX from the site, and drop fonts of others: a page then needs no network."
    with tempfile.TemporaryDirectory() as temporary:
        try:
            archive = npm_pack(f"katex@{KATEX}", temporary)
        except OSError as error:
            print(f"{error}; pages take KaTeX from the network")
            return
        unpack_katex(archive, site / "site_libs" / "katex")
    for path in site.rglob("*.html"):
        up = "../" * (len(path.relative_to(site).parts) - 1) or "./"
        katex = f"{up}site_libs/katex"
        substitute(r"https://[^\s\"']*/katex@[^/]+/dist", katex, path)
    for path in site.rglob("*.css"):
        substitute(r"@import url\([^)]*\);?", "", path)


# ---- what a page must not have

TRACES = {
    "Call self as a function": "an entry that says nothing",
    str(ROOT): "a path of the machine that built the site",
    "[`": "a link that was not rendered",
}


class Page(HTMLParser):
    "What a page links to, loads, names, and says outside of its programs."

    def __init__(self, path):
        super().__init__()
        self.links = []    # href of <a>
        self.loads = []    # what the browser fetches by itself
        self.names = set()
        self.text = []
        self.programs = 0   # how many <pre>, <script> and <style> are open
        self.n_silent = 0   # pictures without a word
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        self.programs += tag in ("pre", "script", "style")
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "link" and values.get("href"):
            self.loads.append(values["href"])
        if values.get("src"):
            self.loads.append(values["src"])
        self.n_silent += tag == "img" and not values.get("alt")

    def handle_endtag(self, tag):
        self.programs -= tag in ("pre", "script", "style")

    def handle_data(self, data):
        if not self.programs:
            self.text.append(data)


def faults(site):   # list of lines: page, what is wrong
    "Broken links, missing anchors, other hosts, and traces of the build."
    sources = f"{get_config().git_url}/blob/main/"
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        text = "".join(page.text)
        for trace, meaning in TRACES.items():
            if trace in text:
                found.append(f"{name}: {meaning}: {trace}")
        if page.n_silent:
            found.append(f"{name}: {page.n_silent} pictures say nothing (alt)")
        for link in page.loads:
            if urlsplit(link).netloc:
                found.append(f"{name}: loads {link}")
        for link in page.links:
            parts = urlsplit(link)
            source = unquote(link.partition("#")[0].removeprefix(sources))
            if link.startswith(sources) and not (ROOT / source).exists():
                found.append(f"{name}: {link} is not in the repository")
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)) if parts.path else path
            target = target.resolve()
            anchor = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif anchor and target in pages and anchor not in pages[target].names:
                found.append(f"{name}: {link} has no such place")
    return found


def render(folder, config):
    "Let Quarto or smalldocs render the prepared notebooks."
    if shutil.which("quarto"):
        quarto_render = ["quarto", "render", str(folder), "--no-execute"]
        subprocess.run(quarto_render, check=True)
        return
    if sys.version_info < (3, 11):
        sys.exit("error: the site needs Quarto, or Python 3.11 or newer")
    for path in folder.rglob("*.ipynb"):
        fold_and_name(path)
    places = rename_pages(folder, config.doc_host + config.doc_baseurl)
    smalldocs = Path(sys.executable).with_name("smalldocs")
    subprocess.run([smalldocs, "render", str(folder)], check=True)
    site = (folder / config.doc_path.name).resolve()
    localise(site)
    search_chinese(site)
    mark_chinese(site)
    link_sources(site, places)
    repeat_contents(site)
    if found := faults(site):
        sys.exit("error: the site is not fit to be shown\n" + "\n".join(found))


def main():
    config = get_config()
    folder = prepare()
    render(folder, config)
    shutil.rmtree(config.doc_path, ignore_errors=True)
    shutil.copytree(folder / config.doc_path.name, config.doc_path)
    print(f"open {config.doc_path.name}/index.html")


if __name__ == "__main__":
    main()
