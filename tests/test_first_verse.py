"The checks of the exercises in lesson 00 turn down wrong answers, and say why."
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

LESSON = Path(__file__).parent.parent / "nbs" / "00_first_verse.ipynb"


@pytest.fixture(scope="module")
def checks():   # {name: function}, as the lesson defines them
    names = {"torch": torch, "F": F}
    for cell in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith("def check_"):
            exec(source, names)
    return names


def mixed(q, k, v, is_causal=False):
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, is_causal=is_causal).transpose(1, 2)


@pytest.mark.parametrize("answer, said", [
    (lambda logits, t: None, "not solved yet"),
    (lambda logits, t: logits / t, "here it has 400%"),
    (lambda logits, t: (logits * t).softmax(-1), "should have 86 %"),
    (lambda logits, t: logits.softmax(-1), "should have 86 %"),
    (lambda logits, t: (logits / t).softmax(-1), "right"),
])
def test_check_of_temperature(checks, answer, said):
    assert said in checks["check_warm"](answer)


@pytest.mark.parametrize("answer, future, said", [
    (lambda q, k, v: None, False, "not solved yet"),
    (lambda q, k, v: v[:, -1], False, "has shape"),
    (lambda q, k, v: mixed(q, k, v, True), False, "seen by tokens [0, 1, 2, 3, 4]"),
    (lambda q, k, v: q, False, "token 0 is seen by tokens []"),
    (lambda q, k, v: 2 * v, False, "the right weights"),
    (lambda q, k, v: v, False, "right"),
    (lambda q, k, v: mixed(q, k, v, True), True, "1 is seen by tokens [1, 2, 3, 4]"),
    (lambda q, k, v: v, True, "token 0 is seen by tokens [0]"),
    (lambda q, k, v: v.mean(1, True).expand(v.shape), True, "the right weights"),
    (lambda q, k, v: mixed(2 * q, k, v), True, "the right weights"),
    (mixed, True, "right"),
])
def test_check_of_attend(checks, answer, future, said):
    assert said in checks["check_attend"](answer, future)
