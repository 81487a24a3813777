"""Installs MiniKL with the facts of settings.ini, which nbdev 2 reads too.

    python -m pip install -e .
"""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]

setup(
    name=facts["lib_name"],
    version=facts["version"],
    description=facts["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=facts["author"],
    url=facts["git_url"],
    license=facts["license"].upper(),
    keywords=facts["keywords"],
    packages=find_packages(include=[facts["lib_name"]]),
    package_data={facts["lib_name"]: ["serve.html"]},   # of serve.py
    python_requires=f">={facts['min_python']}",
    install_requires=facts["requirements"].split(),
    extras_require={
        "wandb": facts["wandb_requirements"].split(),
        "dev": facts["dev_requirements"].split(),
    },
    entry_points={
        "nbdev": [f"{facts['lib_name']}={facts['lib_path']}._modidx:d"],
        "console_scripts": [
            "minikl-train=minikl.train:main",
            "minikl-generate=minikl.generate:main",
            "minikl-report=minikl.report:main",
            "minikl-serve=minikl.serve:main",
        ],
    },
)
