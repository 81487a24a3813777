"The rules of resuming, without a run."
import errno
import json
import os
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


def test_every_name_is_given_after_the_disk_has_the_bytes(tmp_path, monkeypatch):
    "What a power cut could tear: each file, the folder, and the name of the folder."
    order = []

    def watched(name, call):
        def watch(*arguments):
            order.append(name)
            return call(*arguments)

        return watch

    monkeypatch.setattr(os, "fsync", watched("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", watched("name the file", os.replace))
    monkeypatch.setattr(os, "rename", watched("name the folder", os.rename))
    checkpoint.write_checkpoint(tmp_path, 1, {"weights": b"..."})
    file = ["fsync", "name the file"]
    assert order == [*file, *file, "fsync", "name the folder", "fsync"]


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in (1, 2, 3):
        checkpoint.write_checkpoint(tmp_path, step, {"weights": bytes([step]) * 1000})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_checkpoint(tmp_path, 4, {"weights": bytes([4]) * 1000})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
    newest = checkpoint.newest_checkpoint(tmp_path)
    assert (newest / "weights").read_bytes() == bytes([3]) * 1000


@pytest.mark.parametrize("name", ["weights", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damage_is_named_and_passed_over(name, damage, tmp_path, capsys):
    for step in (2, 3):
        files = {"weights": bytes([step]) * 1000, "state.json": f"step {step}"}
        checkpoint.write_checkpoint(tmp_path, step, files)
    file = tmp_path / "step-00000003" / name
    data = file.read_bytes()
    damaged = {"cut": data[:-1], "changed": data[:5] + b"!" + data[6:], "empty": b""}
    file.write_bytes(damaged[damage])
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-00000002"
    said = capsys.readouterr().out
    assert "step-00000003: damaged" in said and said.count("\n") == 1
