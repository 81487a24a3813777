"minikl.record: W&B is told what the files are told."
import json
import time

import pytest

from minikl.options import RunOptions
from minikl.record import Recorder

BLOCK = 32 * 1024   # bytes; a piece of a message lies in one block
HEAD = 7            # bytes before a piece: checksum, length, kind
WHOLE = 1
LAST = 4


def messages(data):   # iterator of bytes
    """The messages in a .wandb file.

    Its format is that of LevelDB's log: github.com/google/leveldb, doc/log_format.md.
    """
    place = 7   # behind the file's own header
    message = b""
    while place < len(data):
        left = BLOCK - place % BLOCK
        length = int.from_bytes(data[place + 4:place + 6], "little")
        kind = data[place + 6] if place + 6 < len(data) else 0
        if left < HEAD or kind == 0:   # the rest of a block is empty
            place += left
            continue
        place += HEAD
        if place + length > len(data):   # it is being written
            return
        message += data[place:place + length]
        place += length
        if kind in (WHOLE, LAST):
            yield message
            message = b""


def whole_records(path):   # list of Record
    "What is in a .wandb file, once W&B's own process has written the last record."
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(600):
        records = [Record.FromString(each) for each in messages(path.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{path}: the last record is not there")


def history(path):   # {step: {name: value}}
    "The metrics in a .wandb file, decoded by W&B's own classes."
    found = {}
    for record in whole_records(path):
        if record.HasField("history"):
            values = {}
            for item in record.history.item:
                name = item.key or ".".join(item.nested_key)
                if not name.startswith("_"):
                    values[name] = json.loads(item.value_json)
            found[values["step"]] = values
    return found


def test_wandb_has_the_names_and_values_of_the_files(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = RunOptions(out_dir=str(tmp_path), use_wandb=True)
    recorder = Recorder(options, {"command": "train.py"}, [])
    recorder.write(0.3, step=3, loss=2.5, lr=0.02)
    recorder.write(0.3, step=3, bits_per_char=1.25)
    recorder.write(0.3, step=3, prompt="明", text="月")   # in samples.jsonl only
    recorder.write(0.6, step=6, loss=2.0, lr=0.01)
    recorder.close()
    expected = {}
    for line in (tmp_path / "running" / "metrics.jsonl").read_text().splitlines():
        numbers = json.loads(line)   # W&B joins what was logged under one step
        expected.setdefault(numbers["step"], {}).update(numbers)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert history(path) == expected
    assert sorted(expected[3]) == ["bits_per_char", "loss", "lr", "step"]
