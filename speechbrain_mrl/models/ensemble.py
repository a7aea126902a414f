"""Several encoders behind one call: the size or the mode asked for chooses which one answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_mrl.models.pretrained import load_checkpoint, load_released
from speechbrain_mrl.models.redimnet import MatryoshkaHead
from speechbrain_mrl.models.releases import released_names


@dataclass(frozen=True, eq=False)
class RoutedEmbedding:
    """Embeddings that know which member of an ensemble they came from."""

    embeddings: Tensor  # (B, D), D being the member's own size; not length-normalised
    member: str


class MultiModelEnsemble(nn.Module):
    """Routes each request to one encoder by the size or the mode asked for; needs no training.

    Embeddings of different encoders lie in unrelated spaces: a speaker enrolled with one member
    must be verified with the same one. So a result carries its member's name, and ``score`` refuses
    results of two members. A Matryoshka model has no such limit; this is the baseline without it.

    The sizes in ``routes`` are quality levels. They choose a member and do not truncate, since a
    prefix of a plain encoder is not an embedding: a released ReDimNet returns 192 dimensions,
    whether 64 or 256 are asked for. Only a Matryoshka member that has the size in its ``mrl_dims``
    returns the prefix.

    Members that are not given as modules load when a route first needs them, onto the device that
    the ensemble was moved to. All stay in eval mode and run without gradients.

    Arguments
    ---------
    models : mapping of str to (nn.Module, str, path or callable)
        Members by name: a module called with (wavs, wav_lens) that gives (B, D); a released model's
        name ("b0" … "b6", "redimnet2_b0" … "redimnet2_b6": VoxCeleb2, large margin); a release
        file; or a function without arguments that returns the module, e.g.
        ``functools.partial(load_pretrained_redimnet, "M", …)``.
    routes : mapping of int to str
        The member that answers for each size.

    Raises
    ------
    ValueError
        If a route names an absent member, a size is not a positive integer, or a member is neither
        of the above.

    Example
    -------
    >>> from speechbrain_mrl.models.redimnet import ReDimNet
    >>> small, large = (
    ...     ReDimNet(F=24, C=4, stages_setup=[[2, 1, 1, None, 6]], embed_dim=d) for d in (32, 48)
    ... )
    >>> models = {"small": small, "large": lambda: large}
    >>> ensemble = MultiModelEnsemble(models, routes={16: "small", 32: "large"})
    >>> result = ensemble(torch.randn(2, 16000), target_dim=16)
    >>> result.member, tuple(result.embeddings.shape), ensemble.loaded
    ('small', (2, 32), ('small',))
    >>> ensemble.score(result, ensemble.extract(torch.randn(2, 16000), mode="accurate"))
    Traceback (most recent call last):
    ...
    ValueError: cannot score an embedding of 'small' against one of 'large': ...
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module | str | os.PathLike[str] | Callable[[], nn.Module]],
        routes: Mapping[int, str],
    ) -> None:
        super().__init__()
        sizes = list(routes)
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"routes must map positive integers to members, got {dict(routes)!r}")
        absent = {size: name for size, name in routes.items() if name not in models}
        if absent:
            raise ValueError(f"routes {absent} name no member; models has {sorted(models)}")
        self.routes = {size: routes[size] for size in sorted(sizes)}
        self._loaders, self._members = {}, nn.ModuleDict()
        self.register_buffer("_device", torch.empty(0), persistent=False)
        for name, source in models.items():
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"models has the name {name!r}; names are strings without a dot")
            if isinstance(source, nn.Module):
                self._members[name] = source.eval()
            else:
                self._loaders[name] = _loader(name, source)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the members in memory, in the order in which they came."""
        return tuple(self._members)

    def forward(
        self, wavs: Tensor, target_dim: int | None = None, wav_lens: Tensor | None = None
    ) -> RoutedEmbedding:
        """Embeddings of waveforms by the member that answers for ``target_dim``.

        Arguments
        ---------
        wavs : torch.Tensor
            Float, 16 kHz, in [-1, 1], as the member takes them: (T,), (B, T) or (B, 1, T).
        target_dim : int, optional
            One of the sizes in ``routes``, else ValueError. None: the largest.
        wav_lens : torch.Tensor, optional
            Lengths relative to T, in (0, 1], (B,).
        """
        size = max(self.routes) if target_dim is None else target_dim
        if size not in self.routes:
            raise ValueError(f"target_dim must be one of {list(self.routes)}, got {target_dim!r}")
        name = self.routes[size]
        member = self._members[name] if name in self._members else self._load(name)
        with torch.no_grad():
            embeddings = member(wavs, wav_lens)
        if isinstance(member, MatryoshkaHead) and size in member.mrl_dims:
            embeddings = embeddings[:, :size]
        return RoutedEmbedding(embeddings, name)

    def extract(
        self, wavs: Tensor, mode: str = "balanced", wav_lens: Tensor | None = None
    ) -> RoutedEmbedding:
        """As ``forward``, by speed: the smallest route if "fast", the largest if "accurate".

        "balanced" takes the middle one, of an even number the smaller of the two in the middle.
        """
        sizes = list(self.routes)
        modes = {"fast": sizes[0], "balanced": sizes[(len(sizes) - 1) // 2], "accurate": sizes[-1]}
        if mode not in modes:
            raise ValueError(f"mode must be one of {list(modes)}, got {mode!r}")
        return self(wavs, modes[mode], wav_lens)

    @staticmethod
    def score(enrol: RoutedEmbedding, test: RoutedEmbedding) -> Tensor:
        """Cosines (B,) of embeddings (B, D), pair by pair; one of the two may be (1, D).

        Raises
        ------
        ValueError
            If the results are of different members, or prefixes of different sizes of one.
        """
        if enrol.member != test.member:
            raise ValueError(
                f"cannot score an embedding of {enrol.member!r} against one of {test.member!r}: "
                "their dimensions are unrelated; embed both utterances with the same size or mode"
            )
        sizes = enrol.embeddings.shape[-1], test.embeddings.shape[-1]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"cannot score a prefix of {sizes[0]} dimensions against one of {sizes[1]} of "
                f"{enrol.member!r}; embed both utterances with the same size or mode"
            )
        return F.cosine_similarity(enrol.embeddings, test.embeddings, dim=-1)

    def train(self, mode: bool = True) -> MultiModelEnsemble:
        """Stay in eval mode, whatever ``mode``: members are not trained here."""
        return super().train(False)

    def _load(self, name: str) -> nn.Module:
        member = self._loaders[name]()
        if not isinstance(member, nn.Module):
            raise TypeError(f"models[{name!r}] must give an nn.Module, got {type(member).__name__}")
        device: Any = self._device.device
        self._members[name] = member.to(device).eval()
        return member


def _loader(name: str, source: Any) -> Callable[[], nn.Module]:
    """A function that gives the member; refuses what cannot be one before it is needed."""
    released = released_names("vox2")
    if isinstance(source, str) and source in released:
        return lambda: load_released(source)
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise ValueError(
                f"models[{name!r}] is {str(source)!r}, which is neither a file nor a release's "
                f"name ({', '.join(released)})"
            )
        return lambda: load_checkpoint(source)
    if callable(source):
        return source
    raise ValueError(
        f"models[{name!r}] must be an nn.Module, a release's name, a file or a function that "
        f"returns a module, got {type(source).__name__}"
    )
