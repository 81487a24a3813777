"minikl.report: every rule fires where its threshold says, and nowhere else."
import math
from dataclasses import replace
from statistics import median

import numpy
import pytest

from minikl.recorded import RecordedRun, bits_of
from minikl.report import diagnose, norm_of


def invent(n=60, fall=0.0, padding=0.0):   # RecordedRun
    "A healthy run by formula: the loss falls to 0.6 bits per character and stays."
    noise = numpy.random.default_rng(0)
    steps = numpy.linspace(10, 600, n)
    bits = 0.6 + 2.4 * numpy.exp(-steps / 40)
    late = steps[2 * n // 5:]
    bits[2 * n // 5:] = numpy.interp(late, [300, 540], [0.6, 0.6 * (1 - fall)])
    norms = 0.5 * noise.lognormal(sigma=0.2, size=n)
    speed = 25_000 * noise.lognormal(sigma=0.02, size=n)
    training = []
    for i in range(n):
        training.append(
            {
                "step": round(steps[i]),
                "tokens": 2500 * (i + 1),
                "seconds": 0.1 * (i + 1),
                "lr": 0.02,
                "padding": padding,
                "train_bits_per_char": float(bits[i]),
                "loss": 2 * float(bits[i]),
                "gradient_norm": float(norms[i]),
                "tokens_per_s": float(speed[i]),
            }
        )
    evaluations = []
    for line in training[4::5]:
        held_out = 1.04 * line["train_bits_per_char"]
        evaluations.append({"step": line["step"], "bits_per_char": held_out})
    settings = {
        "options": {"clip": 1.0, "vocab_size": 600},
        "baselines": {"bigram": 1.2},
        "documents": {"unknown": 0, "tokens": 1000},
    }
    return RecordedRun("invented", True, settings, training, evaluations, [])


# ---- what makes a run sick


def loss_early(run, factor):
    run.training[3]["loss"] = factor * math.log(600)


def loss_in_the_end(run, share):   # of that of a model that knows nothing
    for line in run.training[48:]:
        line["loss"] = share * math.log(600)


def loss_later(run, factor):   # in the last but one fifth
    for line in run.training[36:48]:
        line["train_bits_per_char"] *= factor


def last_evaluation(run, factor):
    best = min(map(bits_of, run.evaluations))
    run.evaluations[-1]["bits_per_char"] = factor * best


def all_evaluations(run, factor):
    for line in run.evaluations:
        line["bits_per_char"] = factor * 0.6


def bigram(run, bits):
    run.settings["baselines"]["bigram"] = bits


def slow_down(run, factor):
    for line in run.training[48:]:
        line["tokens_per_s"] *= factor


def clip_share(run, share):
    norms = [norm_of(line) for line in run.training[30:]]
    run.settings["options"]["clip"] = float(numpy.quantile(norms, 1 - share))


def spike(run, factor):
    usual = median(map(norm_of, run.training))
    run.training[40]["gradient_norm"] = factor * usual


def unknown(run, count):
    run.settings["documents"]["unknown"] = count


CASES = [   # rule, a change, an amount that makes the rule fire, one that does not
    ("rate", loss_early, 1.06, 1.04),
    ("rate", loss_later, 1.11, 1.09),
    ("timid", loss_in_the_end, 0.71, 0.69),
    ("overfitting", last_evaluation, 1.021, 1.019),
    ("overfitting", all_evaluations, 1.26, 1.24),
    ("bigram", bigram, 0.6, 0.7),
    ("slow", slow_down, 0.55, 0.65),
    ("clipped", clip_share, 0.85, 0.75),
    ("spikes", spike, 5.1, 4.9),
    ("unknown", unknown, 11, 10),
]


def test_a_healthy_run_has_no_findings():
    assert diagnose(invent()) == {}


@pytest.mark.parametrize(("rule", "change", "too_much", "tolerable"), CASES)
def test_a_rule_fires_beyond_its_threshold(rule, change, too_much, tolerable):
    run = invent()
    change(run, too_much)
    assert set(diagnose(run)) == {rule}
    run = invent()
    change(run, tolerable)
    assert diagnose(run) == {}


SHAPES = [   # arguments of `invent`, rules that fire
    ({"fall": 0.09}, {"longer"}),
    ({"padding": 0.21}, {"padding"}),
    ({"padding": 0.19}, set()),
    ({"n": 14}, {"short"}),
    ({"n": 15}, set()),
]


@pytest.mark.parametrize(("arguments", "expected"), SHAPES)
def test_a_rule_fires_by_the_shape_of_the_run(arguments, expected):
    assert set(diagnose(invent(**arguments))) == expected


def test_a_run_under_way_is_unfinished():
    run = replace(invent(fall=0.09), finished=False)
    assert set(diagnose(run)) == {"unfinished", "longer"}


def test_a_known_floor_silences_the_advice_to_train_longer():
    run = invent(fall=0.09)
    floor = bits_of(run.evaluations[-1]) / 1.02
    run.settings["baselines"]["entropy of the grammar"] = floor
    assert diagnose(run) == {}
