from dataclasses import replace

import pytest
import torch
from dsrl_vla import probe
from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, FlowMLPModel
from dsrl_vla.errors import DsrlError, NotSteerableError
from dsrl_vla.policy import Encoding


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


class Mixed(FlowMLP):
    """Its rows are in another order than its noises': the first's, the second's, the first's …"""

    def _denoise(self, encoding, noise):
        if encoding.batch == 1:
            return super()._denoise(encoding, noise)
        mixed = torch.cat([super(Mixed, self)._denoise(Encoding(1, encoding.feature[[i % encoding.batch]], None),
                                                       noise.flatten(0, 1)[None, i : i + 1])
                           for i in range(noise.shape[0] * noise.shape[1])])  # fmt: skip
        return mixed.view(*noise.shape[:3], -1)


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
        (Mixed, DsrlError, "actions of a batch: expected those of each observation and noise alone, got others"),
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


@pytest.mark.parametrize(
    ("part", "given", "words"),
    [
        ("_encode", None, "_encode: expected an Encoding of 1 rows, got NoneType"),
        ("_encode", Encoding(1, torch.zeros(1, 3), None), r"_encode: expected a feature, a tensor of shape \(1, 64\)"),
        ("_encode", Encoding(2, torch.zeros(2, 64), None), "_encode: expected an Encoding of 1 rows, got one of 2"),
        ("_denoise", [[0.0]], r"_denoise: expected a tensor of actions \(B, K, H, A\), got list"),
    ],
)
def test_what_an_adapter_gives_back_is_checked(part, given, words, model, observation, monkeypatch):
    monkeypatch.setattr(FlowMLP, part, lambda *_: given)
    base = FlowMLP(model)
    with pytest.raises(DsrlError, match=words):
        base.act(observation(base), seed=0)
