"Who gets which documents, with which weights a sharded model begins, and evaluation."
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from minikl.data import Documents, TokenFile, build_tokens
from minikl.layouts import Nested
from minikl.model import MiniKL, MiniKLConfig
from minikl.parallel import Ranks, can_travel, evaluate, first_weights, micro_batches
from minikl.step import Precision
from minikl.tokenizer import Tokenizer

TEXTS = ["一生一代一双人", "争教两处销魂", "相思相望不相亲", "天为谁春"]
SMALL = {"d_model": 16, "num_heads": 2, "num_kv_heads": 2, "num_layers": 1}


def test_micro_batches_are_a_partition_and_balanced():
    "On random batches: every document once, no part empty, none too large."
    chance = random.Random(0)
    for _ in range(300):
        n_ranks, n_parts = chance.randint(1, 5), chance.randint(1, 3)
        n_docs = chance.randint(n_ranks * n_parts, 40)
        docs = [torch.full((chance.randint(1, 80),), i) for i in range(n_docs)]
        dealt = []
        for rank in range(n_ranks):
            dealt += micro_batches(docs, rank, n_ranks, n_parts)
        assert len(dealt) == n_ranks * n_parts
        assert sorted(int(doc[0]) for part in dealt for doc in part) == [*range(n_docs)]
        sizes = [sum(map(len, part)) for part in dealt]
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) <= max(map(len, docs))


@pytest.mark.parametrize(
    "more", [{}, {"tie_embeddings": True, "qk_norm": True, "ffn": "FFN"}]
)
def test_first_weights_are_those_of_a_whole_model(more):
    config = MiniKLConfig(
        **(SMALL | {"num_heads": 4, "num_layers": 3}),
        vocab_size=50,
        max_seq_len=16,
        **more,
    )
    torch.manual_seed(1)
    whole = dict(MiniKL(config).named_parameters())
    torch.manual_seed(1)
    one_by_one = dict(first_weights(config))
    assert list(one_by_one) == list(whole)
    for name, weight in whole.items():
        assert torch.equal(weight, one_by_one[name])


class Odd(Exception):
    "Does not come out of a pickle as it went in."

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_can_travel():
    assert can_travel(ValueError("one"))
    assert not can_travel(Odd(1, 2))


def test_an_error_of_once_per_host_keeps_its_type():
    ranks = Ranks(threads=1)
    with pytest.raises(ZeroDivisionError):
        ranks.once_per_host(lambda: 1 / 0)
    with pytest.raises(Odd):
        ranks.once_per_host(raise_odd)


def raise_odd():
    raise Odd(1, 2)


@pytest.fixture
def held_out(tmp_path):
    "Four lines of a poem as Documents, and a model of their vocabulary."
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    tokenizer = Tokenizer.train(TEXTS, 300)
    token_file = TokenFile(build_tokens([path], tokenizer, tmp_path))
    torch.manual_seed(0)
    model = MiniKL(MiniKLConfig(**SMALL, vocab_size=len(tokenizer), max_seq_len=64))
    return model, Documents(token_file, torch.arange(4), 64)


def measure(model, documents, ranks, size=64):
    return evaluate(model, documents, Nested, Precision("fp32"), ranks, size)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_evaluate_is_the_loss_of_each_document(held_out, size):
    model, documents = held_out
    bits = 0.0
    for document in documents:
        one = Nested([document])
        with torch.no_grad():
            logits = model(one.ids, one.positions, one.attend)[:-1].log_softmax(-1)
        nats = -logits[torch.arange(len(document) - 1), document[1:]].sum()
        bits += float(nats) / math.log(2)
    expected = bits / len("".join(TEXTS))
    found = measure(model, documents, Ranks(threads=1), size)
    assert found == pytest.approx(expected, rel=1e-5)


def test_evaluate_adds_up_over_ranks(held_out):
    "Three ranks for four documents; what each adds is what one rank finds alone."
    model, documents = held_out
    total = 0.0
    for rank in range(3):
        total += measure(
            model,
            documents,
            SimpleNamespace(
                rank=rank,
                world=3,
                device=torch.device("cpu"),
                sum=lambda nats: [nats],
                all=lambda n: [n],
                data_peers=range(3),
            ),
        )
    alone = measure(model, documents, Ranks(threads=1))
    assert total == pytest.approx(alone, rel=1e-5)


def test_a_model_of_zeros_finds_every_token_equally_likely(held_out):
    model, documents = held_out
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    n_targets = sum(len(document) - 1 for document in documents)
    expected = n_targets * math.log2(model.config.vocab_size) / len("".join(TEXTS))
    found = measure(model, documents, Ranks(threads=1))
    assert found == pytest.approx(expected, rel=1e-5)
