import math

import pytest
import torch
import torch.nn.functional as F
from speechbrain.nnet.losses import AdditiveAngularMargin, AngularMargin, LogSoftmaxWrapper
from torch import nn

from speechbrain_mrl.classification import (
    MatryoshkaLoss,
    PrefixClassifier,
    margin_losses,
)

DIMS = (2, 4, 7)
WEIGHTS = (1.0, 2.0, 0.5)
CROSS_ENTROPY = LogSoftmaxWrapper(nn.Identity())
SIZES = {2: 0.1, 5: 0.2, 9: 0.4}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_classifier_gives_the_cosines_to_its_speakers():
    classifier, embeddings = PrefixClassifier(8, 5, DIMS).double(), random(3, 8)
    for dim, cosines in classifier(embeddings).items():
        x, y = embeddings[:, None, :dim], classifier.weight[None, :, :dim]
        torch.testing.assert_close(cosines, F.cosine_similarity(x, y, dim=2))


def test_matryoshka_loss_is_the_weighted_mean_of_the_sizes():
    predictions = {d: random(5, 3, seed=d).requires_grad_() for d in DIMS}
    classes = torch.tensor([0, 2, 1, 1, 0])
    loss = MatryoshkaLoss(CROSS_ENTROPY, DIMS, WEIGHTS)(predictions, classes)
    expected = (
        sum(w * F.cross_entropy(predictions[d], classes) for w, d in zip(WEIGHTS, DIMS)) / 3.5
    )
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(x, list(predictions.values())) for x in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=0)


def test_a_weight_may_be_zero():
    predictions = {d: random(5, 3, seed=d) for d in DIMS}
    classes = torch.tensor([0, 2, 1, 1, 0])
    loss = MatryoshkaLoss(CROSS_ENTROPY, DIMS, [0, 1, 0])(predictions, classes)
    torch.testing.assert_close(loss, F.cross_entropy(predictions[4], classes))


def test_matryoshka_loss_takes_a_loss_per_size_and_registers_modules():
    losses = {"2": LogSoftmaxWrapper(AngularMargin(0.5)), 4: lambda predictions, targets: 3.0}
    loss = MatryoshkaLoss(losses, [2, 4])
    # log(1 + e^(0 - 0.5)) for one clip: cosine 1 less margin 0.5 against cosine 0
    predictions = {2: torch.tensor([[[1.0, 0.0]]]), 4: torch.zeros(1, 1, 2)}
    value = loss(predictions, torch.tensor([[0]]))
    assert value.item() == pytest.approx((math.log1p(math.exp(-0.5)) + 3.0) / 2)
    assert losses["2"] in list(loss.modules())


def size_by_size(embeddings, weight, labels, scale=30.0):
    """SpeechBrain's loss of each size's own product."""
    losses = {}
    for dim, margin in SIZES.items():
        cosines = F.normalize(embeddings[:, :dim], dim=1) @ F.normalize(weight[:, :dim], dim=1).T
        loss = LogSoftmaxWrapper(AdditiveAngularMargin(margin, scale))
        losses[dim] = loss(cosines.unsqueeze(1), labels.unsqueeze(1))
    return losses


@pytest.fixture
def batch():
    """Embeddings, speakers' vectors and labels; one clip is at a half turn from its speaker."""
    torch.manual_seed(0)
    embeddings, weight = torch.randn(6, 11), torch.randn(23, 9)
    labels = torch.tensor([0, 22, 7, 6, 7, 13])
    embeddings[5, :9] = -weight[13]
    return embeddings.requires_grad_(), weight.requires_grad_(), labels


def test_the_losses_are_speechbrains_of_one_product_per_size(batch):
    embeddings, weight, labels = batch
    fast = margin_losses(embeddings, weight, labels, SIZES, scale=30.0)
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
    fast = margin_losses(embeddings, weight, labels, SIZES, scale=64.0)
    torch.testing.assert_close(fast, size_by_size(embeddings, weight, labels, 64.0))


def test_one_speaker_alone_costs_nothing():
    embeddings, weight = torch.randn(2, 3, requires_grad=True), torch.randn(1, 3)
    weight.requires_grad_()
    loss = margin_losses(embeddings, weight, torch.tensor([0, 0]), {3: 0.2}, scale=30.0)[3]
    loss.backward()
    assert loss < 1e-6
    assert embeddings.grad.abs().max() < 1e-6 and weight.grad.abs().max() < 1e-6


def test_the_gradient_is_that_of_finite_differences(batch):
    embeddings, weight, labels = (x.detach() for x in batch)
    inputs = [x[:, :9].double().requires_grad_() for x in (embeddings[:4], weight)]

    def losses(x, w):
        return torch.stack([*margin_losses(x, w, labels[:4], SIZES, 3.0).values()])

    assert torch.autograd.gradcheck(losses, inputs)


def test_zero_vectors_have_finite_losses_and_gradients():
    embeddings, weight = torch.zeros(2, 9, requires_grad=True), torch.zeros(3, 9)
    losses = margin_losses(embeddings, weight, torch.tensor([0, 2]), SIZES, scale=30.0)
    sum(losses.values()).backward()
    assert embeddings.grad.isfinite().all()
    # All cosines are 0: the own one becomes cos(90 degrees + margin).
    own, others = 30 * torch.tensor(torch.pi / 2 + 0.1).cos(), torch.tensor(2.0)
    torch.testing.assert_close(losses[2], -(own - torch.log(own.exp() + others)))


@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_a_clip_exactly_at_its_speaker_or_opposite_has_a_finite_gradient(cosine):
    embeddings = torch.tensor([[cosine, 0.0]], requires_grad=True)
    losses = margin_losses(embeddings, torch.eye(2), torch.tensor([0]), {2: 0.2}, scale=30.0)
    losses[2].backward()
    assert embeddings.grad.isfinite().all()
