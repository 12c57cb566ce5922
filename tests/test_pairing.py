"""A head on a base it was not trained on is refused, and told why."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from dsrl_vla import SteeredPolicy, SteeringHead
from dsrl_vla.errors import DsrlError, MismatchError, UnknownNameError
from dsrl_vla.evaluation import evaluate
from dsrl_vla.head import HeadConfig
from dsrl_vla.networks import NetworkConfig
from dsrl_vla.noise import NoiseLayout, NoiseSpace
from dsrl_vla.pairing import STRUCTURE, TOLERANCE, check_pair, differences, distance, probe_actions


def make_head(base, **more):
    torch.manual_seed(0)
    network = NetworkConfig(width=16, layers=1)
    more.setdefault("fingerprint", base.fingerprint())
    return SteeringHead(HeadConfig.for_base(base.spec, NoiseLayout(base.spec.noise), network, **more))


def other(base, *, model=None, processing=None, **spec):
    """The same base, with something about it changed."""
    made = copy.copy(base)
    made._fingerprint = None
    made.spec = replace(base.spec, **spec)
    made.model, made.processing = model or base.model, processing or base.processing
    return made


def retrained(base, scale):
    """The base after a little more training: every weight moved by a share of itself."""
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + scale * torch.randn(parameter.shape, generator=generator))
    return other(base, model=model)


def reprocessed(base, **changed):
    """The base with other normalisation statistics."""
    processing = copy.copy(base.processing)
    processing.statistics = replace(base.processing.statistics, **changed)
    return other(base, processing=processing)


def spec_of(base):
    spec, noise = base.spec, base.spec.noise
    return {
        "noise shape": {"noise": NoiseSpace(noise.horizon + 1, noise.dim, live=noise.live)},
        "noise prior": {"noise": NoiseSpace(*noise.shape, prior="uniform", live=noise.live)},
        "live noise columns": {"noise": NoiseSpace(*noise.shape)},
        "executed steps": {"executed_steps": spec.executed_steps + 1},
        "action width": {"action_dim": spec.action_dim + 1},
        "sampler steps": {"sampler_steps": spec.sampler_steps + 5},
        "state width": {"observation": replace(spec.observation, state_dim=9)},
        "feature width": {"feature_dim": 7},
        "cameras": {"observation": replace(spec.observation, cameras={"front": None, "top": None})},
    }


@pytest.mark.parametrize("name", ["noise shape", "noise prior", "live noise columns", "executed steps", "action width",
                                  "sampler steps", "state width", "feature width", "cameras"])  # fmt: skip
def test_another_shape_is_refused_by_name(tiny_pi0, name):
    head = make_head(tiny_pi0)
    with pytest.raises(MismatchError, match=f"on 'transformers:tiny': .*{name}: expected .*, got "):
        SteeredPolicy(other(tiny_pi0, **spec_of(tiny_pi0)[name]), head)


def test_other_weights_are_refused_even_where_they_behave_alike(tiny_pi0):
    head, base = make_head(tiny_pi0), retrained(tiny_pi0, 0.003)
    assert set(differences(head.config, base)) == {"weights"}
    with pytest.raises(MismatchError, match=r"weights: expected sha256 .*or say allow_mismatch=\['weights'\]"):
        SteeredPolicy(base, head)
    SteeredPolicy(base, head, allow_mismatch=["weights"])


def test_another_base_of_the_same_shape_is_refused_with_all_that_differs(tiny_pi0):
    head, base = make_head(tiny_pi0), retrained(tiny_pi0, 0.3)
    assert set(differences(head.config, base)) == {"weights", "behaviour"}
    with pytest.raises(MismatchError, match="weights: .*; behaviour: expected its actions on the probe, got others"):
        SteeredPolicy(base, head)
    with pytest.raises(MismatchError, match="behaviour"):
        SteeredPolicy(base, head, allow_mismatch=["weights"])


def test_other_normalisation_is_refused_naming_the_statistic(tiny_pi0):
    head = make_head(tiny_pi0)
    base = reprocessed(tiny_pi0, actions_std=(1.0, 0.5, 2.1), state_mean=(0.1,) * 4 + (0.2,))
    with pytest.raises(MismatchError, match="processors: expected its own, got other values of actions_std, state_me"):
        SteeredPolicy(base, head)


def test_cameras_in_another_order_are_refused(tiny_pi0):
    head = make_head(tiny_pi0)
    with pytest.raises(MismatchError, match="processors: .*cameras"):
        SteeredPolicy(reprocessed(tiny_pi0, cameras=("wrist", "front")), head)


def test_the_same_base_in_another_place_or_dtype_is_the_same_base(tiny_pi0, tiny_pi0_bf16):
    head = make_head(tiny_pi0)
    assert tiny_pi0_bf16.spec.uri != tiny_pi0.spec.uri and tiny_pi0_bf16.spec.dtype == "bfloat16"
    apart = distance(tiny_pi0.fingerprint().behaviour, tiny_pi0_bf16.fingerprint().behaviour, 3)
    assert 0 < apart < TOLERANCE
    assert differences(head.config, tiny_pi0_bf16) == {}
    assert differences(make_head(tiny_pi0_bf16).config, tiny_pi0) == {}


def test_more_threads_make_no_other_base(tiny_pi0):
    one = probe_actions(tiny_pi0).flatten()
    torch.set_num_threads(2)
    assert distance(one, probe_actions(tiny_pi0).flatten(), 3) < 1e-3


class BlackBox:
    """A base of which only `infer(observation, noise)` is known: no weights, no processors, no feature."""

    def __new__(cls, base, uri="remote:ws://robot"):
        made = other(base, uri=uri)
        made.state_dict, made.processors = dict, dict
        return made


def test_a_black_box_is_known_by_what_it_does(tiny_pi0):
    head = make_head(BlackBox(tiny_pi0))
    assert head.config.fingerprint.weights == "" and len(head.config.fingerprint.behaviour) == 2 * 4 * 2 * 3
    assert differences(head.config, BlackBox(tiny_pi0, "remote:ws://another-robot")) == {}
    assert differences(head.config, tiny_pi0) == {}
    assert set(differences(head.config, BlackBox(retrained(tiny_pi0, 0.3)))) == {"behaviour"}


def test_where_nothing_can_be_measured_names_decide(tiny_pi0):
    head = make_head(other(tiny_pi0, repo_id="lab/base", revision="abc"), fingerprint=None)
    check_pair(head.config, other(tiny_pi0, repo_id="lab/base", revision="abc"))
    with pytest.raises(MismatchError, match="base: expected lab/base, got lab/other"):
        check_pair(head.config, other(tiny_pi0, repo_id="lab/other", revision="abc"))
    with pytest.raises(MismatchError, match=r"revision: expected abc, got def.*allow_mismatch=\['revision'\]"):
        check_pair(head.config, other(tiny_pi0, repo_id="lab/base", revision="def"))
    assert set(differences(make_head(tiny_pi0, fingerprint=None).config, other(tiny_pi0, uri="x"))) == {"base"}


def test_an_adapter_may_do_without_a_fingerprint(tiny_pi0):
    shy = other(tiny_pi0)
    shy.fingerprint = lambda: None
    assert make_head(shy).config.fingerprint is None
    check_pair(make_head(shy).config, shy)
    check_pair(make_head(tiny_pi0).config, shy)


def test_a_base_that_cannot_be_probed_is_known_by_its_weights(tiny_pi0, monkeypatch, caplog):
    base = other(tiny_pi0)
    monkeypatch.setattr(base, "_encode", lambda *_: 1 / 0, raising=False)
    assert base.fingerprint().weights == tiny_pi0.fingerprint().weights and base.fingerprint().behaviour == ()
    assert "its behaviour is not part of its fingerprint" in caplog.text
    check_pair(make_head(tiny_pi0).config, base)


def test_what_does_not_fit_cannot_be_allowed_and_typos_are_named(tiny_pi0):
    head = make_head(tiny_pi0)
    assert STRUCTURE == ("noise shape", "state width", "feature width")
    for name in STRUCTURE:
        with pytest.raises(MismatchError, match="does not fit this base"):
            check_pair(head.config, other(tiny_pi0, **spec_of(tiny_pi0)[name]), [name])
    with pytest.raises(UnknownNameError, match="unknown mismatch 'wieghts'. Did you mean 'weights'"):
        check_pair(head.config, tiny_pi0, ["wieghts"])


def test_the_fingerprint_is_taken_once_and_tells_nothing_random(tiny_pi0, monkeypatch):
    base = other(tiny_pi0)
    first = base.fingerprint()
    monkeypatch.setattr(base, "state_dict", lambda: 1 / 0, raising=False)
    assert base.fingerprint() is first
    assert other(tiny_pi0).fingerprint() == first


def test_a_config_keeps_its_fingerprint_and_an_old_one_loads(tiny_pi0):
    config = make_head(tiny_pi0).config
    assert HeadConfig.from_json(config.to_json()) == config
    import json

    old = json.loads(config.to_json())
    for key in ("action_dim", "base_cameras", "sampler_steps", "fingerprint", "furthest"):
        del old[key]
    loaded = HeadConfig.from_json(json.dumps(old))
    assert loaded.fingerprint is None and differences(loaded, tiny_pi0) == {}


def test_an_evaluation_refuses_too(fork_base):
    base = copy.copy(fork_base)
    base._fingerprint, base.model = None, copy.deepcopy(fork_base.model)
    with torch.no_grad():
        base.model.leave.bias.add_(1.0)
    with pytest.raises(MismatchError, match="weights"):
        evaluate(base, make_head(fork_base), task=None)


def test_distances():
    mine = np.random.default_rng(0).normal(size=24)
    assert distance(mine, mine, 3) == 0
    assert distance(mine, mine[:12], 3) == float("inf")
    scaled = mine * np.tile([1000.0, 1.0, 1e-3], 8)
    moved = scaled + np.tile([0.0, 0.0, 1e-3], 8)
    assert distance(scaled, moved, 3) > 0.3  # a small column counts as much as a large one


def test_a_mismatch_is_an_error_like_the_others(tiny_pi0):
    assert issubclass(MismatchError, DsrlError)
