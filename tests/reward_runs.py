"""Runs with a reward, as small as they can be: the model is to write 一.

`main` is a script like minikl/grpo.py, with this reward in place of the judge of verse.
"""
import json
import random

from small_runs import SHAPE

from minikl import grpo, train
from minikl.options import parse_options

SMALL = ["--log_every=1", "--threads=1", "--max_seq_len=32"]
REWARD = ["--max_steps=6", "--group_size=4", "--longest=10", "--batch_size=4"]


class CountingRun(grpo.RewardRun):
    def judge(self):
        def share(request, answer):
            found = answer.count("一") / max(len(answer), 1)
            return found, found > 0.5

        return share


def main(argv=None):
    options = (argv, grpo.RewardRunOptions, "reward_runs.py")
    train.launch(lambda: parse_options(*options), CountingRun)


def write_conversations(path, n=80):
    "Requests 写春 and 写秋, answered by eight characters at random."
    chance = random.Random(0)
    lines = []
    for _ in range(n):
        request = chance.choice(["写春", "写秋"])
        answer = "".join(chance.choice("一二三四") for _ in range(8))
        messages = [
            {"role": "user", "content": request},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"conversations": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_pupil(folder):
    "A folder with conversations and a model that has seen some of them."
    data = folder / "data.jsonl"
    write_conversations(data)
    train.main([
        *SHAPE, *SMALL, f"--data_jsonl_path={data}", f"--out_dir={folder}/sft",
        "--max_steps=20", "--batch_size=8", "--vocab_size=300",
    ])
