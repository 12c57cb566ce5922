import copy

import pytest
import torch
import torch.nn.functional as F
from dsrl_vla import linear
from dsrl_vla.errors import DsrlError
from dsrl_vla.linear import QuickLinear, affine, pays, quicken
from dsrl_vla.networks import NetworkConfig, StackedLinear, StackedNorm, attention, build
from torch import nn


def look(memory, layer, query, queries_told):
    """The second layer's attention, in the form chosen for so many queries."""
    return attention(memory, layer, 2, 4, queries_told)[1](query)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("members", [1, 2])
def test_both_forms_of_attention_are_the_same_function(members, queries):
    torch.manual_seed(0)
    layer = StackedLinear(members, 16, 4 * 16)
    with torch.no_grad():
        layer.bias.normal_()
    memory = torch.randn(members, 7, 9, 16, requires_grad=True)
    query = torch.randn(members, 7, queries, 16, requires_grad=True)
    found = {told: look(memory, layer, query, told) for told in (1, 100)}
    assert torch.allclose(found[1], found[100], atol=1e-5)
    weight = torch.randn_like(found[1])
    inputs = [memory, query, layer.weight]
    for one, other in zip(*(torch.autograd.grad((f * weight).sum(), inputs) for f in found.values()), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_attention_is_torchs_own():
    torch.manual_seed(0)
    layer = StackedLinear(1, 16, 4 * 16)
    memory, query = torch.randn(1, 7, 9, 16), torch.randn(1, 7, 3, 16)
    keys, values = layer(memory).view(7, 9, 4, 4, 4).permute(2, 0, 3, 1, 4)[2:]
    expected = F.scaled_dot_product_attention(query.view(7, 3, 4, 4).transpose(1, 2), keys, values)
    assert torch.allclose(look(memory, layer, query, 3)[0], expected.transpose(1, 2).flatten(2), atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
@pytest.mark.parametrize("count", [1, 8])
def test_members_of_a_stack_do_not_see_each_other(kind, count):
    torch.manual_seed(0)
    config = NetworkConfig(kind, width=16, layers=2)
    stack, lone = (build(config, members, [3, 5], (count, 2), 1, 1) for members in (3, 1))
    lone.load_state_dict({k: v[1:2] for k, v in stack.state_dict().items()})
    inputs, vectors = [torch.randn(6, 3), torch.randn(6, 5)], torch.randn(6, count, 2)
    assert torch.allclose(stack(inputs, vectors)[1:2], lone(inputs, vectors), atol=1e-5)


def test_a_norm_of_one_member_is_that_of_many():
    torch.manual_seed(0)
    many, one = StackedNorm(2, 8), StackedNorm(1, 8)
    with torch.no_grad():
        many.gain.normal_()
        many.bias.normal_()
    one.load_state_dict({k: v[:1] for k, v in many.state_dict().items()})
    x = torch.randn(2, 5, 3, 8)
    assert torch.allclose(many(x)[:1], one(x[:1]), atol=1e-6)


def test_an_mlp_can_be_the_reference_s():
    """Tanh in place of ReLU, with or without LayerNorm: E = 1 is the plain torch network of the same weights."""
    torch.manual_seed(0)
    inputs, vectors = [torch.randn(6, 3)], torch.randn(6, 2, 2)
    net = build(NetworkConfig("mlp", width=16, layers=1, activation="tanh", norm=False), 1, [3], (2, 2), 1, 1)
    x = torch.cat([inputs[0], vectors.flatten(1)], -1)
    for layer in net.layers:
        x = torch.tanh(x @ layer.weight[0] + layer.bias[0])
    assert torch.allclose(net(inputs, vectors)[0, :, 0], x @ net.read.weight[0] + net.read.bias[0], atol=1e-6)
    assert not any("norms" in name for name in net.state_dict())
    normed = build(NetworkConfig("mlp", width=16, layers=1, activation="tanh"), 1, [3], (2, 2), 1, 1)
    assert any("norms" in name for name in normed.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "mlp", "activation": "gelu"}, "network.activation: expected relu or tanh"),
        ({"norm": False}, "network.kind: expected mlp with network.activation or network.norm changed"),
    ],
)
def test_network_fields_are_checked(changes, words):
    with pytest.raises(DsrlError, match=words):
        NetworkConfig(**changes)


@pytest.fixture
def by_onednn(monkeypatch):
    """As on a processor that is not Intel's; where torch has no oneDNN, torch's own products."""
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    monkeypatch.setattr(linear, "_product", product)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("rows", [4, 256])
def test_a_layer_is_the_same_function_whichever_library_multiplies(rows):
    """Outputs and gradients against torch's own, in double precision; 256 rows of 128 x 128 are for oneDNN."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()
    x, weight, bias = draw(rows, 128), draw(128, 128), draw(128)
    assert pays(x, weight) == (rows == 256 and linear._product is not None)
    gradient = torch.randn(rows, 128, generator=generator)
    found = affine(x, weight, bias)
    precise = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    expected = torch.addmm(precise[2], precise[0], precise[1])
    assert torch.allclose(found.double(), expected, atol=1e-4)
    grads = torch.autograd.grad(found, [x, weight, bias], gradient)
    for one, other in zip(grads, torch.autograd.grad(expected, precise, gradient.double()), strict=True):
        assert torch.allclose(one.double(), other, atol=1e-3)


@pytest.mark.usefixtures("by_onednn")
def test_a_frozen_models_layers_are_quickened_and_otherwise_as_they_were(monkeypatch):
    multiplied = []
    multiply = linear._multiply
    monkeypatch.setattr(linear, "_multiply", lambda x, *rest: multiplied.append(x.shape) or multiply(x, *rest))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 128, bias=False), nn.LayerNorm(128))
    quick = copy.deepcopy(plain).requires_grad_(False)
    quicken(quick)
    assert list(quick.state_dict()) == list(plain.state_dict())
    for rows in ((2, 3), (8, 40)):
        x = torch.randn(*rows, 128)
        assert torch.allclose(quick(x), plain(x), atol=1e-5)
    if linear._product is not None:
        assert [type(layer) for layer in quick[::2]] == [QuickLinear, QuickLinear]
        assert multiplied == [(320, 128), (320, 96)]
    x.requires_grad_()
    for one, other in zip(*(torch.autograd.grad(net(x).sum(), [x]) for net in (quick, plain)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.usefixtures("by_onednn")
def test_other_dtypes_and_devices_are_left_to_torch():
    assert not pays(torch.zeros(256, 128, dtype=torch.bfloat16), torch.zeros(128, 128, dtype=torch.bfloat16))
    assert not pays(torch.zeros(256, 128, device="meta"), torch.zeros(128, 128, device="meta"))


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_large_stacks_agree_with_their_members_alone(kind):
    """Sizes at which an MLP is multiplied by oneDNN."""
    torch.manual_seed(0)
    config = NetworkConfig(kind, width=128, layers=2)
    stack, lone = (build(config, members, [100], (1, 28), 1, 1) for members in (2, 1))
    lone.load_state_dict({k: v[1:] for k, v in stack.state_dict().items()})
    inputs, vectors = [torch.randn(256, 100)], torch.randn(256, 1, 28)
    assert torch.allclose(stack(inputs, vectors)[1:], lone(inputs, vectors), atol=1e-5)
