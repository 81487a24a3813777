"Candidates of the output layer, and weights from counts."
import math

import pytest
import torch
from small_runs import GIVEN, TINY, losses, well

from minikl import shortcuts
from minikl.data import IGNORE
from minikl.layouts import Nested
from minikl.model import MiniKL, MiniKLConfig
from minikl.parallel import Ranks
from minikl.shortcuts import (
    count_pairs,
    counted_weights,
    draw_candidates,
    factors,
    first_tables,
)


class Lists(list):
    "Documents, as far as counting goes."
    def local_indices(self):
        return range(len(self))

    @property
    def lengths(self):
        return torch.tensor([len(ids) for ids in self])


def some(n_documents, vocab_size, seed=0):   # Lists
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator}
    return Lists(torch.randint(vocab_size, (20,), **draw) for _ in range(n_documents))


def marks(vocab_size, ids):
    asked = torch.zeros(vocab_size, dtype=torch.bool)
    asked[ids] = True
    return asked


@pytest.mark.parametrize("n_drawn", [0, 1, 5, 7, 8, 100])
def test_candidates_stand_for_the_whole_vocabulary(n_drawn):
    few = draw_candidates(marks(10, [3, 7]), n_drawn, seed=1)
    assert few.ids[:2].tolist() == [3, 7]
    assert len(set(few.ids.tolist())) == 2 + min(n_drawn, 8)
    # each of the drawn counts as often as it takes to make 8 of them
    counted = few.shift.exp()
    assert counted[:2].tolist() == [1, 1]
    assert counted[2:].sum().item() == pytest.approx(8 if n_drawn else 0)
    assert [int(few.places[i]) for i in few.ids] == list(range(len(few.ids)))
    assert (few.places != IGNORE).sum() == len(few.ids)


def test_everything_asked_for_leaves_nobody_to_draw():
    few = draw_candidates(marks(4, [0, 1, 2, 3]), 5, seed=0)
    assert few.ids.tolist() == [0, 1, 2, 3] and few.shift.tolist() == [0] * 4


def test_the_draw_follows_the_seed():
    asked = marks(1000, [1])
    one, same, other = (draw_candidates(asked, 50, seed).ids for seed in (5, 5, 6))
    assert one.equal(same) and not one.equal(other)


def test_what_is_not_asked_is_not_asked_among_candidates():
    few = draw_candidates(marks(10, [3, 7]), 2, seed=0)
    targets = torch.tensor([7, IGNORE, 3])
    weight, places, shift = few.narrow(torch.arange(10.0)[:, None], targets)
    assert places.tolist() == [1, IGNORE, 0]
    assert weight[:2, 0].tolist() == [3, 7] and len(shift) == len(weight) == 4


def test_pairs_are_counted():
    documents = some(30, 6)
    wanted = torch.zeros(6, 6)
    for ids in documents:
        for a, b in zip(ids[:-1], ids[1:], strict=True):
            wanted[a, b] += 1
    assert count_pairs(documents, 6).to_dense().equal(wanted)


def test_tokens_of_a_request_are_counted_as_tokens():
    "They are kept as complements: lesson 20."
    documents = some(5, 6)
    hidden = Lists(torch.where(torch.arange(20) < 9, ~ids, ids) for ids in documents)
    assert count_pairs(hidden, 6).to_dense().equal(count_pairs(documents, 6).to_dense())


def test_the_product_of_the_tables_is_the_log_of_shares():
    "With room for every axis nothing is lost: an oracle with dense tables."
    documents = some(40, 12)
    counts = count_pairs(documents, 12)
    left, right, log_share = factors(counts, 12, strength=3)
    n = counts.to_dense()
    share = log_share.exp()
    smoothed = (n + 3 * share) / (n.sum(1, keepdim=True) + 3)
    found = (left @ right.T + log_share).log_softmax(1)
    assert found.exp().sub(smoothed).abs().max() < 1e-3
    assert found.sub(smoothed.log()).abs().max() < 1e-3


@pytest.mark.parametrize("vocab_size", [5, 64])
@pytest.mark.parametrize("width", [4, 8, 32])
def test_first_tables_are_of_one_length_and_finite(vocab_size, width):
    tables = first_tables(count_pairs(some(9, vocab_size), vocab_size), width, scale=1)
    embed, head = tables["embed.weight"], tables["head.weight"]
    assert embed.shape == head.shape == (vocab_size, width)
    assert embed.isfinite().all() and head.isfinite().all()
    rms = embed.square().mean(1).sqrt()
    assert rms == pytest.approx(torch.ones(vocab_size), abs=1e-4)


def test_every_weight_moves_from_the_start():
    "Blocks that add nothing at first would never learn if their inside were zero, too."
    documents = some(20, 30)
    config = MiniKLConfig(
        d_model=8, num_heads=2, num_kv_heads=1, num_layers=2, vocab_size=30
    )
    model = MiniKL(config)
    ranks = Ranks(threads=1)
    model.load_state_dict(dict(counted_weights(config, documents, 0, ranks)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(Nested(list(documents)))[0].backward()
        optimizer.step()
    for name, weight in model.named_parameters():
        assert not weight.equal(before[name]), name


def test_two_processes_draw_the_same_candidates_and_learn_what_one_does(
    run, two, tmp_path
):
    options = ["--max_steps=8", "--first_weights=random"]
    given = [*TINY, *GIVEN, f"--out_dir={tmp_path}/two"]
    well(two(*given, *options, "--candidates=3"))
    well(run("one", *options, "--candidates=3"))
    well(run("all", *options, "--candidates=0"))
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-4)
    assert losses(tmp_path / "all") != pytest.approx(one, rel=1e-4)


def test_shards_begin_with_the_same_weights(run, two, tmp_path):
    options = [*TINY, *GIVEN, "--max_steps=8", "--candidates=3", "--shard"]
    well(two(*options, f"--out_dir={tmp_path}/two"))
    well(run("one", "--max_steps=8", "--candidates=3"))
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-4)


def test_the_first_loss_is_that_of_a_table(run, tmp_path):
    well(run("counted", "--max_steps=1", "--candidates=0", "--lr=0", "--muon_lr=0"))
    well(run("random", "--max_steps=1", "--candidates=0", "--first_weights=random"))
    (counted,), (random,) = losses(tmp_path / "counted"), losses(tmp_path / "random")
    assert counted < random - 0.5 and not math.isnan(counted)


def test_tokens_that_never_occur_do_no_harm():
    "A large vocabulary of which the documents use a little."
    documents = some(20, 30)
    tables = first_tables(count_pairs(documents, 800), 8)
    assert all(table.isfinite().all() for table in tables.values())
    config = MiniKLConfig(
        d_model=8, num_heads=2, num_kv_heads=1, num_layers=1, vocab_size=800
    )
    model = MiniKL(config)
    ranks = Ranks(threads=1)
    model.load_state_dict(dict(counted_weights(config, documents, 0, ranks)))
    with torch.no_grad():
        loss, n_targets = model.loss(Nested(list(documents)))
    assert loss / n_targets < math.log(100)   # knows which ones occur


def test_a_large_corpus_is_sampled(monkeypatch):
    documents = some(40, 6)
    monkeypatch.setattr(shortcuts, "MOST_TOKENS", 200)   # of 800
    assert count_pairs(documents, 6).values().sum() == 10 * 19


def test_no_documents_no_pairs():
    assert count_pairs(Lists(), 6).values().sum() == 0
    assert first_tables(count_pairs(Lists(), 6), 8)["head.weight"].isfinite().all()


def test_the_draws_of_others_stay_as_they_are():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    factors(count_pairs(some(9, 12), 12), 4)
    assert torch.rand(1) == expected


def test_a_single_table_begins_at_random(run):
    well(run("tied", "--tie_embeddings", "--max_steps=2"))
