"""Gives any speaker encoder of SpeechBrain a Matryoshka head."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from speechbrain.nnet.pooling import StatisticsPooling
from torch import Tensor, nn

from .redimnet import (
    SAMPLE_RATE,
    MatryoshkaHead,
    OfOneSize,
    check_mrl_dims,
    check_wavs,
    resized_rows,
    sample_counts,
)

PARTS = ("compute_features", "mean_var_norm", "embedding_model")  # SpeechBrain's names
USUAL_DIMS = (64, 128, 192, 256)

_Model = TypeVar("_Model", bound="MatryoshkaEncoder")


class MatryoshkaEncoder(MatryoshkaHead):
    """A SpeechBrain speaker encoder whose embedding's first d dimensions are embeddings too.

    It is called as ``ReDimNetMRL`` is: waveforms to features, normalised features, the encoder's own
    embedding, and a linear layer to ``embed_dim`` dimensions.

    In eval mode an utterance has the same embedding alone and in a padded batch, whatever the encoder
    does with padding: utterances of one length run together. In training the parts are told
    the lengths, as in SpeechBrain's recipes, and treat padding in their own ways; chunks of equal
    lengths have none. The noise of 1e-5 that SpeechBrain's
    ``StatisticsPooling`` adds to x-vectors is left out: an utterance has one embedding.

    Arguments
    ---------
    embedding_model : torch.nn.Module
        Features (B, T, F), and relative lengths (B,) if its ``forward`` takes a second argument, to
        (B, 1, E) or (B, E): ``ECAPA_TDNN``, ``ResNet`` and ``Xvector`` of SpeechBrain, for example.
    embed_dim : int
        D, size of the whole embedding.
    mrl_dims : sequence of int
        Sizes of the prefixes, ascending, the last one ``embed_dim``.
    compute_features : torch.nn.Module, optional
        Waveforms (B, T) to features, such as ``Fbank``. None: the encoder takes waveforms.
    mean_var_norm : torch.nn.Module, optional
        Features and relative lengths to normalised features, such as ``InputNormalization`` with
        ``norm_type="sentence"``; one with ``norm_type="global"`` must have its statistics, and keeps
        them. None: features as they are.

    Attributes
    ----------
    architecture : str or None
        HyperPyYAML that makes ``compute_features``, ``mean_var_norm`` and ``embedding_model`` again,
        of a model from ``from_hparams`` or a recipe; a model is published with it.

    Raises
    ------
    ValueError
        If the parts do not fit each other, the sizes are wrong, or the encoder has no gradients.
    TypeError
        If a part is no module.

    Reference
    ---------
    Kusupati et al., Matryoshka Representation Learning, 2022, arXiv:2205.13147.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.lobes.models.Xvector import Xvector
    >>> encoder = Xvector(tdnn_channels=[8, 8, 8, 8, 24], lin_neurons=16, in_channels=24)
    >>> model = MatryoshkaEncoder(encoder, 16, (4, 8, 16), Fbank(n_mels=24)).eval()
    >>> {d: tuple(z.shape) for d, z in model(torch.zeros(16000), return_all_dims=True).items()}
    {4: (1, 4), 8: (1, 8), 16: (1, 16)}
    """

    compute_features: nn.Module | None
    mean_var_norm: nn.Module | None
    embedding_model: nn.Module
    architecture: str | None = None

    def __init__(
        self,
        embedding_model: nn.Module,
        embed_dim: int = 256,
        mrl_dims: Iterable[int] = USUAL_DIMS,
        compute_features: nn.Module | None = None,
        mean_var_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.mrl_dims, self.embed_dim = check_mrl_dims(mrl_dims, embed_dim), embed_dim
        parts = dict(zip(PARTS, (compute_features, mean_var_norm, embedding_model)))
        for name, part in parts.items():
            if not isinstance(part, nn.Module) and (part is not None or name == PARTS[-1]):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(part).__name__}")
            setattr(self, name, part)
        self._check_norm()
        self._takes_lengths = _takes_lengths(embedding_model)
        for module in embedding_model.modules():
            if isinstance(module, StatisticsPooling):
                module.eps = 0.0  # what it draws noise of, in eval mode too
        self.train(embedding_model.training)
        own_dim, self.min_samples = self._probe()
        self.linear = nn.Linear(own_dim, embed_dim)

    @classmethod
    def from_hparams(
        cls: type[_Model],
        source: str | os.PathLike[str],
        embed_dim: int | None = None,
        mrl_dims: Iterable[int] | None = None,
    ) -> _Model:
        """A published SpeechBrain model's encoder: its own embedding first, in eval mode.

        The first dimensions are the published embedding; further ones are small and random.
        ``rotate_head`` with a ``matryoshka_rotation`` makes prefixes useful without training.

        Arguments
        ---------
        source : path
            A folder with ``hyperparams.yaml``, or a Hub id such as
            "speechbrain/spkrec-ecapa-voxceleb". Loading it runs what its YAML says.
        embed_dim : int, optional
            D, at least that of the published embedding. Default: that of it.
        mrl_dims : sequence of int, optional
            Default: 64, 128, 192 and 256, as far as they are below ``embed_dim``, and ``embed_dim``.

        Raises
        ------
        ValueError
            If it is another kind of model, or ``embed_dim`` is smaller than its embedding.
        FileNotFoundError
            If there is no such folder or model, or no way to it.
        """
        from speechbrain.inference.classifiers import EncoderClassifier  # slow to import

        from ..utils import published_folder
        from .architecture import architecture_of  # neither travels

        folder = published_folder(source)
        text = (folder / "hyperparams.yaml").read_text(encoding="utf-8")
        # The YAMLs on the Hub name their own repository, from where the weights would be fetched.
        overrides = {"pretrained_path": str(folder)} if "\npretrained_path:" in text else {}
        published = EncoderClassifier.from_hparams(str(folder), overrides=overrides)
        parts: dict[str, Any] = {name: published.mods[name] for name in PARTS}
        parts["embedding_model"].requires_grad_(True)  # which SpeechBrain takes away
        model = cls(**parts, embed_dim=1, mrl_dims=(1,))  # of another size once its own is known
        own_dim = model.linear.in_features
        embed_dim = own_dim if embed_dim is None else embed_dim
        if embed_dim < own_dim:
            raise ValueError(
                f"embed_dim {embed_dim} is smaller than the {own_dim} dimensions of the published "
                f"embedding; keep them and read a prefix: {embed_dim} may be in mrl_dims"
            )
        if mrl_dims is None:
            mrl_dims = usual_dims(embed_dim)
        model._set_sizes(check_mrl_dims(mrl_dims, embed_dim))
        identity = nn.Linear(own_dim, own_dim)
        nn.init.eye_(identity.weight)
        nn.init.zeros_(identity.bias)
        weight, bias = resized_rows(identity, embed_dim)
        model.linear.load_state_dict({"weight": weight, "bias": bias})
        model.architecture = architecture_of(text, "modules")
        return model.eval()

    def of_sizes(self: _Model, mrl_dims: tuple[int, ...]) -> _Model:
        """A copy with another linear layer."""
        other = copy.deepcopy(self)
        other._set_sizes(mrl_dims)
        return other

    def _set_sizes(self, mrl_dims: tuple[int, ...]) -> None:
        self.mrl_dims, self.embed_dim = mrl_dims, mrl_dims[-1]
        self.linear = nn.Linear(self.linear.in_features, self.embed_dim)

    def train(self: _Model, mode: bool = True) -> _Model:
        """As torch's; a global ``mean_var_norm`` keeps its statistics."""
        super().train(mode)
        if self.mean_var_norm is not None and self._norm_type() == "global":
            self.mean_var_norm.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._norm_type() == "global":  # SpeechBrain keeps them outside of the buffers
            norm: Any = self.mean_var_norm
            norm.glob_mean, norm.glob_std = fn(norm.glob_mean), fn(norm.glob_std)
        return self

    def _whole(self, wavs: Tensor, wav_lens: Tensor | None) -> Tensor:
        wavs = check_wavs(wavs, self.min_samples)
        counts = sample_counts(wavs, wav_lens, self.min_samples, self.training)
        if counts is None:
            own = self._own_embeddings(wavs, wavs.new_ones(len(wavs)))
        elif self.training:
            own = self._own_embeddings(wavs, counts / wavs.shape[1])
        else:
            own = self._by_length(wavs, counts)
        with torch.autocast(wavs.device.type, enabled=False):
            embeddings: Tensor = self.linear(own.to(self.linear.weight.dtype))
        return embeddings

    def _own_embeddings(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        """What the encoder itself gives, (B, E)."""
        wavs, wav_lens = wavs.float(), wav_lens.float()
        feats = wavs if self.compute_features is None else self.compute_features(wavs)
        if self.mean_var_norm is not None:
            feats = self.mean_var_norm(feats, wav_lens)
        given = (feats, wav_lens) if self._takes_lengths else (feats,)
        embeddings: Tensor = self.embedding_model(*given)
        return embeddings.squeeze(1) if embeddings.ndim == 3 else embeddings

    def _by_length(self, wavs: Tensor, counts: Tensor) -> Tensor:
        """Utterances of one length at a time, without their padding, (B, E)."""
        found, order = [], []
        for count in sorted(set(counts.tolist())):
            chosen = (counts == count).nonzero().flatten()
            found.append(self._own_embeddings(wavs[chosen, :count], wavs.new_ones(len(chosen))))
            order.append(chosen)
        return torch.cat(found)[torch.cat(order).argsort()]

    def _norm_type(self) -> Any:
        return getattr(self.mean_var_norm, "norm_type", None)

    def _check_norm(self) -> None:
        norm_type = self._norm_type()
        if norm_type not in (None, "sentence", "global"):
            raise ValueError(
                f"mean_var_norm has norm_type={norm_type!r}, by which an embedding depends on other "
                "utterances; use norm_type='sentence'"
            )
        if norm_type == "global" and not getattr(self.mean_var_norm, "count", 1):
            raise ValueError(
                "mean_var_norm has norm_type='global' and no statistics yet; load them first, or "
                "use norm_type='sentence'"
            )

    def _probe(self) -> tuple[int, int]:
        """Size of the encoder's own embedding, and the fewest samples that give one.

        Both come out of a noise of one second, and of its beginnings.
        """
        if not any(p.requires_grad for p in self.embedding_model.parameters()):
            raise ValueError(
                "embedding_model has no parameter with gradients; call "
                "embedding_model.requires_grad_(True), and keep it as it is by freeze in training"
            )
        device = next(self.embedding_model.parameters()).device
        noise = torch.randn(1, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
        noise, whole = noise.to(device) / 10, torch.ones(1, device=device)
        modes = {part: part.training for part in self.modules()}
        self.eval()
        # x-vectors draw numbers, and their deviation of a single frame is a warning and NaN
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own_dim = self._own_dim(noise, whole)
            too_few, enough = 0, SAMPLE_RATE
            while enough - too_few > 1:
                middle = (too_few + enough) // 2
                try:
                    with torch.no_grad():
                        finite = self._own_embeddings(noise[:, :middle], whole).isfinite().all()
                except Exception:  # any, for each layer refuses in its own way
                    finite = torch.tensor(False)
                too_few, enough = (too_few, middle) if finite else (middle, enough)
        for part, mode in modes.items():
            part.training = mode
        return own_dim, enough

    def _own_dim(self, wavs: Tensor, wav_lens: Tensor) -> int:
        try:
            with torch.enable_grad():
                found = self._own_embeddings(wavs, wav_lens)
        except Exception as error:  # any, for each layer refuses in its own way
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"embedding_model cannot embed the features of one second ({reason}); give "
                "compute_features and embedding_model one number of features"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            shape = tuple(getattr(found, "shape", ())) or type(found).__name__
            raise ValueError(
                f"embedding_model must give (B, 1, E) or (B, E), got {shape} for B = 1"
            )
        if not found.requires_grad:
            raise ValueError(
                "embedding_model gives embeddings without gradients; it cannot be trained"
            )
        return found.shape[1]


class EncoderModel(OfOneSize, MatryoshkaEncoder):
    """``embedding_model`` of a published model: waveforms to embeddings of one size.

    Arguments
    ---------
    embedding_model, compute_features, mean_var_norm
        As of ``MatryoshkaEncoder``.
    mrl_dims : sequence of int
        Sizes that the model was trained for, ascending.
    target_dim : int, optional
        One of ``mrl_dims``: dimensions to return. None: all.
    """

    def __init__(
        self,
        embedding_model: nn.Module,
        mrl_dims: Iterable[int],
        target_dim: int | None = None,
        compute_features: nn.Module | None = None,
        mean_var_norm: nn.Module | None = None,
    ) -> None:
        dims = tuple(mrl_dims)
        super().__init__(embedding_model, dims[-1], dims, compute_features, mean_var_norm)
        self.check_target_dim(target_dim)
        self.target_dim = target_dim


def usual_dims(embed_dim: int) -> tuple[int, ...]:
    """64, 128, 192 and 256 as far as they are smaller, and ``embed_dim``."""
    return (*(d for d in USUAL_DIMS if d < embed_dim), embed_dim)


def _takes_lengths(module: nn.Module) -> bool:
    """Whether its ``forward`` has a second argument by position."""
    kinds = [one.kind for one in inspect.signature(module.forward).parameters.values()]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Parameter.VAR_POSITIONAL in kinds or sum(k in by_position for k in kinds) > 1
