"""The Llama format, both ways: what fits is equal, what does not fit is refused.

The script is tested in test_generate.py.
"""
import json
import math
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from minikl.corpora import toy_corpus
from minikl.files import UserError
from minikl.layouts import Nested
from minikl.llama import (
    SCALING,
    Llama3Config,
    export_llama,
    import_llama,
    llama_config,
    llama_weights,
    minikl_config,
)
from minikl.model import MiniKL, MiniKLConfig, count_by_formula
from minikl.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "num_layers": 3, "vocab_size": 50,
    "max_seq_len": 512, "theta": 1e4,
}
NUMBERS = dict(zip(SCALING, (8.0, 1.0, 4.0, 64), strict=True))
VARIANTS = [
    *({"num_kv_heads": n, "tie_embeddings": tied} for n in (4, 2, 1)
      for tied in (False, True)),
    {"activation": "gelu"}, {"activation": "relu"}, {"norm_eps": 0.1},
    {"theta": 1e6, "d_ff": 40}, {"d_model": 24, "num_heads": 2},
    {"rope_scaling": NUMBERS}, {"rope_scaling": {**NUMBERS, "factor": 32}},
]


@torch.no_grad()
def with_large_weights(model):
    "A model in which mistakes show: weights are large, and gains are not ones."
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    return model.eval()


def toy(**options):
    kind = Llama3Config if "rope_scaling" in options else MiniKLConfig
    return with_large_weights(MiniKL(kind(**{**SIZES, **options})))


def letters():
    return Tokenizer({chr(0x4E00 + i): i for i in range(50)})


@torch.no_grad()
def logits(model, ids):  # (batch, seq) → (batch, seq, vocab), from either of the two
    if not isinstance(model, MiniKL):
        return model(input_ids=ids).logits
    batch = Nested(list(ids))
    return model(batch.ids, batch.positions, batch.attend).unflatten(0, ids.shape)


def difference(one, other, ids):
    return (logits(one, ids) - logits(other, ids)).abs().max().item()


def as_llama(model):
    config = transformers.LlamaConfig(**llama_config(model.config))
    llama = transformers.LlamaForCausalLM(config)
    llama.load_state_dict(llama_weights(model), strict=not model.config.tie_embeddings)
    return llama.eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_same_weights_give_the_same_logits(variant):
    "At the last of 400 positions too, where a wrong rotation shows."
    model = toy(**variant)
    assert difference(model, as_llama(model), torch.randint(50, (2, 400))) < 1e-4


@pytest.mark.parametrize("first, second", [
    ("self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"),
    ("input_layernorm", "post_attention_layernorm"),
])
def test_swapped_weights_are_noticed(first, second):
    model = toy()
    llama = as_llama(model)
    state = llama.state_dict()
    one = f"model.layers.1.{first}.weight"
    two = f"model.layers.1.{second}.weight"
    changed = as_llama(model)
    changed.load_state_dict({**state, one: state[two], two: state[one]})
    assert difference(model, changed, torch.randint(50, (3, 20))) > 0.1


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_weight_comes_home_bit_for_bit(variant, tmp_path):
    model = toy(**variant)
    export_llama(model, letters(), tmp_path / "llama")
    back = import_llama(tmp_path / "llama")
    assert back.config == model.config
    for name, weight in model.state_dict().items():
        assert weight.equal(back.state_dict()[name]), name


@dataclass
class Tomorrow(MiniKLConfig):
    "A configuration with a field that nobody has told the export about."
    new_feature: bool = False


def unknown_weight():
    model = toy()
    model.blocks[0].attention.q_norm = torch.nn.RMSNorm(16)
    return model


@pytest.mark.parametrize("make, message", [
    (lambda: toy(ffn="FFN"), "ffn='FFN'"),
    (lambda: MiniKL(Tomorrow(vocab_size=50, new_feature=True)), "new_feature=True"),
    (unknown_weight, "q_norm"), (lambda: toy(qk_norm=True), "k_norm|qk_norm"),
    (lambda: toy(vocab_size=40), "50 tokens, the model 40"),
], ids=["ffn", "field", "weight", "qk_norm", "vocabulary"])
def test_what_llama_lacks_is_not_exported(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_llama(make(), letters(), tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def test_a_new_field_that_is_off_is_no_obstacle():
    assert llama_config(Tomorrow(new_feature=False))["hidden_size"] == 512


def test_their_tokenizer_agrees(tmp_path):
    texts = [text for text, _ in toy_corpus()]
    tokenizer = Tokenizer.train(texts, 448, character_coverage=1.0)
    export_llama(toy(vocab_size=448), tokenizer, tmp_path / "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "llama", split_special_tokens=True
    )
    for text in [*texts[:50], "hello 世界 🌙", "<s> is text here"]:
        encoded = theirs(text, add_special_tokens=False)["input_ids"]
        assert encoded == tokenizer.encode(text)
        assert theirs.decode(encoded) == text


# folders that transformers wrote

def made_by_transformers(folder, dtype=torch.float32, shard="1GB", **options):
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(**{**sizes, **options})
    llama = with_large_weights(transformers.LlamaForCausalLM(config)).to(dtype)
    llama.save_pretrained(folder, max_shard_size=shard)
    # not `llama.float()`: its table of frequencies has been rounded to `dtype`
    kind = transformers.LlamaForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, **NUMBERS}


@pytest.mark.parametrize("options", [
    {"shard": "10KB"}, {"dtype": torch.bfloat16},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"rope_parameters": LLAMA3},
], ids=["small files", "bfloat16", "tied", "llama3"])
def test_a_llama_of_others_is_read(options, tmp_path):
    llama = made_by_transformers(tmp_path, **options)
    ours = import_llama(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shard" in options)
    assert ours.config.norm_eps == 1e-6  # theirs, not our default
    assert all(weight.dtype == torch.float32 for weight in ours.parameters())
    assert difference(ours, llama, torch.randint(50, (2, 400))) < 1e-4


# Llama 3.1 and later


def test_slowed_rotations_are_noticed():
    "The same weights without them give other logits, and not only at the end."
    ids = torch.randint(50, (2, 512))
    right = logits(toy(rope_scaling=NUMBERS), ids)
    for other in (toy(), toy(rope_scaling={**NUMBERS, "factor": 32})):
        gaps = (logits(other, ids) - right).abs().amax(dim=(0, 2))
        assert gaps[0] < 1e-4 and gaps[256:].min() > 0.1


@pytest.mark.parametrize("numbers", [
    (8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (2, 0.5, 8, 100), (1, 1, 4, 64),
], ids=str)
def test_frequencies_are_those_of_transformers(numbers):
    "Angles of 16,384 positions, twice the original length."
    scaling = dict(zip(SCALING, numbers, strict=True))
    ours = Llama3Config(theta=5e5, rope_scaling=scaling)
    theirs = transformers.LlamaConfig(**llama_config(ours))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    positions = torch.arange(16384)
    for found, right in zip(
        ours.rotation(positions), rotary(torch.zeros(1), positions[None]), strict=True
    ):
        gap = (found[:, 0] - right[0, :, : ours.d_head // 2]).abs().max()
        assert gap < 2e-3   # the last bit of a float32, times 16,384 radians


def test_a_factor_of_one_changes_no_bit():
    same = Llama3Config(rope_scaling={**NUMBERS, "factor": 1})
    plain = MiniKLConfig()
    positions = torch.arange(100)
    for found, right in zip(
        same.rotation(positions), plain.rotation(positions), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [
    {"factor": 0.5}, {"factor": math.nan}, {"factor": "8"}, {"factor": True},
    {"low_freq_factor": 4.0}, {"low_freq_factor": 0}, {"high_freq_factor": math.inf},
    {"original_max_position_embeddings": 0}, {"beta_fast": 32},
    {"original_max_position_embeddings": math.nan},
], ids=str)
def test_scaling_that_makes_no_sense_is_refused(change):
    with pytest.raises(UserError, match="rope_scaling=.*expected four numbers"):
        Llama3Config(rope_scaling={**NUMBERS, **change})


@pytest.mark.parametrize("scaling", [None, {}, [8, 1, 4, 64], {"factor": 8.0}], ids=str)
def test_scaling_of_another_form_is_refused(scaling):
    with pytest.raises(UserError, match="expected four numbers"):
        Llama3Config(rope_scaling=scaling)


# as published, but for the ids of special tokens
LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
}
LLAMA32_1B = {
    **LLAMA31_8B, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "tie_word_embeddings": True,
    "rope_scaling": {**LLAMA31_8B["rope_scaling"], "factor": 32.0},
}


@pytest.mark.parametrize("raw, n_weights", [
    (LLAMA31_8B, 8_030_261_248), (LLAMA32_1B, 1_235_814_400),
], ids=["3.1 8B", "3.2 1B"])
def test_published_configurations_are_understood(raw, n_weights):
    config = minikl_config(raw)
    assert count_by_formula(config) == n_weights
    assert config.theta == 500_000
    assert config.rope_scaling["factor"] == raw["rope_scaling"]["factor"]
    again = minikl_config(llama_config(config))
    assert again == config and asdict(again) == asdict(config)


def test_a_small_llama_with_the_published_rotations(tmp_path):
    "9,000 tokens, beyond the 8,192 of the original; the file says rope_scaling."
    llama = made_by_transformers(tmp_path, rope_parameters={
        "rope_theta": 5e5, **LLAMA31_8B["rope_scaling"]
    })
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    older = {name: LLAMA31_8B[name] for name in ("rope_scaling", "rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **older}))
    ours = import_llama(tmp_path)
    assert difference(ours, llama, torch.randint(50, (1, 9000))) < 1e-4


def test_a_llama3_is_not_loaded_as_something_else(tmp_path):
    "The format of our own models has no place for it; nothing is lost in silence."
    model = toy(rope_scaling=NUMBERS)
    model.save(tmp_path)
    with pytest.raises(UserError, match="config.json: a Llama 3; .* import_llama"):
        MiniKL.load(tmp_path)
    assert isinstance(replace(model.config, num_layers=1), Llama3Config)


def test_an_older_file_leaves_things_unsaid(tmp_path):
    "No key heads: multi-head attention; rope_theta outside of rope_parameters."
    llama = made_by_transformers(tmp_path, num_key_value_heads=4)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["num_key_value_heads"], raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_theta": 1e4}))
    ids = torch.randint(50, (2, 100))
    assert difference(import_llama(tmp_path), llama, ids) < 1e-4


@pytest.mark.parametrize("message, changes", [
    ("MiniKL lacks attention_bias=True", {"attention_bias": True}),
    ("MiniKL lacks sliding_window=1024", {"sliding_window": 1024}),
    ("MiniKL lacks mlp_bias=True", {"mlp_bias": True}),
    ("MiniKL lacks head_dim=16, other than .* = 8", {"head_dim": 16}),
    ("MiniKL lacks quantization_config=", {"quantization_config": {"bits": 4}}),
    ("MiniKL lacks factor=2.0, rope_type='linear'",
     {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("MiniKL lacks .*rope_type='yarn'",
     {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    ("MiniKL lacks factor=4.0, rope_type='dynamic'",
     {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    ("MiniKL lacks .*rope_type='longrope'",
     {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 4}}),
    ("MiniKL lacks factor=2.0",
     {"rope_parameters": {"rope_type": "default", "factor": 2.0}}),
    ("MiniKL lacks attention_factor=1.1",
     {"rope_parameters": {**LLAMA3, "attention_factor": 1.1}}),
    ("config.json: lacks 'low_freq_factor'",
     {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}),
    ("config.json: rope_scaling=.*expected four numbers",
     {"rope_parameters": {**LLAMA3, "factor": 0.1}}),
    ("activation='gelu_new'", {"hidden_act": "gelu_new"}),
    ("expected 'llama'", {"model_type": "qwen2"}),
    (r"lm_head.weight is \(50, 32\), but .* expects \(64, 32\)", {"vocab_size": 64}),
    ("k_proj.weight is", {"num_key_value_heads": 4}),
], ids=str)
def test_a_relative_of_llama_is_refused(message, changes, tmp_path):
    "Each of these loads where only the shapes, or only known words, are looked at."
    made_by_transformers(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        import_llama(tmp_path)


def test_a_missing_output_layer_is_named(tmp_path):
    made_by_transformers(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lm_head.weight is nothing"):
        import_llama(tmp_path)


def test_heads_wider_than_their_share_are_refused(tmp_path):
    made_by_transformers(tmp_path, head_dim=16)
    with pytest.raises(UserError, match="config.json: MiniKL lacks head_dim=16"):
        import_llama(tmp_path)
    rewrite(tmp_path, head_dim=None)
    message = r"k_proj.weight is \(32, 32\), but MiniKL expects \(16, 32\)"
    with pytest.raises(UserError, match=message):
        import_llama(tmp_path)


def test_a_bias_is_found_where_the_configuration_is_silent(tmp_path):
    made_by_transformers(tmp_path, attention_bias=True)
    with pytest.raises(UserError, match="attention_bias"):
        import_llama(tmp_path)
    rewrite(tmp_path, attention_bias=False)
    message = r"k_proj.bias is \(16,\), but MiniKL expects nothing"
    with pytest.raises(UserError, match=message):
        import_llama(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    made_by_transformers(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="model.safetensors: "):
        import_llama(tmp_path)
    rewrite(tmp_path, hidden_size="wide")
    with pytest.raises(UserError, match="config.json: d_model='wide'"):
        import_llama(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_llama(tmp_path / "nowhere")
