"""Render the lessons into _docs/.

    python tools/docs.py

By Quarto where it is installed, otherwise by smalldocs, which pip brings. Either way
nbdev prepares the notebooks in _proc/. With smalldocs, maths and fonts are served from
the site itself.
"""
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from nbdev import doclinks, quarto
from nbdev.config import get_config
from nbdev.serve import proc_nbs

from minikl.corpora import npm_pack

KATEX = "0.16.11"
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


def page_name(path):   # file name of the notebook, as its page will be called
    "What the front matter of a prepared notebook says."
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    source = "".join(first["source"])
    found = re.search(r"^output-file: (.*)\.html$", source, re.M)
    return f"{found[1]}.ipynb" if found else path.name


def rename_pages(
    folder,  # with the prepared notebooks
    base,    # address of the site
):
    """Name pages as Quarto would (01_tokenizer.ipynb → tokenizer.html).

    Links inside the site become relative.
    """
    notebooks = sorted(folder.rglob("*.ipynb"))
    names = {path.name: page_name(path) for path in notebooks}
    for path in [*notebooks, folder / "sidebar.yml"]:
        depth = len(path.relative_to(folder).parts) - 1
        text = path.read_text(encoding="utf-8").replace(f"{base}/", "../" * depth)
        for old, new in names.items():
            text = text.replace(old, new)
        text = re.sub(r"output-file: [^\\\n]*\\n", "", text)   # said by the new name
        path.unlink()
        renamed = path.with_name(names.get(path.name, path.name))
        renamed.write_text(text, encoding="utf-8")


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


def substitute(pattern, replacement, path):
    "Replace what matches in a file."
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(pattern, replacement, text), encoding="utf-8")


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


def render(folder, config):
    "Let Quarto or smalldocs render the prepared notebooks."
    if shutil.which("quarto"):
        quarto_render = ["quarto", "render", str(folder), "--no-execute"]
        subprocess.run(quarto_render, check=True)
        return
    if sys.version_info < (3, 11):
        sys.exit("error: the site needs Quarto, or Python 3.11 or newer")
    rename_pages(folder, config.doc_host + config.doc_baseurl)
    smalldocs = Path(sys.executable).with_name("smalldocs")
    subprocess.run([smalldocs, "render", str(folder)], check=True)
    localise(folder / config.doc_path.name)


def main():
    config = get_config()
    folder = prepare()
    render(folder, config)
    shutil.rmtree(config.doc_path, ignore_errors=True)
    shutil.copytree(folder / config.doc_path.name, config.doc_path)
    print(f"open {config.doc_path.name}/index.html")


if __name__ == "__main__":
    main()
