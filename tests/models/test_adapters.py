import numpy as np
import pytest
import torch
from torch import nn

from hfdistill.models.adapters import ADAPTERS, build_adapter


def test_auto_is_nothing_where_widths_agree_and_linear_otherwise():
    same = build_adapter("auto", 5, 5)
    assert isinstance(same, nn.Identity)
    assert isinstance(build_adapter("auto", 3, 5), nn.Linear)


def test_linear_maps_with_small_normal_weights_and_zero_bias():
    torch.manual_seed(0)
    adapter = build_adapter("linear", 300, 400)
    assert adapter.weight.shape == (400, 300)
    assert adapter.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert adapter.weight.mean().item() == pytest.approx(0.0, abs=2e-4)
    assert torch.equal(adapter.bias, torch.zeros(400))


def test_linear_trains_even_where_widths_agree():
    assert isinstance(build_adapter("linear", 4, 4), nn.Linear)


def test_mlp_is_linear_gelu_linear():
    adapter = build_adapter("mlp", 3, 5)
    x = torch.randn(2, 7, 3)
    first, last = adapter[0], adapter[2]
    assert first.weight.shape == (5, 3) and last.weight.shape == (5, 5)
    inner = (x.numpy() @ first.weight.detach().numpy().T).astype(np.float64)
    phi = np.vectorize(lambda v: 0.5 * (1 + torch.erf(torch.tensor(v / 2**0.5, dtype=torch.float64)).item()))(inner)
    expected = (inner * phi) @ last.weight.detach().double().numpy().T
    np.testing.assert_allclose(adapter(x).detach().numpy(), expected, atol=1e-6)


def test_weights_follow_the_global_seed():
    for kind in ("linear", "mlp"):
        torch.manual_seed(3)
        one = build_adapter(kind, 4, 6).state_dict()
        torch.manual_seed(3)
        two = build_adapter(kind, 4, 6).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_of_a_module_a_copy_is_used():
    mine = nn.Linear(3, 5)
    built = build_adapter(mine, 3, 5)
    assert built is not mine and torch.equal(built.weight, mine.weight)
    with torch.no_grad():
        built.weight.zero_()
    assert mine.weight.abs().sum() > 0


def test_none_refuses_unequal_widths():
    assert isinstance(build_adapter("none", 5, 5), nn.Identity)
    with pytest.raises(ValueError, match=r"student's width 3 with the teacher's width 5.*Use adapter='auto' or 'linear'"):
        build_adapter("none", 3, 5)


@pytest.mark.parametrize("kind", ["linaer", None, 3])
def test_unknown_kind_lists_what_there_is(kind):
    with pytest.raises(ValueError, match=f"Unknown adapter {kind!r}.*auto, linear, shared, mlp, none"):
        build_adapter(kind, 3, 5)
    assert list(ADAPTERS) == ["auto", "linear", "shared", "mlp", "none"]


def test_unknown_kind_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        build_adapter("linaer", 3, 5)
