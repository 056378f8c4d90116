import torch

from titan_ckpt.formats.lazy import LazyTensor
from titan_convert.slices import Cut
from titan_models.families.qwen3 import PRESETS, Qwen3Config
from titan_models.shape import MoEConfig


def test_a_slice_of_a_large_model_is_small() -> None:
    cut = Cut(PRESETS["235b-a22b"])
    assert cut.layers == (0, 93)
    assert cut.small.vocab_size == 512
    assert cut.runs[0] == (0, 64)
    assert cut.runs[-1][1] == PRESETS["235b-a22b"].vocab_size
    assert cut.small.moe is not None
    assert 8 <= cut.small.moe.experts < 128
    tiny = Cut(Qwen3Config(layers=1, vocab_size=100, moe=MoEConfig(experts=4)))
    assert (tiny.layers, tiny.runs, tiny.experts) == ((0,), [(0, 100)], 4)
    mixed = Cut(Qwen3Config(layers=5, moe=MoEConfig(first_dense_layers=2)))
    assert mixed.small.moe is not None
    assert mixed.small.moe.first_dense_layers == 1


def test_only_what_is_kept_is_read() -> None:
    config = Qwen3Config(vocab_size=10_000, layers=3)
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.zeros(stop - start, config.dim)

    whole = {
        name: LazyTensor(torch.float32, shape, ("x",), read)
        for name, shape in {
            "tok_embeddings.weight": (10_000, 256),
            "layers.1.a": (7, 256),
            "layers.2.a": (7, 256),
        }.items()
    }
    kept = Cut(config).tensors(whole, {"tok_embeddings.weight": 0}, r"^$", r"^$")
    assert kept.keys() == {"tok_embeddings.weight", "layers.1.a"}
    assert kept["layers.1.a"].shape == (7, 256)
    assert kept["tok_embeddings.weight"].all().shape == (512, 256)
    assert sum(stop - start for start, stop in asked) == 512
