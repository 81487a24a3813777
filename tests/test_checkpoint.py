"The rules of resuming, without a run."
import json
from types import SimpleNamespace

import pytest

from minikl import checkpoint
from minikl.files import UserError

COUNTERS = ("step", "tokens")
SETTINGS = {
    "options": {"lr": 0.01, "seed": 0, "max_steps": 10, "threads": 1, "dtype": "auto"},
    "tokens": "tokens-12",
    "dtype": "fp32",
}
STATE = {"at": {"step": 4, "tokens": 9}, "lines": [], "settings": SETTINGS}


def saved(folder, state):
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def changed(**options):
    "The settings with other options, or with other data."
    tokens = options.pop("tokens", SETTINGS["tokens"])
    dtype = options.pop("dtype", SETTINGS["dtype"])
    return {
        "options": {**SETTINGS["options"], **options},
        "tokens": tokens,
        "dtype": dtype,
    }


@pytest.mark.parametrize(
    ("settings", "said", "is_another"),
    [
        (changed(), [], False),
        (changed(threads=8), [], False),
        (changed(lr=0.02), ["lr=0.02, there 0.01"], False),
        (changed(max_steps=20), ["max_steps=20, there 10"], False),
        (changed(dtype="bf16"), ["dtype=bf16, there fp32"], False),
        (changed(seed=1), ["seed=1, there 0"], True),
        (
            changed(tokens="tokens-13"),
            ["data and vocabulary=tokens-13, there tokens-12"],
            True,
        ),
        (changed(an_option_of_a_later_version=1), [], False),
    ],
)
def test_differences(settings, said, is_another, tmp_path):
    folder = saved(tmp_path, STATE)
    found = checkpoint.differences(settings, folder, COUNTERS)
    assert list(found.values()) == said
    assert checkpoint.another_run(found) == (said if is_another else [])


@pytest.mark.parametrize(
    "state",
    [
        None,
        5,
        [],
        {},
        {**STATE, "at": {"step": 4}},
        {**STATE, "at": [4, 9]},
        {**STATE, "lines": {}},
        {**STATE, "settings": None},
        {**STATE, "settings": {**SETTINGS, "options": ["lr"]}},
        {**STATE, "settings": {"options": {}, "tokens": "tokens-12"}},
    ],
)
def test_the_state_of_no_run_is_refused(state, tmp_path):
    with pytest.raises(UserError, match="not the state of a run; delete"):
        checkpoint.differences(SETTINGS, saved(tmp_path, state), COUNTERS)


def test_fetch_replaces_a_damaged_checkpoint(tmp_path):
    "Here the first process is also the one that sends."
    for folder, text in (("there", "whole"), ("here", "damaged")):
        (tmp_path / folder / "step-00000004").mkdir(parents=True)
        (tmp_path / folder / "step-00000004" / "weights").write_text(text)
    large = bytes(range(256)) * 2**17  # 32 MiB: three blocks, the last one empty
    (tmp_path / "there/step-00000004/large").write_bytes(large)
    ranks = SimpleNamespace(rank=0)
    path = checkpoint.fetch(
        ranks, tmp_path / "here", tmp_path / "there/step-00000004", 0
    )
    assert path == tmp_path / "here/step-00000004"
    assert (path / "weights").read_text() == "whole"
    assert (path / "large").read_bytes() == large
    assert [found.name for found in (tmp_path / "here").iterdir()] == [path.name]
