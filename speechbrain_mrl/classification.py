"""Losses by speaker labels at every prefix of an embedding at once."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_mrl.prefixes import (
    check_mrl_dims,
    check_weights,
    for_each_size,
    prefix_cosines,
    weighted_mean,
)


class PrefixClassifier(nn.Module):
    """Cosines to one set of speaker vectors, whose prefixes serve the embedding's prefixes.

    Arguments
    ---------
    embed_dim : int
        Dimensions of the embedding (D).
    n_classes : int
        Speakers (C).
    mrl_dims : iterable of int
        Prefix sizes, ascending, the largest at most ``embed_dim``.

    Example
    -------
    >>> cosines = PrefixClassifier(8, 5, mrl_dims=[2, 8])(torch.randn(3, 8))
    >>> {dim: tuple(cosine.shape) for dim, cosine in cosines.items()}
    {2: (3, 5), 8: (3, 5)}
    """

    def __init__(self, embed_dim: int, n_classes: int, mrl_dims: Iterable[int]) -> None:
        super().__init__()
        self.mrl_dims = check_mrl_dims(mrl_dims)
        if self.mrl_dims[-1] > embed_dim:
            raise ValueError(f"mrl_dims {self.mrl_dims} ends past embed_dim={embed_dim}")
        self.weight = nn.Parameter(torch.empty(n_classes, embed_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor) -> dict[int, Tensor]:
        """Embeddings (B, D) -> {d: cosines (B, C)}."""
        return prefix_cosines(embeddings, self.weight, self.mrl_dims)


class MatryoshkaLoss(nn.Module):
    """A classification loss at every prefix size, averaged over the sizes by weight.

    Arguments
    ---------
    base_loss_per_dim : callable, or mapping of int to callable
        One loss for all sizes or one for each, called as SpeechBrain's: predictions (B, 1, C),
        targets (B, 1).
    mrl_dims : iterable of int
        Prefix sizes, ascending.
    mrl_weights : iterable of float, optional
        One per size; only ratios matter, for the weighted sum is divided by their sum. Default:
        equal.

    Raises
    ------
    ValueError
        If sizes, weights or losses do not belong together.

    Reference
    ---------
    Kusupati et al., Matryoshka Representation Learning, 2022, arXiv:2205.13147.

    Example
    -------
    >>> from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
    >>> base_loss = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30.0))
    >>> loss = MatryoshkaLoss(base_loss, mrl_dims=[2, 8])
    >>> cosines = PrefixClassifier(8, 5, mrl_dims=[2, 8])(torch.randn(3, 8))
    >>> loss(cosines, torch.tensor([0, 4, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        base_loss_per_dim: Callable[..., Tensor] | Mapping[int, Callable[..., Tensor]],
        mrl_dims: Iterable[int],
        mrl_weights: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        self.mrl_dims = check_mrl_dims(mrl_dims)
        self.mrl_weights = check_weights(mrl_weights, self.mrl_dims)
        if not isinstance(base_loss_per_dim, Mapping):
            base_loss_per_dim = dict.fromkeys(self.mrl_dims, base_loss_per_dim)
        losses = for_each_size(base_loss_per_dim, self.mrl_dims, "base_loss_per_dim")
        for dim, loss in losses.items():
            setattr(self, f"base_loss_{dim}", loss)  # registers those that are modules

    def per_size(self, predictions: Mapping[int, Tensor], targets: Tensor) -> dict[int, Tensor]:
        """The base losses before they are averaged, {d: scalar}."""
        predictions = for_each_size(predictions, self.mrl_dims, "predictions")
        targets = targets.reshape(-1, 1)
        for dim, prediction in predictions.items():
            if len(prediction) != len(targets):
                raise ValueError(
                    f"predictions at size {dim} hold {len(prediction)} utterances for "
                    f"{len(targets)} targets"
                )
        return {
            dim: getattr(self, f"base_loss_{dim}")(prediction.flatten(1).unsqueeze(1), targets)
            for dim, prediction in predictions.items()
        }

    def forward(self, predictions: Mapping[int, Tensor], targets: Tensor) -> Tensor:
        """Predictions {d: (B, C)} and classes (B,) -> scalar."""
        return weighted_mean(self.per_size(predictions, targets), self.mrl_weights)


def margin_losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margins: Mapping[int, float],
    scale: float,
) -> dict[int, Tensor]:
    """What SpeechBrain's ``LogSoftmaxWrapper(AdditiveAngularMargin(...))`` gives at each prefix.

    Unlike it, finite gradients exactly at a speaker's vector, and double precision for doubles.

    Arguments
    ---------
    embeddings : torch.Tensor
        Float, (B, D).
    weight : torch.Tensor
        One vector per speaker, (C, D).
    labels : torch.Tensor
        Speakers of the utterances, int, (B,).
    margins : mapping of int to float
        Radians for each prefix size, ascending, the largest at most D.
    scale : float
        Factor on cosines before the softmax.

    Returns
    -------
    dict of int to torch.Tensor
        Mean loss of each size.

    Reference
    ---------
    Xiang et al., Margin Matters, 2019, arXiv:1906.07317.

    Example
    -------
    >>> embeddings, weight = torch.tensor([[1.0, 0.0, 9.0]]), torch.eye(3)
    >>> margin_losses(embeddings, weight, torch.tensor([0]), {2: 0.0}, scale=1.0)
    {2: tensor(0.5514)}
    """
    losses, own = {}, labels[:, None]
    for dim, cosines in prefix_cosines(embeddings, weight, margins).items():
        cos, sin = math.cos(margins[dim]), math.sin(margins[dim])
        cosine = cosines.gather(1, own).clamp(-1 + 1e-7, 1 - 1e-7)
        moved = cosine * cos - (1 - cosine**2).sqrt() * sin  # cos(angle + margin)
        past = cosine - margins[dim] * sin  # where the angle would pass 180 degrees
        cosines = cosines.scatter(1, own, torch.where(cosine > -cos, moved, past))
        losses[dim] = F.cross_entropy(scale * cosines, labels)
    return losses
