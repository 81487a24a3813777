"Lesson 00 trains with a reader's own parts: right ones change nothing, wrong ones do."
import json
import math
from functools import partial

import pytest
import torch
from conftest import ROOT

from minikl.checks.exercise import HEADER, PARTS, RIGHT, keep

# cells of the lesson: what it defines before anything is trained, and its last section
BASE = ("v002", "v004", "v006", "v008", "v010", "v012", "v015a", "v016", "v021")
SECTION = ("v055a", "v055c", "v055d", "v055f", "v055g")
N_STEPS = 20


# ---- right parts, as a reader may write them


def attention(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def rms_norm(x, gain, eps=1e-5):
    return gain * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def block(x, attention_norm, attention, ffn_norm, ffn):
    x = x + attention(attention_norm(x))
    return x + ffn(ffn_norm(x))


def train_step(model, batch, optimizer):
    optimizer.zero_grad()
    total, n_targets = model.loss(batch)
    (total / n_targets).backward()
    optimizer.step()
    return total.item() / n_targets.item()


def sample(logits, temperature, top_p, generator):
    shares, order = (logits / temperature).softmax(dim=-1).sort(descending=True)
    before = shares.cumsum(dim=-1) - shares
    shares = shares.where(before < top_p, 0)
    return order[torch.multinomial(shares, 1, generator=generator)].item()


OWN = {part.__name__: part for part in (attention, rms_norm, block, train_step, sample)}

MISTAKES = {   # what is wrong: (part, its code, the code with the mistake)
    "sees the future": (attention, "scores.masked_fill(future, -math.inf)", "scores"),
    "is not scaled": (attention, " / math.sqrt(q.shape[-1])", ""),
    "has no root": (rms_norm, ".sqrt()", ""),
    "has no gain": (rms_norm, "gain * ", ""),
    "adds nothing": (block, "x = x + ", "x = "),
    "takes one norm twice": (block, "ffn_norm(x)", "attention_norm(x)"),
    "adds up gradients": (train_step, "optimizer.zero_grad()", "pass"),
    "steps twice": (train_step, "    optimizer.step()\n", "    optimizer.step()\n" * 2),
}


# ---- the lesson, and its last section


def run(cells, names):
    "Run cells of the lesson, by their ids, in the current folder."
    notebook = json.loads((ROOT / "nbs" / "00_first_verse.ipynb").read_text("utf-8"))
    sources = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    for cell in cells:
        exec(sources[cell], names)
    return names


@pytest.fixture(scope="module")
def lesson():   # {name: value}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "nbs")
        names = run(BASE, {})
    names["train"] = partial(names["train"], n_steps=N_STEPS)
    _, names["losses"] = names["train"]()
    return names


@pytest.fixture
def section(lesson, tmp_path, monkeypatch):
    "Run the last section, where only the parts lie that the test has written."
    monkeypatch.chdir(tmp_path)
    return lambda: run(SECTION, dict(lesson))


def write_parts(parts):
    for part in parts:
        assert keep(part, lambda answer: RIGHT) == f"{RIGHT}: kept in my_parts.py"


def test_without_parts_it_is_the_package(section, capsys):
    names = section()
    assert names["own_losses"] == names["losses"]
    assert capsys.readouterr().out.count("from the package") == len(PARTS)


def test_right_parts_change_nothing(section, capsys):
    write_parts(OWN.values())
    names = section()
    assert list(names["own"]) == list(PARTS)
    assert names["gap"] < 1e-4
    shown = capsys.readouterr().out
    assert shown.count("yours") == len(PARTS) and "from the package" not in shown
    assert "一生一代一双人，" in shown


@pytest.mark.parametrize("name", PARTS)
def test_one_part_alone_changes_nothing(name, section, capsys):
    write_parts([OWN[name]])
    assert section()["gap"] < 1e-4
    assert f"{name}: yours" in capsys.readouterr().out


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_part_changes_the_losses(mistake, section, tmp_path):
    part, right, wrong = MISTAKES[mistake]
    write_parts(OWN.values())
    file = tmp_path / "my_parts.py"
    text = file.read_text(encoding="utf-8")
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    assert section()["gap"] > 3e-4


def test_the_own_sample_writes(section, tmp_path, capsys):
    stop = "def sample(logits, temperature, top_p, generator):\n    return 2\n"
    (tmp_path / "my_parts.py").write_text(f"{HEADER}\n\n# part: sample\n{stop}")
    assert section()["END"] == 2
    assert capsys.readouterr().out.endswith("\n一生一代一双人，\n")
