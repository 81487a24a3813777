"The loss that forgets its logits: precision, refusals, memory."

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minikl.data import IGNORE
from minikl.model import CHUNK, ChunkedCrossEntropy


def random_case(n_tokens, vocab=50, d_model=16, dtype=torch.float64):
    torch.manual_seed(n_tokens)
    hidden = torch.randn(n_tokens, d_model, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, d_model, dtype=dtype) / d_model**0.5
    targets = torch.randint(vocab, (n_tokens,))
    targets[::3] = IGNORE
    return hidden, weight.requires_grad_(), targets


def plain_loss(hidden, weight, targets, shift=None):
    logits = F.linear(hidden, weight, shift)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def chunked_loss(hidden, weight, targets, shift=None):
    with_gradients = torch.is_grad_enabled()
    return ChunkedCrossEntropy.apply(hidden, weight, targets, shift, with_gradients)


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_value_and_gradients_equal_the_plain_loss(n_tokens, is_shifted):
    case = random_case(n_tokens)
    if is_shifted:
        case = *case, torch.randn(len(case[1]), dtype=torch.float64)
    ours = chunked_loss(*case)
    plain = plain_loss(*case)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-9)
    our_gradients = torch.autograd.grad(2 * ours, case[:2])
    plain_gradients = torch.autograd.grad(2 * plain, case[:2])
    for found, right in zip(our_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(*case), plain, rtol=0, atol=1e-9)


def test_a_second_derivative_is_refused():
    case = random_case(9)
    loss = chunked_loss(*case).square()
    gradient = torch.autograd.grad(loss, case[:1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_second_backward_pass_is_refused():
    loss = chunked_loss(*random_case(9))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_autocast_gradients_are_as_precise_as_plain_ones():
    hidden, weight, targets = random_case(1500, 300, 32, torch.float32)
    wide = hidden.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        plain_loss(wide, wide_weight, targets), [wide, wide_weight]
    )
    off = {}
    for loss in (plain_loss, chunked_loss):
        with torch.autocast("cpu", torch.bfloat16):
            total = loss(hidden, weight, targets)
            gradients = torch.autograd.grad(total, [hidden, weight])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        errors = []
        for found, right in zip(gradients, exact, strict=True):
            errors.append(((found - right).norm() / right.norm()).item())
        off[loss] = max(errors)
    assert off[chunked_loss] < 1.5 * off[plain_loss] < 0.02


class Made(TorchDispatchMode):
    "The shapes of all tensors made while it is open."

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.shapes |= {tuple(x.shape) for x in tensors if x._base is None}
        return out


def test_evaluation_takes_no_memory_for_gradients():
    case = random_case(2 * CHUNK, vocab=50, d_model=16)
    gradients = {(2 * CHUNK, 16), (50, 16)}
    with Made() as training:
        chunked_loss(*case)
    with torch.no_grad(), Made() as evaluation:
        chunked_loss(*case)
    assert gradients <= training.shapes
    assert not gradients & evaluation.shapes
