"""Render the lessons into _docs/: by Quarto where it is installed, otherwise by smalldocs, which pip brings.

nbdev prepares the notebooks in _proc/ either way. With smalldocs, maths and fonts are served from the site itself.
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

from minikl.data import npm_pack

KATEX = "0.16.11"


def prepare():
    "nbdev's own preparation: directives obeyed, documentation of functions and links put in. Returns the folder."
    quarto.refresh_quarto_yml()
    doclinks._build_modidx()
    return Path(proc_nbs(n_workers=0, force=True))


def rename_pages(folder, base):
    "Name pages as Quarto would (01_tokenizer.ipynb → tokenizer.html), and make links inside the site relative."
    names = {}
    for path in sorted(folder.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        found = re.search(r"^output-file: (.*)\.html$", "".join(json.loads(text)["cells"][0]["source"]), re.M)
        names[path.name] = f"{found[1]}.ipynb" if found else path.name
    for path in list(folder.glob("*.ipynb")) + [folder / "sidebar.yml"]:
        text = path.read_text(encoding="utf-8").replace(f"{base}/", "")
        for old, new in names.items(): text = text.replace(old, new)
        text = re.sub(r"output-file: [^\\\n]*\\n", "", text)   # said by the new name
        path.unlink()
        (folder / names.get(path.name, path.name)).write_text(text, encoding="utf-8")


def localise(site):
    "Serve KaTeX from the site, and drop fonts of other hosts: a page then needs no network."
    with tempfile.TemporaryDirectory() as temporary:
        try: archive = npm_pack(f"katex@{KATEX}", temporary)
        except OSError as error: return print(f"{error}; pages take KaTeX from the network")
        with tarfile.open(archive) as tar: tar.extractall(temporary)
        source, target = Path(temporary) / "package/dist", site / "site_libs/katex"
        for pattern in ("katex.min.js", "katex.min.css", "contrib/auto-render.min.js", "fonts/*.woff2"):
            for path in source.glob(pattern):
                (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.relative_to(source))
    for path in site.rglob("*.html"):
        up = "../" * (len(path.relative_to(site).parts) - 1) or "./"
        text = re.sub(r"https://[^\s\"']*/katex@[^/]+/dist", f"{up}site_libs/katex", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
    for path in site.rglob("*.css"):
        path.write_text(re.sub(r"@import url\([^)]*\);?", "", path.read_text(encoding="utf-8")), encoding="utf-8")


def main():
    config = get_config()
    folder = prepare()
    if shutil.which("quarto"): subprocess.run(["quarto", "render", str(folder), "--no-execute"], check=True)
    else:
        if sys.version_info < (3, 11): sys.exit("error: the site needs Quarto, or Python 3.11 or newer")
        rename_pages(folder, config.doc_host + config.doc_baseurl)
        subprocess.run([Path(sys.executable).with_name("smalldocs"), "render", str(folder)], check=True)
        localise(folder / config.doc_path.name)
    shutil.rmtree(config.doc_path, ignore_errors=True)
    shutil.copytree(folder / config.doc_path.name, config.doc_path)
    print(f"open {config.doc_path.name}/index.html")


if __name__ == "__main__": main()
