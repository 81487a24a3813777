"That what keeps runs alive would be noticed if it broke. Lesson 12 proves that it works, on every run of the tests; here the proof is put to the proof."
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

BREAKS = {"optimizers not restored": ("training.py", '"state": kept}', '"state": {}}'),
          "a step skipped": ("train.py", 'self.at = facts["at"]', 'self.at = {**facts["at"], "step": facts["at"]["step"] + 1}')}


@pytest.mark.parametrize("name", BREAKS)
def test_the_soak_notices_a_broken_resume(name, tmp_path):
    module, old, new = BREAKS[name]
    for part in ("minikl", "tools"): shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/toy.jsonl", tmp_path / "data")
    source = (tmp_path / "minikl" / module).read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "minikl" / module).write_text(source.replace(old, new), encoding="utf-8")
    done = subprocess.run([sys.executable, "tools/soak.py", "--kills=1"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "mismatches 1" in done.stdout, done.stdout + done.stderr
