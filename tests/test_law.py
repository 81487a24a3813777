"The law of lesson 27: it is found again where it is known, and its advice is sane."
import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minikl.law
from minikl.files import UserError
from minikl.law import (
    HEAD,
    POETRY,
    PRIOR,
    SHAPES,
    STEPS_PER_MINUTE,
    Law,
    body_weights,
    fit_law,
    outcome,
    step_cost,
    suggest,
)
from minikl.options import parse_options
from minikl.plan import FOR_MANY_PASSES, advice

ROOT = Path(__file__).resolve().parent.parent
TRUTH = Law(4.8, 0.6, 0.3, 1.3, 0.4)


@pytest.fixture(scope="module")
def tool():
    sys.path.append(str(ROOT / "tools"))
    yield importlib.import_module("law")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def measured():
    path = ROOT / "nbs" / "measured" / "law.json"
    return json.loads(path.read_text(encoding="utf-8"))


def runs_under(law, noise=0.0):   # what short runs would measure in a world of this law
    generator = torch.Generator().manual_seed(0)
    runs = []
    for layers, width in ((1, 64), (2, 64), (1, 128), (2, 128), (2, 192), (4, 192)):
        for minutes in (0.25, 0.5, 1):
            steps = minutes * STEPS_PER_MINUTE / step_cost(layers, width)
            tokens = steps * 2587
            bits = float(law.bits(body_weights(layers, width), tokens))
            bits += noise * torch.randn((), generator=generator).item()
            run = {"layers": layers, "width": width, "tokens": tokens}
            runs.append(run | {"bits_per_char": bits})
    return runs


def after_thirty_minutes(law):   # list of bits, of all shapes
    steps = {shape: 30 * STEPS_PER_MINUTE / step_cost(*shape) for shape in SHAPES}
    return [outcome(*shape, n, law).bits for shape, n in steps.items()]


# ---- the fit


def test_a_law_is_found_again():
    "Thirty times as long as the runs, to a few hundredths of a bit."
    found = fit_law(runs_under(TRUTH, noise=0.005))
    pairs = zip(after_thirty_minutes(found), after_thirty_minutes(TRUTH), strict=True)
    assert max(abs(ours - true) for ours, true in pairs) < 0.05


def by_small_steps(function, start):
    "Another search, from another place: Adam, with a rate that falls to zero."
    x = (start + 0.2).requires_grad_()
    optimizer = torch.optim.Adam([x])
    for i in range(4000):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - i / 4000)
        optimizer.zero_grad()
        function(x).backward()
        optimizer.step()
    return x.detach()


def test_another_search_finds_the_same_law(monkeypatch):
    runs = runs_under(TRUTH, noise=0.01)
    ours = after_thirty_minutes(fit_law(runs))
    monkeypatch.setattr(minikl.law, "minimize", by_small_steps)
    theirs = after_thirty_minutes(fit_law(runs))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.003


def test_the_prior_does_not_decide():
    "Runs of a world far from the middle of the prior move the law there."
    far = replace(TRUTH, floor=6.0, data=0.8)
    found = fit_law(runs_under(far))
    assert abs(found.floor - 6.0) < abs(PRIOR["floor"][0] - 6.0) / 2


def test_one_strange_run_does_not_bend_the_law():
    runs = runs_under(TRUTH)
    plain = after_thirty_minutes(fit_law(runs))
    runs[5] = runs[5] | {"bits_per_char": runs[5]["bits_per_char"] + 0.5}
    bent = after_thirty_minutes(fit_law(runs))
    assert max(abs(a - b) for a, b in zip(plain, bent, strict=True)) < 0.05


def test_the_wrong_norm_fits_worse():
    runs = runs_under(TRUTH, noise=0.003)
    misses = {}
    for norm in (1.0, 2.0):
        law = fit_law(runs, norm)
        assert law.norm == norm
        weights = [body_weights(run["layers"], run["width"]) for run in runs]
        pairs = zip(weights, runs, strict=True)
        off = [law.bits(n, run["tokens"]) - run["bits_per_char"] for n, run in pairs]
        misses[norm] = torch.stack(off).square().mean().sqrt()
    assert misses[2.0] < misses[1.0] / 2


def test_the_missing_run_is_not_seen(tool):
    "Its own figure has no influence on what is said about it."
    runs = runs_under(TRUTH)[:6]
    plain = tool.leave_one_out(runs, 1.0)
    runs[2] = runs[2] | {"bits_per_char": 9.0}
    moved = tool.leave_one_out(runs, 1.0)
    before = runs_under(TRUTH)[2]["bits_per_char"] + plain[2]
    assert math.isclose(before, 9.0 + moved[2], rel_tol=1e-9)


def test_other_draws_lead_to_other_laws(tool):
    laws = tool.bootstrap(runs_under(TRUTH, noise=0.02), 3, 2.0)
    assert len({law.floor for law in laws}) == 3


# ---- the law


def test_more_never_hurts():
    sizes = torch.logspace(4, 7, 20)
    tokens = torch.logspace(5, 8, 20)
    for norm in (1.0, 2.0):
        law = replace(TRUTH, norm=norm)
        assert (law.bits(sizes, 1e7).diff() < 0).all()
        assert (law.bits(1e6, tokens).diff() < 0).all()


def test_a_triangle_lies_between_the_larger_side_and_the_sum():
    sizes, tokens = torch.logspace(4, 7, 20), torch.logspace(5, 8, 20)
    size = TRUTH.bits(sizes, math.inf)
    data = TRUTH.bits(math.inf, tokens)
    found = TRUTH.bits(sizes, tokens)
    assert (found >= torch.maximum(size, data)).all()
    assert (found <= replace(TRUTH, norm=1.0).bits(sizes, tokens)).all()


# ---- what it advises


def test_more_time_is_never_worse():
    bits = [suggest(50 * 1.3**i).bits for i in range(30)]
    assert bits == sorted(bits, reverse=True)


def test_the_suggestion_is_the_best_of_all():
    budget = 10 * STEPS_PER_MINUTE
    best = suggest(budget)
    for shape in SHAPES:
        assert outcome(*shape, budget / step_cost(*shape)).bits >= best.bits


def test_a_budget_that_is_too_small():
    with pytest.raises(UserError, match="too short for a hundred steps"):
        suggest(2)


def advised(n_steps, layers=2, width=128):   # lines
    heads = width // HEAD
    shape = f"--num_layers={layers} --d_model={width}"
    heads = f"--num_heads={heads} --num_kv_heads={heads}"
    options = parse_options(f"{shape} {heads}".split())
    empty, *lines = advice(options, options.model, "cpu", n_steps).split("\n")
    assert empty == "" and all(len(line) <= 100 for line in lines)
    return lines


def test_advice_for_a_default_run():
    bits = outcome(2, 128, 2_300).bits   # no other shape is better, and few passes
    said = f"quality     about {bits:.2f} held-out bits per character"
    assert advised(2_300) == [f"{said} (the law of lesson 27)"]
    quality, shape = advised(4_900)   # known, but another shape is better
    assert "about 6." in quality and shape.startswith("same time   --num_layers=3 ")


def test_advice_for_many_passes():
    quality, many, shape = advised(23_000)
    assert "unknown: more than 7 passes" in quality
    best = suggest(23_000 * step_cost(2, 128))
    assert f"--num_layers={best.layers} --d_model={best.width} " in shape
    assert f": about {best.bits:.2f}" in shape
    assert many.startswith("23 passes")
    chosen = shape.partition(":")[0].split()[2:] + FOR_MANY_PASSES.split()
    parse_options(chosen)   # they exist
    # the best shape is not advised to itself, whether it is known or not
    for n_steps, first in ((5_800, "about 6."), (6_900, "unknown")):
        quality, many = advised(n_steps, 4, 192)
        assert first in quality
        assert FOR_MANY_PASSES in many
    assert len(advised(4_900, 4, 192)) == 1   # five passes


@pytest.mark.parametrize("more", [
    "--corpus=toy", "--data_jsonl_path=x.jsonl", "--init_path=x", "--batch_size=16",
    "--first_weights=random", "--optimizer=adamw", "--vocab_size=8000", "--ffn=FFN",
    "--tie_embeddings", "--vocab_dict_path=x", "--d_ff=512", "--d_model=96",
])
def test_where_the_law_does_not_apply_it_is_silent(more):
    options = parse_options([more])
    assert advice(options, options.model, "cpu", 2_300) == ""


def test_the_law_is_silent_beyond_its_minutes_and_on_a_gpu():
    options = parse_options([])
    for device, n_steps in (("cuda", 2_300), ("cpu", 20), ("cpu", 10**7)):
        assert advice(options, options.model, device, n_steps) == ""
    assert advice(options, options.model, "cpu", 2_300)
    wide = parse_options(["--d_model=256", "--num_heads=8", "--num_kv_heads=8"])
    assert advice(wide, wide.model, "cpu", 4_000)


# ---- tools/law.py


def test_the_trials_are_what_the_lesson_says(tool):
    minutes = [trial.minutes for trial in tool.TRIALS]
    assert minutes.count(1) >= 12 and max(minutes) == 3.6
    assert len({trial.name for trial in tool.TRIALS}) == len(tool.TRIALS)


def test_every_trial_is_measured_with_options_that_exist(tool, measured):
    for trial in tool.TRIALS:
        tool.options_of(trial.layers, trial.width, *trial.more.split())
        run = measured["runs"][trial.name]
        steps = trial.minutes * STEPS_PER_MINUTE / measured["ratios"][trial.shape]
        assert run["steps"] == round(steps)


def test_the_price_of_a_step(tool, monkeypatch):
    "In units of the first arm; a wider model costs more."
    monkeypatch.setattr(tool, "TURNS", 3)
    ranks = tool.Ranks(threads=1, device="cpu")
    toy = ["--corpus=toy", "--vocab_size=400", "--first_weights=random"]
    narrow, wide = tool.options_of(1, 32, *toy), tool.options_of(2, 128, *toy)
    data = tool.read_data(narrow.data, narrow.model, ranks)
    monkeypatch.setattr(tool, "corpus", lambda: (ranks, data))
    found = tool.measure_speed({"narrow": narrow, "wide": wide})
    assert found["narrow"] == 1 and found["wide"] > 1


def test_measurements_are_added_and_kept(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "MEASURED", tmp_path / "law.json")
    assert tool.read_measured() == {}
    tool.store("runs", first={"bits": 7.0})
    tool.store("runs", second={"bits": 6.0})
    tool.store("ratios", reference=1.0)
    wanted = {"first": {"bits": 7.0}, "second": {"bits": 6.0}}
    assert tool.read_measured() == {"runs": wanted, "ratios": {"reference": 1.0}}


def test_a_prediction_after_the_fact_is_refused(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "MEASURED", tmp_path / "law.json")
    tool.store("long", **{"2x128": {"bits_per_char": 6.0}})
    with pytest.raises(SystemExit, match="no prediction"):
        tool.predict(None)


def test_a_run_on_the_toy_corpus(tool, monkeypatch):
    "The whole way of a run: as many steps as its price allows, on a part of the texts."
    ranks = tool.Ranks(threads=1, device="cpu")
    toy = tool.options_of(1, 32, "--corpus=toy", "--vocab_size=400")
    data = tool.read_data(toy.data, toy.model, ranks)
    monkeypatch.setattr(tool, "corpus", lambda: (ranks, data))
    trial = tool.Trial(1, 32, minutes=0.02, part=3)
    result = tool.train(trial, ratio=0.5)
    assert result["steps"] == round(0.02 * STEPS_PER_MINUTE / 0.5)
    assert result["unique"] < 0.4 * data.documents.n_targets()
    assert 0 < result["bits_per_char"] < math.log2(len(data.tokenizer)) + 1
    assert tool.train(trial, ratio=0.5)["bits_per_char"] == result["bits_per_char"]


def test_the_prediction_is_older_than_the_run(measured):
    prediction = measured["prediction"]
    run = measured["long"][prediction["shape"]]
    assert prediction["when"] < run["when"]
    assert run["steps"] == prediction["steps"]


def test_half_an_hour_was_trained_as_the_tool_says(tool, measured):
    long = measured["long"]
    for seed in tool.SEEDS:
        run = long[tool.named("4x192, half an hour", seed)]
        assert run["steps"] == tool.HALF_HOUR_STEPS
    assert long["4x192, as many steps"]["steps"] == tool.OLD_STEPS
    path = ROOT / "nbs" / "measured" / "quality.json"
    (before,) = json.loads(path.read_text(encoding="utf-8"))["runs, 30 min"].values()
    assert before["steps"] == tool.OLD_STEPS
    # no more time than the recipe of before had
    cost = measured["pace"]["4x192, half an hour"]
    assert tool.HALF_HOUR_STEPS * cost <= tool.OLD_STEPS


def test_two_processes_were_trained_three_minutes(measured):
    assert len(measured["three"]) == 6
    for name, run in measured["three"].items():
        cost = measured["pace"]["2x128, " + name.partition(" seed=")[0]]
        assert run["steps"] == round(3 * STEPS_PER_MINUTE / cost), name


def test_the_package_has_the_law_that_was_written_down(measured):
    for name, value in measured["prediction"]["law"].items():
        assert getattr(POETRY, name) == pytest.approx(value, rel=0.01), name
