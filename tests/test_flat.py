import copy

import pytest
import torch
from dsrl_vla.flat import Flat
from safetensors.torch import load_file, save_file
from torch import nn


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(module, seed):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    return 30 * module(x).square().sum()


@pytest.mark.parametrize("max_norm", [1e9, 0.5])
def test_a_step_is_adams_on_clipped_gradients(max_norm):
    ours, theirs = network(), network()
    flat = Flat(ours.parameters())
    adam, usual = torch.optim.Adam([flat.vector], 0.01), torch.optim.Adam(theirs.parameters(), 0.01)
    for step in range(5):
        flat.descend(loss_of(ours, step), adam, max_norm)
        usual.zero_grad()
        loss_of(theirs, step).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        usual.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)
        assert a.grad is None


def test_a_follower_moves_part_of_the_way():
    leader, follower = network(0), network(1)
    before = copy.deepcopy(follower)
    Flat(follower.parameters()).follow(Flat(leader.parameters()), 0.25)
    for new, old, aim in zip(*(m.parameters() for m in (follower, before, leader)), strict=True):
        assert torch.allclose(new, old + 0.25 * (aim - old), atol=1e-7)


def test_module_and_vector_see_each_others_changes():
    module = network()
    flat = Flat(module.parameters())
    module.load_state_dict(network(1).state_dict())
    assert torch.equal(flat.tied()[:15].view(5, 3), network(1)[0].weight)
    with torch.no_grad():
        flat.tied().zero_()
    assert all((p == 0).all() for p in module.parameters())


def test_a_module_may_change_its_dtype_before_the_first_step():
    module = network()
    flat = Flat(module.parameters())
    adam = torch.optim.Adam([flat.vector], 0.01)
    before = module.double()[0].weight.clone()
    flat.descend(module(torch.ones(1, 3).double()).sum(), adam, 1.0)
    assert module[0].weight.dtype == torch.float64 and not torch.equal(module[0].weight, before)


def test_a_tied_module_saves_and_copies_like_any_other(tmp_path):
    module = network()
    Flat(module.parameters())
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, tmp_path / "weights.safetensors")
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in load_file(tmp_path / "weights.safetensors").items())
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[0].weight.zero_()
    assert not (module[0].weight == 0).any()
