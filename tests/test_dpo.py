"DPO: which tokens count, what the loss is, what it refuses, on which device."
import copy
import math
import random

import pytest
import torch

from minikl.dpo import (
    Pair,
    answer_log_probs,
    best_and_worst,
    dpo_loss,
    pair_log_probs,
    preference_loss,
    reference_log_probs,
)
from minikl.files import UserError
from minikl.layouts import Padded
from minikl.model import MiniKL, MiniKLConfig


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"d_model": 16, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}
    model = MiniKL(MiniKLConfig(**shape, vocab_size=30, **options)).double()
    with torch.no_grad():
        model.embed.weight *= 20
    return model


def conversation(chance, n_asked, n_answered):
    "A document of lesson 20: <s>, a request as complements, an answer."
    asked = [-1 - chance.randrange(30) for _ in range(n_asked)]
    answered = [chance.randrange(30) for _ in range(n_answered)]
    return torch.tensor([0, *asked, *answered])


def random_pairs(n, seed=0):
    chance = random.Random(seed)
    found = []
    for _ in range(n):
        lengths = [(3, chance.randint(1, 9)) for _ in range(2)]
        found.append(Pair(*(conversation(chance, *length) for length in lengths)))
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_log_probabilities_are_the_loss_of_training(tied):
    "Summed over documents, they are what `model.loss` says of the same batch."
    model = tiny(tie_embeddings=tied)
    docs = [pair.chosen for pair in random_pairs(5)]
    total, n_targets = model.loss(Padded(docs))
    found = answer_log_probs(model, docs)
    assert found.shape == (5,)
    assert n_targets == sum(int((doc[1:] >= 0).sum()) for doc in docs)
    torch.testing.assert_close(-found.sum(), total, rtol=1e-10, atol=1e-10)


def test_an_answer_does_not_depend_on_its_neighbors():
    model = tiny()
    docs = [pair.rejected for pair in random_pairs(6, seed=1)]
    together = answer_log_probs(model, docs)
    alone = torch.cat([answer_log_probs(model, [doc]) for doc in docs])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_the_request_counts_only_as_what_is_read():
    model = tiny()
    answer = torch.tensor([5, 6])
    one, other = (torch.tensor([0, ~request, 7]) for request in (3, 4))
    docs = [torch.cat([doc, answer]) for doc in (one, other)]
    first, second = answer_log_probs(model, docs)
    assert first != second
    learnt_too = torch.cat([torch.tensor([0, 3, 7]), answer])
    assert answer_log_probs(model, [learnt_too]) < first


def test_a_document_without_an_answer_has_probability_one():
    docs = [torch.tensor([0, ~3, ~4]), torch.tensor([0, ~3, 4])]
    found = answer_log_probs(tiny(), docs)
    assert found[0] == 0 > found[1]


def test_the_reference_is_the_same_in_parts():
    model = tiny()
    pairs = random_pairs(7)
    whole = pair_log_probs(model, pairs)
    parts = reference_log_probs(model, pairs, batch_size=3)
    assert parts.shape == (7, 2) and not parts.requires_grad
    torch.testing.assert_close(whole.detach(), parts, rtol=1e-10, atol=1e-10)


def test_chosen_first():
    model = tiny()
    pairs = random_pairs(4)
    found = reference_log_probs(model, pairs)
    for row, pair in zip(found, pairs, strict=True):
        torch.testing.assert_close(row, answer_log_probs(model, list(pair)).detach())


def test_gradient_of_the_loss_by_the_formula():
    "-β σ(-d) for the chosen, +β σ(-d) for the rejected."
    torch.manual_seed(0)
    policy = torch.randn(9, 2).double().requires_grad_()
    reference = torch.randn(9, 2).double()
    dpo_loss(policy, reference, beta=0.7).sum().backward()
    gains = (policy - reference).detach()
    weight = 0.7 * torch.sigmoid(-0.7 * (gains[:, 0] - gains[:, 1]))
    wanted = torch.stack([-weight, weight], dim=1)
    torch.testing.assert_close(policy.grad, wanted, rtol=1e-12, atol=1e-12)


def test_the_loss_stays_finite():
    policy = torch.tensor([[-2000.0, 0.0], [0.0, -2000.0]])
    found = dpo_loss(policy, torch.zeros(2, 2), beta=1.0)
    assert found.tolist() == [2000.0, 0.0]


def test_at_the_start_only_the_chosen_are_a_loss():
    model = tiny()
    pairs = random_pairs(5)
    reference = reference_log_probs(model, pairs)
    loss, gains = preference_loss(model, pairs, reference, beta=0.4, nll=0.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert gains.tolist() == pytest.approx([0, 0], abs=1e-10)
    assert not gains.requires_grad
    with_nll, _ = preference_loss(model, pairs, reference, beta=0.4, nll=2.0)
    total, n_targets = model.loss(Padded([pair.chosen for pair in pairs]))
    wanted = math.log(2) + 2 * total.item() / n_targets.item()
    assert with_nll.item() == pytest.approx(wanted, abs=1e-10)


def test_a_pair_of_the_same_answer_twice_leaves_the_nll_alone():
    model = tiny()
    pairs = [Pair(pair.chosen, pair.chosen) for pair in random_pairs(3)]
    reference = reference_log_probs(model, pairs)
    loss, _ = preference_loss(model, pairs, reference, beta=0.4, nll=0.0)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-12


def test_a_step_widens_the_margin():
    model = tiny()
    pairs = random_pairs(6)
    reference = reference_log_probs(model, pairs)
    moved = copy.deepcopy(model)
    loss, _ = preference_loss(moved, pairs, reference, nll=0.0)
    loss.backward()
    with torch.no_grad():
        for weight in moved.parameters():
            weight -= 1e-3 * weight.grad
    after, gains = preference_loss(moved, pairs, reference, nll=0.0)
    assert after < loss and gains[0] > gains[1]


@pytest.mark.parametrize("group", [-1, 0, 1])
def test_nothing_to_compare(group):
    with pytest.raises(UserError, match=f"group={group}: expected 2 or more"):
        best_and_worst([0.1, 0.2], group)


def test_best_and_worst_against_sorting():
    chance = random.Random(0)
    for group in (2, 3, 5):
        scores = [chance.randrange(4) for _ in range(47)]
        found = best_and_worst(scores, group)
        wanted = 0
        for start in range(0, len(scores) - group + 1, group):
            part = sorted(scores[start : start + group])
            wanted += part[0] < part[-1]
        assert len(found) == wanted
        for best, worst in found:
            assert best // group == worst // group
            start = best // group * group
            part = scores[start : start + group]
            assert scores[best] == max(part) > min(part) == scores[worst]


def test_no_answers_no_pairs():
    assert best_and_worst([], 4) == best_and_worst([1, 2, 3], 4) == []
