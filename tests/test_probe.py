from dataclasses import replace

import pytest
import torch
from dsrl_vla import probe
from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, FlowMLPModel
from dsrl_vla.errors import DsrlError, NotSteerableError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FlowMLPModel(FlowMLPConfig(4, 2))


class Ancestral(FlowMLP):
    """Draws fresh noise on the way, as a DDPM sampler does."""

    def _denoise(self, encoding, noise):
        return super()._denoise(encoding, noise + 0.1 * torch.randn_like(noise))


class Deaf(FlowMLP):
    """Accepts noise and ignores it, as many policies do."""

    def _denoise(self, encoding, noise):
        return super()._denoise(encoding, torch.zeros_like(noise))


class Short(FlowMLP):
    def _denoise(self, encoding, noise):
        return super()._denoise(encoding, noise)[:, :, 1:]


class Broken(FlowMLP):
    def _denoise(self, encoding, noise):
        return super()._denoise(encoding, noise) * float("nan")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Ancestral, NotSteerableError, "draws more noise on the way .* DDIM"),
        (Deaf, NotSteerableError, "ignores its noise argument"),
        (Short, DsrlError, r"actions: expected shape \(B, K, H, A\) = \(1, 4, 4, 2\), got \(1, 4, 3, 2\)"),
        (Broken, DsrlError, "actions: expected finite values"),
    ],
)
def test_what_cannot_be_steered_is_refused(kind, error, message, model, observation):
    base = kind(model)
    with pytest.raises(error, match=message) as caught:
        probe(base, observation(base))
    assert "\n" not in str(caught.value)


def test_a_declared_prompt_without_effect_is_reported(model, observation, caplog):
    base = FlowMLP(model)
    base.spec = replace(base.spec, observation=replace(base.spec.observation, prompt=True))
    assert probe(base, observation(base)).prompt_effect == 0
    assert "its prompt does not change its actions" in caplog.text
