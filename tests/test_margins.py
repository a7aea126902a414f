import pytest
import torch
import torch.nn.functional as F
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

from speechbrain_mrl import losses as margins
from speechbrain_mrl.losses import prefix_margin_losses

SIZES = {2: 0.1, 5: 0.2, 9: 0.4}


def size_by_size(embeddings, weight, labels, scale=30.0):
    """SpeechBrain's loss of each size's own product."""
    losses = {}
    for dim, margin in SIZES.items():
        cosines = F.normalize(embeddings[:, :dim], dim=1) @ F.normalize(weight[:, :dim], dim=1).T
        loss = LogSoftmaxWrapper(AdditiveAngularMargin(margin, scale))
        losses[dim] = loss(cosines.unsqueeze(1), labels.unsqueeze(1))
    return losses


@pytest.fixture
def batch(monkeypatch):
    """Embeddings, speakers' vectors and labels; one clip is at a half turn from its speaker."""
    monkeypatch.setattr(margins, "BLOCK", 7)  # 23 speakers are three blocks and a rest
    torch.manual_seed(0)
    embeddings, weight = torch.randn(6, 11), torch.randn(23, 9)
    labels = torch.tensor([0, 22, 7, 6, 7, 13])
    embeddings[5, :9] = -weight[13]
    return embeddings.requires_grad_(), weight.requires_grad_(), labels


def test_the_losses_are_speechbrains_of_one_product_per_size(batch):
    embeddings, weight, labels = batch
    fast = prefix_margin_losses(embeddings, weight, labels, SIZES, scale=30.0)
    slow = size_by_size(embeddings, weight, labels)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    factors = {2: 1.0, 5: -2.0, 9: 0.5}
    gradients = [
        torch.autograd.grad(sum(f * losses[d] for d, f in factors.items()), (embeddings, weight))
        for losses in (fast, slow)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_the_largest_scales_in_use_are_held(batch):
    embeddings, weight, labels = batch
    fast = prefix_margin_losses(embeddings, weight, labels, SIZES, scale=64.0)
    torch.testing.assert_close(fast, size_by_size(embeddings, weight, labels, 64.0))
    for scale in (0.0, 71.0, float("nan")):
        with pytest.raises(ValueError, match="at most 70"):
            prefix_margin_losses(embeddings, weight, labels, SIZES, scale=scale)


def test_one_speaker_alone_costs_nothing():
    embeddings, weight = torch.randn(2, 3, requires_grad=True), torch.randn(1, 3)
    weight.requires_grad_()
    loss = prefix_margin_losses(embeddings, weight, torch.tensor([0, 0]), {3: 0.2}, scale=30.0)[3]
    loss.backward()
    assert loss < 1e-6
    assert embeddings.grad.abs().max() < 1e-6 and weight.grad.abs().max() < 1e-6


def test_the_gradient_is_that_of_finite_differences(batch):
    embeddings, weight, labels = (x.detach() for x in batch)
    inputs = [x[:, :9].double().requires_grad_() for x in (embeddings[:4], weight)]

    def losses(x, w):
        return torch.stack([*prefix_margin_losses(x, w, labels[:4], SIZES, 3.0).values()])

    assert torch.autograd.gradcheck(losses, inputs)


def test_zero_vectors_have_finite_losses_and_gradients():
    embeddings, weight = torch.zeros(2, 9, requires_grad=True), torch.zeros(3, 9)
    losses = prefix_margin_losses(embeddings, weight, torch.tensor([0, 2]), SIZES, scale=30.0)
    sum(losses.values()).backward()
    assert embeddings.grad.isfinite().all()
    # All cosines are 0: the own one becomes cos(90 degrees + margin).
    own, others = 30 * torch.tensor(torch.pi / 2 + 0.1).cos(), torch.tensor(2.0)
    torch.testing.assert_close(losses[2], -(own - torch.log(own.exp() + others)))


@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_a_clip_exactly_at_its_speaker_or_opposite_has_a_finite_gradient(cosine):
    embeddings = torch.tensor([[cosine, 0.0]], requires_grad=True)
    losses = prefix_margin_losses(embeddings, torch.eye(2), torch.tensor([0]), {2: 0.2}, scale=30.0)
    losses[2].backward()
    assert embeddings.grad.isfinite().all()
