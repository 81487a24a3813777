"tools/quality.py, and what lesson 17 says about what it has measured."
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from minikl.layouts import Padded
from minikl.model import MiniKLConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quality():
    sys.path.append(str(ROOT / "tools"))
    yield importlib.import_module("quality")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def measured(quality):
    return json.loads(quality.MEASURED.read_text(encoding="utf-8"))


# ---- the baseline

NAMES = {   # of our layers: those of transformers
    "attention_norm": "ln_1",
    "w_qkv": "attn.c_attn",
    "w_o": "attn.c_proj",
    "ffn_norm": "ln_2",
    "w_up": "mlp.c_fc",
    "w_down": "mlp.c_proj",
}


def their_weights(ours):   # {name: tensor}
    weights = {
        "wte.weight": ours.embed.weight,
        "wpe.weight": ours.places.weight,
        "ln_f.weight": ours.norm.weight,
        "ln_f.bias": ours.norm.bias,
    }
    for i, block in enumerate(ours.blocks):
        for name, value in block.state_dict().items():
            layer, kind = name.split(".")
            # theirs are stored the other way round
            weights[f"h.{i}.{NAMES[layer]}.{kind}"] = (
                value.T if value.ndim == 2 else value
            )
    return weights


def test_the_baseline_is_a_gpt2(quality):
    "The same weights give the same logits as in transformers."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"d_model": 32, "num_heads": 4, "num_kv_heads": 4, "num_layers": 3}
    config = MiniKLConfig(
        **shape, vocab_size=50, max_seq_len=64, tie_embeddings=True
    )
    ours = quality.GPT2(config).eval()
    for weight in ours.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50,
            n_positions=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            activation_function="gelu",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    theirs.transformer.load_state_dict(their_weights(ours))
    batch = Padded(list(torch.randint(50, (4, 60))))
    with torch.no_grad():
        found = ours(batch.ids, batch.positions, batch.attend)
        wanted = theirs(batch.ids).logits
    assert wanted.std() > 1
    assert (found - wanted).abs().max() < 1e-4


def test_an_arm_changes_model_optimizer_and_schedule(quality, tmp_path):
    "What is no option of train.py is changed while the run is made, and only then."
    from minikl.model import MiniKL
    from minikl.options import parse_options
    from minikl.parallel import Ranks
    from minikl.trainer import Run

    shape = (
        "--corpus=toy --vocab_size=300 --d_model=16 --num_layers=1 --max_steps=9"
    ).split()
    runs = {}
    for arm in ("tokens", "default"):
        with quality.patched(quality.ARMS[arm]) as arguments:
            options = parse_options([*arguments, *shape, f"--out_dir={tmp_path}"])
            runs[arm] = Run(options, Ranks(threads=1))
    assert type(runs["tokens"].learner.model) is quality.GPT2
    assert type(runs["default"].learner.model) is MiniKL
    assert quality.minikl.learner.MiniKL is MiniKL
    result = quality.take_step(runs["tokens"], 0, 0.5)
    assert result.nats > 0 and result.n_targets > 0
    with quality.patched({"beta2": 0.99}):
        made = quality.minikl.learner.make_optimizers(
            runs["default"].learner.model, "adamw", 0.01, 0.01, 0.1
        )
    assert {group["betas"] for group in made[-1].param_groups} == {(0.9, 0.99)}


# ---- the figures in the prose of the lesson


def best_bits(runs, arm):   # bits per character at the best rate, first seed
    names = [name for name in runs if name == arm or name.startswith(f"{arm} lr=")]
    return min(runs[name]["bits_per_char"] for name in names if "seed" not in name)


def figures(measured):   # list of (as the lesson says it, the measurement)
    speed = measured["speed"]
    one, three = measured["runs, 1 min"], measured["runs, 3 min"]
    (half_an_hour,) = measured["runs, 30 min"].values()
    ngrams = measured["ngrams"]
    names = {name.partition(" lr=")[0] for name in one}
    bits = {name: best_bits(one, name) for name in names if "seed" not in name}
    at_three = {arm: best_bits(three, arm) for arm in quality_arms(three)}
    gains = [
        ("whole poems", "64 characters"), ("32 poems", "whole poems"),
        ("32 poems", "tokens"), ("tokens", "nested"), ("nested", "block"),
        ("block", "untied"), ("untied", "Muon"), ("Muon", "default"),
        ("padded", "default"), ("tied", "default"),
        ("packed", "nested"), ("tokens", "packed"),
    ]
    said = [(f"{bits[a] - bits[b]:.2f}", bits[a] - bits[b]) for a, b in gains]
    said += [(f"{value:.2f}", value) for value in at_three.values()]
    return said + [
        ("6.78", ngrams["3-gram"]),
        ("6.71", ngrams["5-gram"]),
        ("7.29", measured["baselines"]["bigram"]),
        ("7.23", ngrams["2-gram"]),
        ("0.01", ngrams["4-gram"] - ngrams["5-gram"]),
        ("1,670", three["default"]["steps"]),
        ("557", one["default"]["steps"]),
        (f"{1000 * speed['nested']:.0f} ms", 1000 * speed["nested"]),
        (f"{1000 * speed['tokens']:.0f}", 1000 * speed["tokens"]),
        (f"{1000 * speed['packed']:.0f} ms", 1000 * speed["packed"]),
        ("5.90", half_an_hour["bits_per_char"]),
    ]


def quality_arms(runs):
    return {name.partition(" ")[0] for name in runs}


def test_figures_in_the_prose_are_those_that_were_measured(measured):
    path = ROOT / "nbs" / "17_quality.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "".join(
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
    )
    for said, measurement in figures(measured):
        assert said in prose, said
        number = said.translate({ord(","): None}).strip("abcdefghijklmnopqrstuvwxyz %")
        number = number.split()[-1]
        digits = len(number.partition(".")[2])
        assert abs(float(number) - measurement) <= 0.5001 * 10**-digits, said
    seen = measured["seen"]
    gap = measured["runs, 3 min"]["default"]["bits_per_char"] - seen
    assert "Three tenths of a bit" in prose and abs(gap - 0.3) <= 0.05
    assert "不到 0.02 比特" in prose


def test_the_gains_of_the_new_recipe_are_those_that_were_measured(measured):
    "Lesson 26."
    law = json.loads((ROOT / "nbs/measured/law.json").read_text(encoding="utf-8"))
    three = measured["runs, 3 min"] | measured["since, 3 min"] | law["three"]

    def seeds(arm):
        names = (arm, f"{arm} seed=1", f"{arm} seed=2")
        return [three[name]["bits_per_char"] for name in names if name in three]

    def mean(arm):
        return sum(seeds(arm)) / len(seeds(arm))

    def costs(arm):   # with seed 0
        return three[arm]["bits_per_char"] - three["recipe"]["bits_per_char"]

    old, wide, narrow = mean("default"), mean("recipe"), mean("recipe, 16 bits")
    said = {
        "6.418": old,
        "6.322": wide,
        "6.228": narrow,
        "6.323": mean("32 bits"),
        "6.262": mean("16 bits"),
        "0.096": old - wide,
        "0.189": old - narrow,
        "0.095": old - mean("32 bits"),
        "0.156": old - mean("16 bits"),
        "0.061": mean("32 bits") - mean("16 bits"),
        "0.062": costs("recipe, whole vocabulary"),
        "0.041": costs("recipe, random start"),
        "0.010": costs("recipe, cosine"),
        "0.76": law["pace"]["2x128, 32 bits"],
        "0.52": law["pace"]["2x128, 16 bits"],
        "2,239": three["recipe"]["steps"],
        "2,189": three["32 bits"]["steps"],
        "3,186": three["16 bits"]["steps"],
    }
    path = ROOT / "nbs" / "26_output_layer.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "".join(
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
    )
    for text, measurement in said.items():
        assert text in prose, text
        digits = len(text.partition(".")[2])
        number = float(text.replace(",", ""))
        assert abs(number - measurement) <= 0.5001 * 10**-digits, (text, measurement)
    assert "lie within 0.024" in prose
    for arm in ("recipe", "recipe, 16 bits"):
        assert max(seeds(arm)) - min(seeds(arm)) < 0.024
