"Each ingredient: no token sees its future, padding changes nothing, all learn."
from dataclasses import replace

import pytest
import torch

from minikl.data import IGNORE, Documents
from minikl.ingredients import (
    INGREDIENTS,
    REFERENCE,
    BatchRamp,
    BigramTable,
    ChunkedLoss,
    MixtureOfExperts,
    OtherLoss,
    Scalars,
    Smear,
    SoftCap,
    TwoAhead,
    ValueEmbeddings,
    Windowed,
    ZeroProjections,
    ZLoss,
    after_next,
    beginnings,
    summed_nats,
    window_mask,
)
from minikl.layouts import Nested, Packed, Padded
from minikl.learner import Learner
from minikl.model import MiniKL, MiniKLConfig
from minikl.options import LearningOptions, MachineOptions
from minikl.parallel import Ranks

SMALL = {
    "d_model": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 2,
    "vocab_size": 60,
    "max_seq_len": 128,
}
LEARNING = {"candidates", "decay", "first_weights"}
NAMES = sorted(INGREDIENTS)
each_ingredient = pytest.mark.parametrize("name", NAMES)


def config_of(name):
    options = INGREDIENTS[name].options
    return MiniKLConfig(
        **{**SMALL, **{k: v for k, v in options.items() if k not in LEARNING}}
    )


def learner_of(name, seed=0):
    entry = INGREDIENTS[name]
    options = {**REFERENCE.options, **entry.options}
    chosen = {k: v for k, v in options.items() if k in LEARNING}
    learning = LearningOptions(batch_size=8, seed=seed, **chosen)
    ranks = Ranks(threads=1, device="cpu")
    return entry.learner(config_of(name), learning, MachineOptions(device="cpu"), ranks)


def shaken(model):
    "Weights that begin at zero would hide mistakes."
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def model_of(name):
    return shaken(learner_of(name).model)


def some_documents(n=6, longest=50):
    torch.manual_seed(0)
    lengths = torch.randint(2, longest, (n,)).tolist()
    return [torch.randint(50, (length,)) for length in lengths]


def few(n_documents=64, longest=50):   # Documents
    made = some_documents(n_documents, longest)
    documents = Documents.__new__(Documents)
    documents.tokens = torch.cat(made).int()
    documents.lengths = torch.tensor([len(doc) for doc in made])
    documents.ends = documents.lengths.cumsum(0)
    documents.starts = documents.ends - documents.lengths
    documents.n_chars = int(documents.lengths.sum())
    return documents


def layout_of(name):
    return learner_of(name).layout


@torch.no_grad()
def logits(model, batch):
    return model(batch.ids, batch.positions, batch.attend)


@each_ingredient
def test_no_token_sees_its_future(name):
    model = model_of(name)
    model.eval()
    layout = layout_of(name)
    torch.manual_seed(3)
    doc = torch.randint(60, (50,))
    changed = doc.clone()
    changed[30] = (doc[30] + 1) % 60
    before = logits(model, layout([doc]))
    after = logits(model, layout([changed]))
    torch.testing.assert_close(before[:30], after[:30])
    assert (before[30] - after[30]).abs().max() > 0.01


@each_ingredient
def test_documents_do_not_see_each_other(name):
    model = model_of(name)
    model.eval()
    docs = some_documents()
    layout = layout_of(name)
    batch = layout(docs)
    together = batch.unbatch(logits(model, batch))
    for doc, found in zip(docs, together, strict=True):
        torch.testing.assert_close(found, logits(model, layout([doc])))


@each_ingredient
def test_layouts_agree(name):
    if name == "window":
        pytest.skip("is a layout")
    model = model_of(name)
    model.eval()
    docs = some_documents()
    found = []
    for layout in (Padded, Packed, Nested):
        batch = layout(docs)
        with torch.enable_grad():
            loss, n_targets = model.loss(batch)
        parts = batch.unbatch(logits(model, batch))
        found.append((loss.detach(), n_targets, torch.cat(parts)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@each_ingredient
def test_every_weight_learns(name):
    model = model_of(name)
    model.train()
    loss, _ = model.loss(layout_of(name)(some_documents()))
    loss.backward()
    for weight_name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.any(), weight_name


@each_ingredient
def test_gradients_are_those_of_the_loss(name):
    learner = learner_of(name)
    model = shaken(learner.model).double()
    model.eval()
    batch = learner.layout(some_documents(3))
    loss, _ = model.loss(batch)
    loss.backward()
    torch.manual_seed(2)
    for weight in model.parameters():
        step = 1e-6 * torch.randn_like(weight)
        change = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step
            change += sign * float(model.loss(batch)[0]) / 2
            with torch.no_grad():
                weight -= sign * step
        expected = float((weight.grad * step).sum())
        assert change == pytest.approx(expected, rel=1e-3, abs=1e-9)


@each_ingredient
def test_it_learns(name):
    learner = learner_of(name)
    documents = few()
    before = learner.bits_per_char(documents)
    for step in range(30):
        result = learner.step(documents, step, (step + 0.5) / 30)
        assert result.n_targets > 0
    assert learner.bits_per_char(documents) < before - 0.1


@each_ingredient
def test_all_weights_are_optimized_once(name):
    learner = learner_of(name)
    seen = []
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            seen += [id(weight) for weight in group["params"]]
    weights = [id(weight) for weight in learner.model.parameters()]
    assert sorted(seen) == sorted(weights)


SAME_AT_FIRST = ValueEmbeddings, Scalars, Smear, BigramTable, TwoAhead, ZLoss


@pytest.mark.parametrize("kind", SAME_AT_FIRST, ids=lambda kind: kind.__name__)
def test_some_begin_as_the_reference(kind):
    config = MiniKLConfig(**SMALL)
    torch.manual_seed(0)
    reference = MiniKL(config)
    torch.manual_seed(0)
    model = kind(config)
    batch = Nested(some_documents())
    assert torch.equal(logits(model, batch), logits(reference, batch))


def test_blocks_with_zero_projections_add_nothing():
    model = ZeroProjections(MiniKLConfig(**SMALL))
    batch = Nested(some_documents())
    hidden = model.hidden(batch.ids, batch.positions, batch.attend)
    torch.testing.assert_close(hidden, model.norm(model.embed(batch.ids)))


def test_a_chunked_loss_is_the_plain_one():
    torch.manual_seed(0)
    hidden = torch.randn(1300, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (1300,))
    targets[::7] = IGNORE
    found = ChunkedLoss.apply(hidden, weight, targets, summed_nats)
    plain = summed_nats(hidden @ weight.T, targets)
    torch.testing.assert_close(found, plain)
    for one, other in zip(
        torch.autograd.grad(found * 3, (hidden, weight)),
        torch.autograd.grad(plain * 3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_logits_stay_below_the_cap():
    model = SoftCap(MiniKLConfig(**SMALL))
    with torch.no_grad():
        model.head.weight *= 10_000
    found = logits(model, Nested(some_documents()))
    assert found.abs().max() <= 15 and found.abs().max() > 14


def test_the_target_after_the_next():
    batch = Nested([torch.tensor([5, 6, 7, 8]), torch.tensor([1, 2, 3, 4])])
    no = IGNORE
    assert batch.targets.tolist() == [6, 7, 8, no, 2, 3, 4, no]
    assert after_next(batch.targets).tolist() == [7, 8, no, no, 3, 4, no, no]
    padded = Padded([torch.tensor([5, 6, 7, 8]), torch.tensor([1, 2])])
    assert after_next(padded.targets).tolist() == [[7, 8, no, no], [no, no, no, no]]


@pytest.mark.parametrize("kind", [TwoAhead, ZLoss])
def test_evaluation_is_not_changed(kind):
    config = MiniKLConfig(**SMALL)
    model = shaken(kind(config))
    plain = MiniKL(config)
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = Nested(some_documents())
    with torch.no_grad():
        torch.testing.assert_close(model.loss(batch), plain.loss(batch))
    assert model.loss(batch)[0] > plain.loss(batch)[0] + 1e-4


@pytest.mark.parametrize("kind", [SoftCap, TwoAhead])
def test_what_needs_all_logits_says_so(kind):
    from minikl.files import UserError

    batch = Nested(some_documents())
    batch.candidates = "some"
    with pytest.raises(UserError, match="candidates=0"):
        kind(MiniKLConfig(**SMALL)).loss(batch)


def test_the_window_by_hand():
    seen = window_mask(5, 2, 1).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_a_short_document_knows_no_window():
    model = shaken(MiniKL(MiniKLConfig(**SMALL)))
    for length, same in ((32, True), (33, True), (34, False)):
        doc = torch.randint(60, (length,))
        plain = logits(model, Nested([doc]))
        windowed = logits(model, Windowed([doc]))
        assert torch.allclose(plain, windowed, atol=1e-5) == same, length


def test_experts_are_used_evenly():
    learner = learner_of("mixture of experts")
    documents = few()
    loads = []
    router = learner.model.blocks[0].ffn.router

    def count(module, inputs, output):
        bias = learner.model.blocks[0].ffn.bias
        chosen = (2 * output.sigmoid() + bias).argmax(-1)
        loads.append(chosen.bincount(minlength=4))

    router.register_forward_hook(count)
    for step in range(60):
        learner.step(documents, step, 0.5)
    total = torch.stack(loads[30:]).sum(0).float()
    assert (total / total.sum()).min() > 0.1


class Recorder(BatchRamp):
    "Keeps the documents of each update."

    def batches(self, documents, step):
        size = self.learning.batch_size
        self.drawn = getattr(self, "drawn", [])
        self.drawn.append(documents.draw(step, size, self.learning.seed))
        return super().batches(documents, step)


def test_a_batch_ramp_reads_every_document_once():
    ranks = Ranks(threads=1, device="cpu")
    learning = LearningOptions(batch_size=8, **REFERENCE.options)
    sizes = (MiniKLConfig(**SMALL), learning, MachineOptions(device="cpu"), ranks)
    learner = Recorder(*sizes)
    documents = few()
    plain = Learner(*sizes)
    for step in range(8):
        done = (step + 0.5) / 8
        result = learner.step(documents, step, done)
        expected = sum(plain.batches(documents, step)[1:])
        assert result.n_targets == expected
    assert [len(part) for part in learner.drawn] == 12 * [2] + 4 * [4] + 3 * [8]
    assert sum(learner.drawn, []) == documents.draw(0, 64)
    assert learner.learning == replace(learning)


def test_beginnings_of_documents():
    documents = few()
    short = beginnings(documents, 10)
    for i in range(len(documents)):
        assert torch.equal(short[i], documents[i][:10])
    assert short.n_targets() == int((documents.lengths.clamp(max=10) - 1).sum())


def test_other_losses_are_models():
    assert issubclass(OtherLoss, MiniKL) and issubclass(MixtureOfExperts, MiniKL)
