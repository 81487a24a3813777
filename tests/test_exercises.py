"Every exercise has a stub that runs, a check, hints, an answer, and wrong answers."
import ast
import json
import re

import pytest
from conftest import ROOT

LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(path, kind):   # sources of the cells of one kind
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def solutions(path):
    return path.parent / "solutions" / path.name


def calls(code):   # list of ast.Call
    lines = [line for line in code.splitlines() if not line.startswith("%")]
    tree = ast.parse("\n".join(lines))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def is_check(node):
    return isinstance(node, ast.Name) and node.id.startswith("check_")


def checked(code):   # set of the checks that this code calls, by itself or by `keep`
    found = set()
    for call in calls(code):
        found |= {node.id for node in (call.func, *call.args[1:]) if is_check(node)}
    return found


def exercises(path):   # list of names of checks, one for each exercise of a lesson
    "The checks that the stub cells of a lesson import from minikl.checks."
    found = []
    for code in cells(path, "code"):
        names = re.findall(r"^from minikl\.checks\.\w+ import (.*)$", code, re.M)
        if names:
            found += sorted(checked(code))
    return found


def wrong_answers(path):   # {check: number of wrong answers it turns down}
    found = {}
    for code in cells(solutions(path), "code"):
        for call in calls(code):
            if isinstance(call.func, ast.Name) and call.func.id == "turned_down":
                check, *answers = call.args
                found[check.id] = found.get(check.id, 0) + len(answers)
    return found


@each_lesson
def test_a_lesson_has_exercises(path):
    assert len(exercises(path)) >= 3


@each_lesson
def test_a_stub_is_not_solved_yet(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] == "code" and "from minikl.checks." in code:
            shown = json.dumps(cell["outputs"], ensure_ascii=False)
            assert "not solved yet" in shown, code


@each_lesson
def test_every_exercise_has_two_hints(path):
    text = "\n".join(cells(path, "markdown"))
    hints = re.findall(r"<details>\s*<summary>Hint", text)
    assert len(hints) >= 2 * len(exercises(path))


@each_lesson
def test_every_check_turns_down_wrong_answers(path):
    "Two or more on the page of solutions, which is run by the tests."
    numbers = wrong_answers(path)
    assert not {name for name in exercises(path) if numbers.get(name, 0) < 2}


@each_lesson
def test_every_check_takes_the_answer(path):
    code = "\n".join(cells(solutions(path), "code"))
    right = set(re.findall(r"^assert (check_\w+)\(.*\) == RIGHT$", code, re.M))
    assert set(exercises(path)) <= right


def test_there_are_sixty_exercises():
    assert sum(len(exercises(path)) for path in LESSONS) >= 60
