"""What the adapter `openpi:` says and does where openpi itself is not needed."""

import sys

import numpy as np
import pytest
from dsrl_vla import load_base, load_recipe
from dsrl_vla.adapters.openpi import ALOHA, ALOHA_SIM, DROID, LIBERO
from dsrl_vla.adapters.openpi.loading import parse
from dsrl_vla.errors import DsrlError, MissingExtraError, UnknownNameError
from dsrl_vla.noise import NoiseSpace
from dsrl_vla.observation import batch
from dsrl_vla.recipes import shipped


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("pi05_libero", ("pi05_libero", "gs://openpi-assets/checkpoints/pi05_libero", {})),
        ("pi0_libero@runs/mine/29999", ("pi0_libero", "runs/mine/29999", {})),
        ("pi0_droid@gs://a/b@c?pool=last_pad", ("pi0_droid", "gs://a/b@c", {"pool": "last_pad"})),
        ("x@y?executed_steps=20&num_steps=5", ("x", "y", {"executed_steps": 20, "num_steps": 5})),
    ],
)
def test_an_address_holds_config_checkpoint_and_options(source, expected):
    assert parse(source) == expected


def test_addresses_that_are_none_are_refused():
    with pytest.raises(DsrlError, match=r"base: expected 'openpi:<config>\[@<checkpoint>\]'"):
        parse("@somewhere")
    with pytest.raises(UnknownNameError, match="unknown openpi option 'executed_step'. Did you mean 'executed_steps'"):
        parse("pi0_libero?executed_step=3")
    with pytest.raises(DsrlError, match="openpi option executed_steps: expected a whole number, got 'five'"):
        parse("pi0_libero?executed_steps=five")


def test_where_openpi_is_missing_the_message_says_what_to_do_and_what_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpi.models.model", None)
    with pytest.raises(
        MissingExtraError, match=r"on PyPI is an empty placeholder.*make openpi-env.*remote:ws://"
    ) as caught:
        load_base("openpi:pi0_libero")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [LIBERO, DROID, ALOHA, ALOHA_SIM])
def test_a_batch_becomes_rows_with_openpis_keys(keys, observation):
    class Base:
        class spec:
            observation = keys.spec

    seen = [observation(Base, i, size=(5, 7)) for i in range(2)]
    rows = keys.translate(batch(seen), 2)
    for one, row in zip(seen, rows, strict=True):
        assert row["prompt"] == "open the drawer"
        parts = [at(row, path) for path in keys.state]
        assert [len(part) for part in parts] == list(keys.state.values())
        assert np.array_equal(np.concatenate(parts), one["observation.state"])
        for camera, path in keys.cameras.items():
            image = at(row, path)
            image = image.transpose(1, 2, 0) if keys.channels_first else image
            assert np.array_equal(image, one[f"observation.images.{camera}"])


def at(row, path):
    for key in path:
        row = row[key]
    return row


GENERALISTS = {  # the reference's noise bound, discount per step, and entropy over its own box
    "pi0-libero-reference": (1.0, 0.999, -16.0),
    "pi0-aloha-cube-reference": (2.0, 0.999, 0.0),
    "pi0-droid-reference": (2.5, 0.99, 0.0),
}


@pytest.mark.parametrize("name", sorted(name for name in shipped() if name.startswith("pi0")))
def test_recipes_for_generalists_are_served_from_elsewhere_and_say_that_nobody_ran_them(name):
    recipe = load_recipe(name)
    assert "Unverified" in recipe.description
    assert recipe.base.uri.startswith("remote:ws://") and recipe.base.dtype == "bfloat16"
    if recipe.noise.layout != "auto":
        assert recipe.noise.over(NoiseSpace(50, 32)).latent_shape == (1, 32)
    if name in GENERALISTS:
        bound, gamma, entropy = GENERALISTS[name]
        assert (recipe.noise.bound, recipe.sac.gamma) == (bound, gamma)
        # Its entropy is over [-bound, bound] in 32 dimensions, ours per dimension of [-1, 1].
        assert recipe.sac.target_entropy == pytest.approx(entropy / 32 - np.log(bound), abs=1e-3)
