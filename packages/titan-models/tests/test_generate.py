import dataclasses
from collections import Counter

import pytest
import torch
import transformers

from titan_models.families.qwen3 import Qwen3Config
from titan_models.generate import Sampling, SamplingError, generate
from titan_models.hugging_face import to_hugging_face
from titan_models.shape import MoEConfig

MIXTURE = Qwen3Config(
    vocab_size=131,
    dim=48,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    hidden_dim=80,
    moe=MoEConfig(experts=4, top_k=2, hidden_dim=16),
)
PROMPTS = [[5, 17, 99], [1], [7, 7, 100, 3, 42, 8, 64]]


def rows(model, prompts, **options):
    """What is generated for each prompt."""
    steps = list(generate(model, prompts, **({"max_new_tokens": 12} | options)))
    return [[step[row] for step in steps] for row in range(len(prompts))]


def without_cache(model, prompt, count):
    """Each token by running the model on the whole text so far."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3 with experts"])
def test_a_cache_and_a_batch_change_nothing(tiny, filled, family):
    config = {
        "llama": tiny,
        "qwen3": dataclasses.replace(MIXTURE, moe=None),
        "qwen3 with experts": MIXTURE,
    }[family]
    model = filled(config)
    assert rows(model, PROMPTS) == [without_cache(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3 with experts"])
def test_the_same_tokens_as_transformers(tiny, filled, family, tmp_path):
    config = {"llama": tiny, "qwen3": dataclasses.replace(MIXTURE, moe=None), "qwen3 with experts": MIXTURE}[family]
    model = filled(config)
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**to_hugging_face(config)), attn_implementation="eager"
    ).eval()
    copy_weights(model, reference)
    found = rows(model, PROMPTS, max_new_tokens=20)
    for prompt, own in zip(PROMPTS, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert own == expected[0, len(prompt) :].tolist()


def copy_weights(model, reference):
    own = dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in reference.state_dict().items():
            parameter.copy_(own[native(name)] if "experts" not in name else experts(own, name))


def native(name):
    """The name in our model of a weight of transformers'."""
    changes = [
        ("model.embed_tokens", "tok_embeddings"),
        ("model.layers", "layers"),
        ("model.norm", "norm"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn", "attention"),
        ("mlp.gate.weight", "moe.router.gate.weight"),
        ("mlp", "feed_forward"),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
        ("q_proj", "wq"),
        ("k_proj", "wk"),
        ("v_proj", "wv"),
        ("o_proj", "wo"),
    ]
    for theirs, ours in changes:
        name = name.replace(theirs, ours)
    return name


def experts(own, name):
    """transformers keeps gate and up projections of all experts as one tensor."""
    layer = native(name).partition(".feed_forward")[0]
    if name.endswith("gate_up_proj"):
        return torch.cat([own[f"{layer}.moe.experts.w1"], own[f"{layer}.moe.experts.w3"]], 1)
    return own[f"{layer}.moe.experts.w2"]


def test_a_row_stops_after_a_stop_token_and_others_go_on(tiny, filled):
    model = filled(tiny)
    whole = rows(model, PROMPTS)
    stop = whole[1][2]
    cut = rows(model, PROMPTS, stop=[stop])
    for own, expected in zip(cut, whole, strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert [token for token in own if token is not None] == expected[:end]
        assert set(own[end:]) <= {None}
    assert len(rows(model, PROMPTS[1:2], stop=[stop])[0]) == whole[1].index(stop) + 1


def test_draws_belong_to_the_seed_and_the_row(tiny, filled):
    model = filled(tiny)
    options = {"sampling": Sampling(temperature=1.0, seed=3)}
    first = rows(model, PROMPTS, **options)
    assert rows(model, PROMPTS, **options) == first
    assert rows(model, [PROMPTS[0], [9, 9], PROMPTS[2]], **options)[2] == first[2]
    assert rows(model, [PROMPTS[0]] * 2, **options)[0] != rows(model, [PROMPTS[0]] * 2, **options)[1]
    assert rows(model, PROMPTS, sampling=Sampling(temperature=1.0, seed=4)) != first


def test_tokens_are_drawn_by_their_shares(tiny, filled):
    """Of 400 rows with one prompt, as many choose each token as its probability says."""
    model = filled(tiny)
    shares = (model(torch.tensor([[5]]), torch.zeros(1, 1, dtype=torch.int64))[0, -1] / 0.7).softmax(0)
    (chosen,) = generate(model, [[5]] * 400, max_new_tokens=1, sampling=Sampling(temperature=0.7))
    counts = Counter(chosen)
    for token in shares.topk(5).indices.tolist():
        share = shares[token].item()
        assert abs(counts[token] / 400 - share) <= 4 * (share * (1 - share) / 400) ** 0.5


def test_top_k_and_top_p_leave_the_most_probable(tiny, filled):
    model = filled(tiny)
    shares = model(torch.tensor([[5]]), torch.zeros(1, 1, dtype=torch.int64))[0, -1].softmax(0)
    ordered = shares.sort(descending=True)
    (chosen,) = generate(model, [[5]] * 300, max_new_tokens=1, sampling=Sampling(temperature=1.0, top_k=3))
    assert set(chosen) == set(ordered.indices[:3].tolist())
    fewest = int((ordered.values.cumsum(0) < 0.3).sum()) + 1
    (chosen,) = generate(model, [[5]] * 300, max_new_tokens=1, sampling=Sampling(temperature=1.0, top_p=0.3))
    assert set(chosen) <= set(ordered.indices[:fewest].tolist())
    assert len(set(chosen)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=-1)}, "temperature is -1"),
        ({"sampling": Sampling(top_k=5)}, "temperature 0 takes the best"),
        ({"sampling": Sampling(temperature=1, top_p=0)}, "top_p is 0"),
        ({"sampling": Sampling(temperature=1, top_k=-1)}, "top_k is -1"),
        ({"prompts": [[1], []]}, "every prompt needs a token"),
        ({"prompts": []}, "every prompt needs a token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_means_nothing_is_refused(tiny, filled, options, message):
    with pytest.raises(SamplingError, match=message):
        generate(filled(tiny), **({"prompts": PROMPTS, "max_new_tokens": 3} | options))
