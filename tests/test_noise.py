import pytest
import torch
from dsrl_vla.errors import DsrlError, UnknownNameError
from dsrl_vla.noise import NoiseLayout, NoiseSpace, generators

SPACE = NoiseSpace(8, 6, live=(True,) * 4 + (False,) * 2)


@pytest.mark.parametrize(("name", "vectors"), [("repeat", 1), ("chunk", 8), ("knots:2", 2), ("knots:5", 5)])
@pytest.mark.parametrize(("columns", "width"), [("live", 4), ("all", 6)])
def test_layout_shapes(name, vectors, columns, width):
    layout = NoiseLayout(SPACE, name, 1.5, columns)
    assert layout.latent_shape == (vectors, width)
    assert layout.expand(torch.rand(3, 2, vectors, width)).shape == (3, 2, 8, 6)


@pytest.mark.parametrize("name", ["repeat", "chunk", "knots:2", "knots:3"])
def test_noise_never_exceeds_the_bound_whatever_the_latent(name):
    layout = NoiseLayout(SPACE, name, 1.3)
    latent = torch.randn(1000, *layout.latent_shape, generator=torch.Generator().manual_seed(0)) * 1e3
    latent[0], latent[1], latent[2] = float("nan"), float("inf"), -float("inf")
    noise = layout.expand(latent)
    assert torch.isfinite(noise).all()
    assert noise.abs().max() <= 1.3


def test_columns_that_are_not_steered_are_exactly_zero():
    noise = NoiseLayout(SPACE, "chunk").expand(torch.ones(8, 4))
    assert (noise[:, 4:] == 0).all() and (noise[:, :4] == 1.5).all()


def test_repeat_repeats_chunk_copies_and_knots_interpolate():
    latent = torch.tensor([[-1.0] * 4, [1.0] * 4])
    column = NoiseLayout(SPACE, "knots:2", 2.0).expand(latent)[:, 0]
    assert torch.allclose(column, torch.linspace(-2, 2, 8))
    full = torch.rand(8, 4) * 2 - 1
    assert torch.allclose(NoiseLayout(SPACE, "chunk", 1.0).expand(full)[:, :4], full)
    assert NoiseLayout(SPACE, "repeat", 1.0).expand(full[:1])[:, :4].unique(dim=0).shape[0] == 1


def test_layout_samples_are_a_truncated_prior():
    layout = NoiseLayout(SPACE, "repeat", 1.5)
    draws = layout.sample(generators(list(range(500))), 4) * 1.5
    assert draws.abs().max() <= 1.5
    assert abs(draws.mean()) < 0.05
    assert abs(draws.std() - 0.7426) < 0.03  # a standard normal truncated at 1.5


def test_a_row_of_noise_depends_on_its_own_generator_only():
    together = SPACE.sample(generators([1, 2, 3]))
    assert torch.equal(together[1:2], SPACE.sample(generators([2])))


def test_uniform_prior_stays_in_its_box():
    space = NoiseSpace(4, 3, prior="uniform")
    assert space.sample(generators([0]), 100).abs().max() <= 1
    assert NoiseLayout(space, "repeat", 1.0).sample(generators([0]), 100).abs().max() <= 1
    with pytest.raises(DsrlError, match=r"noise.bound: expected .* at most 1"):
        NoiseLayout(space, "repeat", 1.5)


def test_unknown_layout_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'repeat'"):
        NoiseLayout(SPACE, "repeatt")


@pytest.mark.parametrize("name", ["knots:1", "knots:9", "knots:", "knots:x"])
def test_knots_out_of_range(name):
    with pytest.raises(DsrlError, match="knots:<n> with n from 2 to the horizon 8"):
        NoiseLayout(SPACE, name)


@pytest.mark.parametrize("bound", [0.0, -1.0, 11.0, float("nan"), float("inf")])
def test_bound_out_of_range(bound):
    with pytest.raises(DsrlError, match="noise.bound"):
        NoiseLayout(SPACE, "repeat", bound)


def test_live_mask_has_to_fit():
    with pytest.raises(DsrlError, match="live mask: expected 6 flags"):
        NoiseSpace(8, 6, live=(True,))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.zeros(2, 1, 8, 5), r"noise: expected shape \(2, K, 8, 6\), got \(2, 1, 8, 5\)"),
        (torch.zeros(2, 8, 6), "noise: expected shape"),
        (torch.zeros(3, 1, 8, 6), "noise: expected shape"),
        (torch.zeros(2, 1, 8, 6, dtype=torch.bfloat16), "noise: expected float32"),
        (torch.full((2, 1, 8, 6), float("nan")), "noise: expected finite"),
    ],
)
def test_bad_noise_is_refused(noise, message):
    with pytest.raises(DsrlError, match=message):
        SPACE.check(noise, 2)
