import math

import torch

from titan_models.rope import apply_rope, rope_frequencies, rope_table
from titan_models.shape import RopeScaling


def test_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    scaling = RopeScaling(factor=8.0, original_context=8192)
    plain = rope_frequencies(128, 500_000.0)
    scaled = rope_frequencies(128, 500_000.0, scaling)
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            assert after == before
        elif wavelength > 8192:
            assert math.isclose(after, before / 8)
        else:
            assert before / 8 <= after <= before


def test_scores_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    frequencies = rope_frequencies(16, 100.0)

    def score(at_q, at_k):
        turned = (
            apply_rope(x, rope_table(torch.tensor([[at]]), frequencies, torch.float64))
            for x, at in ((q, at_q), (k, at_k))
        )
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score(9, 2), score(107, 100), rtol=1e-12, atol=0)
    assert abs(score(9, 2) - score(9, 3)) > 1e-3


def test_tables_are_at_least_float32():
    positions = torch.arange(4)[None]
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        cos, _ = rope_table(positions, [1.0], dtype)
        assert cos.dtype == wide
        x = torch.randn(1, 4, 1, 2).to(dtype)
        assert apply_rope(x, (cos, cos)).dtype == dtype
