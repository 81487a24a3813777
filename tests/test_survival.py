"That what keeps runs alive would be noticed if it broke. Lesson 12 proves that it works, on every run of the tests; here the proof is put to the proof."
import pytest


@pytest.mark.parametrize("name", ["optimizers not restored", "a step skipped"])
def test_the_soak_notices_a_broken_resume(name, python):
    done = python("tools/soak.py", "--kills=1", f"--breaking={name}")
    assert done.returncode == 1 and "mismatches 1" in done.stdout, done.stdout + done.stderr
