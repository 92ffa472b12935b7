"""YaRN against published numbers and transformers; the rotation against complex multiplication."""

from __future__ import annotations

import pytest
import torch

from moonbase.model.rope import inverse_frequencies, rotate, rotations, yarn_range
from moonbase.presets import preset_config
from tests.model.tiny import hf_config, tiny_config, yarn

PUBLISHED = ("kimi-k2", "kimi-k2.5", "deepseek-v3")


@pytest.mark.parametrize(
    ("preset", "expected"), [("kimi-k2", (19, 20)), ("kimi-k2.5", (8, 20)), ("deepseek-v3", (10, 23))]
)
def test_yarn_range_golden(preset: str, expected: tuple[int, int]) -> None:
    config = preset_config(preset)
    assert config.rope_scaling is not None
    assert yarn_range(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling) == expected


@pytest.mark.parametrize(
    ("preset", "scale"),
    [("kimi-k2", 0.130861), ("deepseek-v3", 0.135234), ("kimi-k2.5", 0.144680), ("moonlight-16b", 0.072169)],
)
def test_softmax_scale_golden(preset: str, scale: float) -> None:
    assert preset_config(preset).softmax_scale == pytest.approx(scale, abs=6e-7)


@pytest.mark.parametrize(
    "preset", [*PUBLISHED, "deepseek-v3.2", "moonlight-16b", "factor 1", "mscales differ", "one step"]
)
def test_frequencies_and_multiplier_equal_transformers(preset: str) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    special = {
        "factor 1": dict(rope_scaling=yarn(1)),
        "mscales differ": dict(rope_scaling=yarn(8) | dict(mscale=0.7, mscale_all_dim=1.3)),
        # low and high fall together: the ramp becomes a step.
        "one step": dict(rope_scaling=yarn(8, 1.0) | dict(original_max_position_embeddings=7), rope_theta=3.0),
    }
    config = tiny_config(**special[preset]) if preset in special else preset_config(preset)
    theirs = DeepseekV3RotaryEmbedding(hf_config(config))
    torch.testing.assert_close(inverse_frequencies(config), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.arange(0, 3000, 7)
    cos, sin = rotations(config, positions)
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    half = config.qk_rope_head_dim // 2
    # An angle of thousands of radians, rounded to fp32, is right to about 1e-4.
    torch.testing.assert_close(cos, their_cos[0, :, :half], rtol=0, atol=5e-4)
    torch.testing.assert_close(sin, their_sin[0, :, :half], rtol=0, atol=5e-4)


def test_transformers_itself_blends_with_yarn() -> None:
    """The table of transformers' initialisers, asked directly."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for preset in PUBLISHED:
        config = preset_config(preset)
        expected, multiplier = ROPE_INIT_FUNCTIONS["yarn"](hf_config(config), torch.device("cpu"))
        torch.testing.assert_close(inverse_frequencies(config), expected, rtol=1e-6, atol=0)
        assert multiplier == 1.0


@pytest.mark.parametrize("rows", [False, True], ids=["one row of positions", "positions of each row"])
def test_rotation_is_complex_multiplication_up_to_a_permutation(rows: bool) -> None:
    config = tiny_config(rope_scaling=yarn(4))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 11, 3, 8, generator=generator).unbind(0)
    positions = torch.randint(0, 500, (2, 11) if rows else (11,), generator=generator)
    cos, sin = rotations(config, positions)
    turn = torch.polar(torch.ones(()), positions[..., None].float() * inverse_frequencies(config)).unsqueeze(-2)

    def turned(z: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    rotated_x, rotated_y = rotate(x, cos, sin), rotate(y, cos, sin)
    half_split = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    torch.testing.assert_close(rotated_x, turned(x)[..., half_split])
    torch.testing.assert_close((rotated_x * rotated_y).sum(-1), (turned(x) * turned(y)).sum(-1))


def test_only_distances_count() -> None:
    config = tiny_config()
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1)).unbind(0)

    def product(at_query: int, at_key: int) -> torch.Tensor:
        turn = [rotations(config, torch.tensor([position])) for position in (at_query, at_key)]
        return (rotate(query, *turn[0]) * rotate(key, *turn[1])).sum()

    torch.testing.assert_close(product(9, 4), product(109, 104), rtol=0, atol=1e-4)
    assert (product(9, 4) - product(9, 5)).abs() > 1e-2


def test_lower_precision_is_rounded_once_and_the_length_kept() -> None:
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    cos, sin = rotations(tiny_config(), torch.arange(5))
    found = rotate(x, cos, sin)
    assert found.dtype == torch.bfloat16 and cos.dtype == torch.float32
    assert torch.equal(found, rotate(x.float(), cos, sin).bfloat16())
    torch.testing.assert_close(rotate(x.float(), cos, sin).norm(dim=-1), x.float().norm(dim=-1))
