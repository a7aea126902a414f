import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_mrl.prefixes import check_mrl_dims, prefix_cosines

DIMS = (2, 4, 7)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mrl_dims", [[], [0, 4], [4, 4], [8, 4], [4.0], ["4"], 4, None])
def test_sizes_that_do_not_ascend_are_refused(mrl_dims):
    with pytest.raises(ValueError, match="mrl_dims must be positive integers in ascending order"):
        check_mrl_dims(mrl_dims)


def test_prefix_cosines_are_one_product_per_size_in_value_and_gradient():
    x, y = random(5, 8).requires_grad_(), random(3, 7, seed=1).requires_grad_()
    fast = prefix_cosines(x, y, DIMS)
    slow = {d: F.normalize(x[:, :d], dim=1) @ F.normalize(y[:, :d], dim=1).T for d in DIMS}
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    weights = random(5, 3, seed=2)
    gradients = [
        torch.autograd.grad(sum((w * weights).sum() for w in cosines.values()), (x, y))
        for cosines in (fast, slow)
    ]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_all_sizes_cost_the_product_of_the_largest_alone():
    with FlopCounterMode(display=False) as counter:
        prefix_cosines(torch.randn(10, 256), torch.randn(30, 256), [8, 16, 64, 192, 256])
    assert counter.get_total_flops() == 2 * 10 * 30 * 256


def test_zero_vectors_have_finite_cosines_and_gradients():
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]], requires_grad=True)
    cosines = prefix_cosines(x, x, [1, 3])
    sum(c.sum() for c in cosines.values()).backward()
    torch.testing.assert_close(cosines[3], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert x.grad.isfinite().all()
