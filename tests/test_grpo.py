"GRPO: the loss, the answers, and a run that may be killed or divided."
import copy
import json
import shutil

import pytest
import reward_runs
import torch
from small_runs import (
    Killed,
    losses,
    metrics,
    one_line,
    result,
    well,
)

from minikl import grpo
from minikl.chat import ROLE_TOKENS
from minikl.files import UserError
from minikl.layouts import LAYOUTS, Nested
from minikl.model import MiniKL, MiniKLConfig
from minikl.policy import (
    AnswerBatch,
    RewardOptions,
    advantages,
    clipped_gain,
    grpo_loss,
    kl_estimate,
    log_probs,
    roll_out,
    seeds_of,
)

SHAPE = {"d_model": 16, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}


def small(seed=0, vocab_size=12):
    torch.manual_seed(seed)
    model = MiniKL(MiniKLConfig(**SHAPE, vocab_size=vocab_size, max_seq_len=32))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.double()


REQUESTS = [[3, 4], [3, 4], [5], [5]]
ANSWERS = [[6, 7, 2], [8, 2], [9, 9, 9, 9, 2], [2]]
PAIRS = list(zip(REQUESTS, ANSWERS, strict=True))
GAINS = torch.tensor([0.5, -0.5, -0.2, 0.2], dtype=torch.float64)


def batch_of(layout, settings, reference):
    batch = AnswerBatch(layout, REQUESTS, ANSWERS, GAINS, settings)
    batch.reference = log_probs(reference, batch).detach()
    return batch


def gradient(value, model):
    parts = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def alone(model, request, answer, temperature=1.0):
    "Log-probabilities of the tokens of one answer, read alone."
    ids = torch.tensor(request + answer)
    logits = model(ids, torch.arange(len(ids)), Nested([ids]).attend) / temperature
    table = logits.log_softmax(-1)
    first = len(request) - 1
    return table[range(first, len(ids) - 1), answer]


# ---- the loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_that_of_each_answer_alone(layout, temperature):
    model, reference = small(0), small(1)
    settings = RewardOptions(kl=0.3, temperature=temperature)
    batch = batch_of(LAYOUTS[layout], settings, reference)
    loss, n = grpo_loss(model, batch)
    expected = 0.0
    for request, answer, gain in zip(REQUESTS, ANSWERS, GAINS, strict=True):
        log_p = alone(model, request, answer, temperature)
        log_q = alone(reference, request, answer, temperature).detach()
        kl = (log_q - log_p).exp() - (log_q - log_p) - 1
        ratio = (log_p - log_p.detach()).exp()
        expected = expected + (0.3 * kl - ratio * gain).sum()
    assert n == sum(map(len, ANSWERS))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, model), gradient(expected, model))


def test_the_order_of_answers_does_not_matter():
    model, reference = small(0), small(1)
    settings = RewardOptions()
    one = batch_of(Nested, settings, reference)
    order = [2, 0, 3, 1]
    two = AnswerBatch(
        Nested,
        [REQUESTS[i] for i in order],
        [ANSWERS[i] for i in order],
        GAINS[order],
        settings,
    )
    two.reference = log_probs(reference, two).detach()
    torch.testing.assert_close(grpo_loss(model, one)[0], grpo_loss(model, two)[0])


def test_a_small_step_raises_good_answers_and_lowers_bad_ones():
    model = small()
    batch = batch_of(Nested, RewardOptions(kl=0), model)
    before = torch.stack([alone(model, *pair).sum() for pair in PAIRS])
    moved = copy.deepcopy(model)
    loss, _ = grpo_loss(moved, batch)
    loss.backward()
    with torch.no_grad():
        for weight in moved.parameters():
            weight -= 1e-3 * weight.grad
    after = torch.stack([alone(moved, *pair).sum() for pair in PAIRS])
    assert GAINS @ (after - before) > 0


@pytest.mark.parametrize("change, gain, is_flat", [
    (0.3, 1.0, True), (0.3, -1.0, False), (-0.3, -1.0, True), (-0.3, 1.0, False),
    (0.1, 1.0, False), (-0.1, -1.0, False),
])
def test_a_gain_is_flat_only_where_it_went_far_the_right_way(change, gain, is_flat):
    change = torch.tensor([change], requires_grad=True)
    clipped_gain(change, torch.tensor([gain]), 0.2).sum().backward()
    assert (change.grad == 0).all() == is_flat


def test_old_answers_are_weighed_by_their_ratio():
    model = small()
    batch = batch_of(Nested, RewardOptions(kl=0, clip_range=100), model)
    batch.old = log_probs(model, batch).detach() + 0.5
    loss, _ = grpo_loss(model, batch)
    n_tokens = torch.tensor(list(map(len, ANSWERS)))
    expected = -(GAINS * n_tokens).sum() * torch.tensor(-0.5).exp()
    torch.testing.assert_close(loss, expected.double())


def test_the_estimate_of_the_kl_is_never_negative_and_right_in_the_mean():
    log_p, log_q = torch.randn(2, 50, 9).double().log_softmax(-1)
    found = kl_estimate(log_p, log_q)
    assert (found >= 0).all() and kl_estimate(log_p, log_p).abs().max() < 1e-12
    mean = (log_p.exp() * found).sum(-1)
    torch.testing.assert_close(mean, (log_p.exp() * (log_p - log_q)).sum(-1))


def test_advantages_add_up_to_nothing():
    found = advantages(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]]))
    assert found.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]


# ---- answers


def test_an_answer_ends_with_stop_or_where_there_is_no_room():
    model = small().float()
    requests = [[3, 4], [5], list(range(3, 12)) * 3]
    answers = roll_out(model, requests, 2, [1, 2, 3], longest=9)
    for request, answer in zip(requests, answers, strict=True):
        assert 2 not in answer[:-1]
        room = min(9, 32 - len(request))
        assert answer[-1] == 2 or len(answer) == room
        assert len(answer) <= room


def test_an_answer_does_not_depend_on_its_neighbors():
    model = small().float()
    together = roll_out(model, REQUESTS, 2, range(4), longest=20)
    for i, request in enumerate(REQUESTS):
        assert roll_out(model, [request], 2, [i], longest=20) == [together[i]]


def test_no_seed_comes_twice():
    found = set()
    for seed in range(3):
        for step in range(50):
            found.update(seeds_of(seed, step, range(64)))
    assert len(found) == 3 * 50 * 64


# ---- runs

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def pupil(once):
    return once("pupil", reward_runs.make_pupil)


@pytest.fixture
def learn(script, tmp_path, pupil):
    "learn('name', *options): a run with a reward, in this process."
    def call(name, *options, main=reward_runs.main):
        return script(
            main, *arguments(pupil), f"--out_dir={tmp_path / name}", *options
        )

    return call


def arguments(pupil):
    given = [f"--data_jsonl_path={pupil}/data.jsonl", f"--init_path={pupil}/sft"]
    return [*reward_runs.SMALL, *reward_runs.REWARD, *given]


def test_the_reward_rises_and_is_recorded(learn, tmp_path):
    well(learn("out", "--max_steps=30", "--lr=0.03", "--kl=0.01", "--group_size=8"))
    lines = [line for line in metrics(tmp_path / "out") if "reward" in line]
    rewards = [line["reward"] for line in lines]
    assert len(lines) == 30
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
    assert lines[0]["kl"] < 1e-6 < lines[-1]["kl"]
    assert all(0 <= line["silent"] <= 1 for line in lines)
    assert {"loss", "lr", "tokens_per_s", "padding"} <= json.loads(
        (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0]
    ).keys()
    assert any("bits_per_char" in line for line in metrics(tmp_path / "out"))


@pytest.mark.parametrize("options", [[], ["--updates=3"], ["--log_every=4"]])
def test_a_killed_run_comes_back_exact(options, learn, tmp_path, monkeypatch):
    well(learn("whole", "--save_every=2", *options))
    take = grpo.RewardLearner.step

    def dies(self, documents, step, done):
        if step == 5:
            raise Killed
        return take(self, documents, step, done)

    with monkeypatch.context() as patched:
        patched.setattr(grpo.RewardLearner, "step", dies)
        with pytest.raises(Killed):
            learn("out", "--save_every=2", *options)
    well(learn("out", "--save_every=2", "--resume", *options))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_micro_batches_change_nothing(learn, tmp_path):
    well(learn("one"))
    well(learn("parts", "--grad_accum=2"))
    close(tmp_path / "one", tmp_path / "parts")


def close(one, other):
    "Two runs that differ in nothing but rounding."
    assert losses(one) == pytest.approx(losses(other), abs=1e-4)
    for left, right in zip(metrics(one), metrics(other), strict=True):
        for name in ("reward", "form", "kl", "silent", "bits_per_char"):
            if name in left:
                assert left[name] == pytest.approx(right[name], abs=1e-3), name


def test_two_processes_learn_what_one_does(learn, tmp_path, pupil, tmp_path_factory):
    import two_processes

    well(learn("one"))
    folder = tmp_path_factory.mktemp("two")
    options = [*arguments(pupil), f"--out_dir={tmp_path / 'two'}"]
    well(two_processes.run(options, folder, "reward_runs"))
    close(tmp_path / "one", tmp_path / "two")


def test_another_seed_writes_other_answers(learn, tmp_path):
    well(learn("one", "--max_steps=2"))
    well(learn("two", "--max_steps=2", "--seed=1"))
    assert losses(tmp_path / "one") != losses(tmp_path / "two")


@pytest.mark.parametrize("option, said", [
    ("--init_path=", "--init_path: a reward needs a model"),
    ("--plan", "--plan: not possible"),
    ("--shard", "--shard: not possible"),
    ("--candidates=3", "unrecognized arguments: --candidates=3"),
    ("--first_weights=bigrams", "unrecognized arguments: --first_weights=bigrams"),
    ("--group_size=1", "group_size=1: expected at least 2"),
    ("--longest=0", "longest=0: expected at least 1"),
    ("--data_jsonl_path=none.jsonl", "none.jsonl"),
])
def test_a_mistake_is_said_in_one_line(option, said, learn):
    one_line(learn("out", option), said)


def test_requests_are_needed(script, tmp_path, pupil):
    data = tmp_path / "plain.jsonl"
    lines = [json.dumps({"content": "一二三四" * (i + 1)}) for i in range(20)]
    data.write_text("\n".join(lines))
    given = [f"--data_jsonl_path={data}", f"--init_path={pupil}/sft"]
    more = [*reward_runs.SMALL, *given, f"--out_dir={tmp_path / 'out'}"]
    one_line(script(reward_runs.main, *more), "no conversations")


def test_roles_are_needed(learn, pupil, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pupil / "sft", base)
    vocabulary = base / "vocab_dict.json"
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    kept = {token: i for token, i in tokens.items() if token not in ROLE_TOKENS}
    vocabulary.write_text(json.dumps(kept), encoding="utf-8")
    one_line(learn("out", f"--init_path={base}"), "no role tokens")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}


def test_the_folder_of_the_first_model_is_left_alone(learn, pupil):
    one_line(learn("out", f"--out_dir={pupil}/sft"), "expected another folder")


def test_an_unknown_tune_earns_nothing(monkeypatch):
    class NoTunes:
        tunes = {}

    monkeypatch.setattr(grpo, "home_judge", NoTunes)
    judge = grpo.verse_judge(grpo.FormOptions())
    assert judge("写一首《无名》", "一二三。") == judge("写诗", "") == (0.0, False)


def test_a_run_needs_a_model_that_answers():
    with pytest.raises(UserError, match="--init_path"):
        grpo.check_reward_options(grpo.RewardRunOptions())
