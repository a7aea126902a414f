"""ReDimNet2 speaker encoders, which pool time inside the network.

What ReDimNet has too comes from ``redimnet.py`` beside it; both files are copied into a published
folder.

Reference
---------
Yakovlev and Okhotnikov, ReDimNet2: Scaling Speaker Verification via Time-Pooled Dimension
Reshaping, Interspeech 2026, arXiv:2603.11841.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .redimnet import (
    MIN_SAMPLES,
    N_FFT,
    SAMPLE_RATE,
    SPEC_DEFAULTS,
    SUPPORTED,
    WIN_LENGTH,
    Block2d,
    Conv1d,
    Conv2d,
    EmbeddingModel,
    Kernel,
    LayerNorm,
    LogMel,
    MapMix,
    MatryoshkaReDimNet,
    ReDimNet,
    Sequence,
    TimeContext,
    To1d,
    To2d,
    as_map,
    check_bool,
    check_config,
    check_positive,
    check_stages,
    innermost,
    masked,
    spectrum_map,
    valid_samples,
)

# What the authors' constructor assumes where a checkpoint's model_config is silent; ``causal`` must
# be given, for their default fails.
CONFIG_DEFAULTS = {
    "F": 72,
    "C": 24,
    "causal": False,
    "spec_in_channels": 1,
    "block_1d_type": "conv+att",
    "block_2d_type": "basic_resnet",
    "compress_tconvs": True,
    "return_2d_output": False,
    "fm_weigthing_type": "NC",
    "stages_setup": [
        [[1, 1], 2, 4, [[3, 3]], 24],
        [[2, 1], 3, 3, [[3, 3]], 24],
        [[1, 2], 4, 2, [[3, 3]], 24],
        [[2, 1], 5, 1, [[3, 3]], 24],
        [[1, 2], 4, 1, [[3, 3]], 24],
        [[2, 1], 3, 1, [[3, 3]], 24],
    ],
    "group_divisor": 1,
    "use_freq_pos_enc": False,
    "dual_agg": False,
    "agg_gnorm": False,
    "att_dos": None,
    "out_channels": None,
    "embed_dim": 192,
    "hop_length": 160,
    "pooling_func": "ASTP",
    "feat_type": "pt",
    "global_context_att": True,
    "emb_bn": False,
    "pad_right_samples": None,
    "before_pool_offset": None,
    "spec_params": {},
    "return_all_outputs": False,
    # Without effect in the authors' code, and never evaluated here.
    "num_classes": None,
    "feat_agg_dropout": 0.0,
    "head_activation": None,
}
SUPPORTED2: dict[str, tuple[Any, ...]] = {
    **{key: SUPPORTED[key] for key in ("block_1d_type", "block_2d_type", "pooling_func")},
    "causal": ("none",),
    "spec_in_channels": (1,),
    "fm_weigthing_type": ("NC",),
    "att_dos": (None, {}),
    "feat_type": ("tf", "tf_mel", "pt", "pt_mel"),
    "return_all_outputs": (False, None),
}
TF_PARAMS = ("do_spec_aug", "norm_signal", "do_preemph", "freq_mask_width", "time_mask_width")


def complete_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's ``model_config`` with every key, or an error that names what is unsupported.

    Raises
    ------
    ValueError
        For an unknown key, or a value that this implementation does not reproduce.
    """
    feat_type = model_config.get("feat_type") if isinstance(model_config, dict) else None
    of_tf = str(feat_type).startswith("tf")
    spec_defaults = {key: SPEC_DEFAULTS[key] for key in TF_PARAMS} if of_tf else SPEC_DEFAULTS
    of_pt = {key: SUPPORTED[key] for key in SUPPORTED if key in SPEC_DEFAULTS}
    supported = SUPPORTED2 if of_tf else {**SUPPORTED2, **of_pt}
    config = check_config(model_config, CONFIG_DEFAULTS, spec_defaults, supported)
    for key in ("compress_tconvs", "return_2d_output", "use_freq_pos_enc", "dual_agg", "agg_gnorm"):
        check_bool(key, config[key])
    for key in ("pad_right_samples", "before_pool_offset"):
        if config[key] not in (None, 0):
            check_positive(key, config[key])
    stages = config["stages_setup"]
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ValueError(f"model_config has stages_setup={stages!r}; it must list the stages")
    for i, stage in enumerate(stages):
        _check_strides_and_kernels(f"stages_setup[{i}]", stage, config["block_2d_type"])
    check_stages({**config, "stages_setup": [[stage[0][0], *stage[1:]] for stage in stages]})
    return config


def _check_strides_and_kernels(where: str, stage: Any, block_2d_type: str) -> None:
    if not _is_list(stage, 5) or not _is_list(stage[0], 2):
        raise ValueError(
            f"{where} is {stage!r}; it must be "
            "[[frequency stride, time stride], blocks, expansion, kernels, reduction]"
        )
    if type(stage[0][1]) is not int or not 1 <= stage[0][1] <= 16:
        raise ValueError(f"{where} has time stride {stage[0][1]!r}; it must be an integer, 1..16")
    if not block_2d_type.startswith("convnext"):
        return  # other blocks have 3×3 whatever is written there
    kernels = stage[3]
    sizes = kernels if isinstance(kernels, (list, tuple)) else []
    odd = [_is_list(k, 2) and all(type(n) is int and n % 2 and n > 0 for n in k) for k in sizes]
    if not odd or not all(odd):
        raise ValueError(
            f"{where} has kernel sizes {kernels!r}; they must be pairs of odd integers"
        )


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _preset(channels: int, out_channels: int | None, stages: list[Any]) -> dict[str, Any]:
    return {
        **CONFIG_DEFAULTS,
        "C": channels,
        "causal": "none",
        "return_2d_output": True,
        "stages_setup": [[[f, t], n, e, [[3, 3]], red] for f, t, n, e, red in stages],
        "out_channels": out_channels,
        "feat_type": "tf",
        "spec_params": {"norm_signal": True},
    }


# Architectures for random initialisation. redimnet2_b2 is that of the released checkpoint; the
# others are the authors' training recipes without ``agg_gnorm``, an option that the releases trained
# on VoxCeleb2 came before; none was compared with a checkpoint, but their parameters are as many
# millions as published, to one decimal.
_WIDE = [(1, 1, 2, 4), (2, 1, 3, 3), (1, 2, 4, 2), (2, 1, 5, 1), (1, 2, 4, 1), (2, 1, 3, 1)]
_NARROW = [(f, t, n, 1 if i else 2) for i, (f, t, n, _) in enumerate(_WIDE)]


def _reduced(stages: list[Any], *reductions: int) -> list[Any]:
    return [(*stage, reduction) for stage, reduction in zip(stages, reductions)]


# fmt: off
PRESETS = {
    "redimnet2_b0": _preset(12, 64, _reduced(_NARROW, 36, 36, 36, 36, 18, 18)),
    "redimnet2_b1": _preset(16, None, _reduced(_NARROW, 32, 32, 32, 32, 16, 16)),
    "redimnet2_b2": _preset(20, None, [
        (1, 1, 2, 2, 40), (2, 1, 3, 1, 30), (1, 2, 4, 1, 30), (3, 1, 5, 1, 20), (1, 2, 4, 1, 20),
        (2, 1, 3, 1, 10)]),
    "redimnet2_b3": _preset(24, None, _reduced(_WIDE, 24, 24, 24, 24, 24, 24)),
    "redimnet2_b4": _preset(32, None, _reduced(_WIDE, 24, 24, 24, 24, 24, 24)),
    "redimnet2_b5": _preset(48, 256, _reduced(_WIDE, 48, 48, 48, 48, 32, 32)),
    "redimnet2_b6": _preset(64, 224, [
        (1, 1, 3, 3, 64), (2, 1, 4, 2, 64), (1, 2, 5, 2, 48), (2, 1, 5, 1, 48), (1, 2, 4, 0.75, 32),
        (2, 1, 3, 0.5, 24)]),
}
# fmt: on


# Front end


class TfMel(nn.Module):
    """Mel spectrogram as the authors' TensorFlow front end has it, (B, T) -> (B, F, frames).

    Arguments
    ---------
    n_mels : int
        F, number of mel bands between 20 and 7600 Hz.
    hop_length : int
        Samples between frames.
    """

    real_kernel_pt: Tensor
    image_kernel_pt: Tensor
    melbanks_pt: Tensor

    def __init__(self, n_mels: int, hop_length: int) -> None:
        super().__init__()
        self.hop_length = hop_length
        bins = N_FFT // 2  # without the last one
        samples = torch.arange(WIN_LENGTH, dtype=torch.float64)
        angles = torch.outer(torch.arange(bins).double(), samples) * (2 * torch.pi / N_FFT)
        window = torch.hamming_window(WIN_LENGTH, periodic=False, dtype=torch.float64)
        mels = _mel(torch.linspace(0.0, SAMPLE_RATE / 2, bins, dtype=torch.float64)).unsqueeze(1)
        low, high = _mel(torch.tensor([20.0, 7600.0], dtype=torch.float64)).tolist()
        edges = torch.linspace(low, high, n_mels + 2, dtype=torch.float64)
        rise = (mels - edges[:-2]) / (edges[1:-1] - edges[:-2])
        fall = (edges[2:] - mels) / (edges[2:] - edges[1:-1])
        # Under the release's names and shapes, of convolutions.
        for name, table in (
            ("real_kernel_pt", (angles.cos() * window).unsqueeze(1)),
            ("image_kernel_pt", (angles.sin() * window).unsqueeze(1)),
            ("melbanks_pt", rise.minimum(fall).clamp_min(0.0).T.unsqueeze(2)),
        ):
            self.register_buffer(name, table.float().contiguous())

    def forward(self, wavs: Tensor) -> Tensor:
        """Energies of the bands, each at least 1e-8."""
        frames = wavs.unfold(1, WIN_LENGTH, self.hop_length)  # (B, frames, window)
        real, image = (frames @ k.squeeze(1).T for k in (self.real_kernel_pt, self.image_kernel_pt))
        power = (real.square() + image.square()).clamp(1e-8, 1e8)
        return (self.melbanks_pt.squeeze(2) @ power.transpose(1, 2)).clamp(1e-8, 1e8)


def _mel(hertz: Tensor) -> Tensor:
    return 2595.0 * (1.0 + hertz / 700.0).log10()


class TfLogMel(LogMel):
    """``LogMel`` of the feature type "tf"; it knows no ``spec_norm``."""

    smallest_deviation = 1e-8

    def _mel(self, n_mels: int, win_length: int, f_min: float, f_max: float) -> nn.Module:
        return TfMel(n_mels, self.hop_length)

    def _log_mel(self, wavs: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        margin, mask = self.hop_length // 2, None
        wavs = _silent_beyond(wavs, counts)
        feats = (self.torchfbank[2](F.pad(wavs, (margin, margin))) + 1e-8).log()
        if counts is not None:
            frames = (counts + 2 * margin - WIN_LENGTH) // self.hop_length + 1
            mask = _frame_mask(frames, feats)
        return feats, mask


def _silent_beyond(wavs: Tensor, counts: Tensor | None) -> Tensor:
    """Waveforms (B, T), zero from each utterance's end on."""
    return masked(wavs.unsqueeze(1), valid_samples(wavs, counts)).squeeze(1)


def _frame_mask(frames: Tensor, feats: Tensor) -> Tensor:
    """(B, 1, T), 1 for each of an utterance's first ``frames``, (B,), of ``feats``, (B, F, T)."""
    positions = torch.arange(feats.shape[-1], device=feats.device)
    return (positions < frames[:, None]).unsqueeze(1).to(feats.dtype)


class _WholeStrides:
    """A front end that gives each utterance as many frames as the network's time stride divides."""

    time_stride = 1  # of the network
    pad_right_samples = 0

    def _features(self, wavs: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.pad_right_samples:
            wavs = F.pad(_silent_beyond(wavs, counts), (0, self.pad_right_samples))
            counts = None if counts is None else counts + self.pad_right_samples
        feats, mask = super()._features(wavs, counts)  # type: ignore[misc]
        # The mean over time, which is gone already, was that of all frames.
        feats = feats[..., : feats.shape[-1] // self.time_stride * self.time_stride]
        if mask is not None:
            frames = mask.sum(dim=(1, 2)).long() // self.time_stride * self.time_stride
            mask = _frame_mask(frames, feats)
            feats = masked(feats, mask)
        return feats, mask


class _Pt(_WholeStrides, LogMel):
    pass


class _Tf(_WholeStrides, TfLogMel):
    pass


# Layers


class PooledMapMix(MapMix):
    """``MapMix`` of maps from finest to coarsest in time; coarse frames are repeated."""

    def forward(self, maps: list[Tensor], mask: Tensor | None = None) -> Tensor:
        if len(maps) == 1:
            return maps[0]
        weights = self.prepared()
        mixed = maps[-1] * weights[-1]
        for one, weight in zip(maps[-2::-1], weights[-2::-1]):
            mixed = _repeated(mixed, one.shape[2])
            mixed = torch.addcmul(mixed, one, weight.to(mixed.dtype))
        return mixed


def _repeated(x: Tensor, frames: int) -> Tensor:
    """(B, C, T, 1) with each frame repeated to ``frames`` in all."""
    times = frames // x.shape[2]
    if times == 1:
        return x
    return as_map(innermost(x).expand(-1, -1, times, -1).flatten(1, 2))


class PooledConv(nn.Conv2d):
    """Convolution over blocks of frequencies and frames, (B, c, T, f) -> (B, C, T / p, f / s)."""

    def __init__(
        self, in_channels: int, out_channels: int, block: tuple[int, int], groups: int
    ) -> None:
        super().__init__(in_channels, out_channels, block, stride=block, groups=groups)

    def prepared(self) -> Kernel:
        weight, groups = self.weight, self.groups
        if groups > 1 and self.kernel_size == (1, 1):  # with groups torch takes 20 times as long
            weight = torch.block_diag(*weight.flatten(1).unflatten(0, (groups, -1)))
            weight, groups = weight[..., None, None], 1
        return weight.transpose(2, 3), self.bias, groups

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weight, bias, groups = self.prepared()
        return F.conv2d(x, weight, bias, stride=self.stride[::-1], groups=groups)


class FrequencyEncoding(nn.Module):
    """Adds to each frequency a vector of its own, (B, c, T, f)."""

    def __init__(self, f: int, c: int) -> None:
        super().__init__()
        self.freq_embedder = nn.Embedding(f, c)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.freq_embedder.weight.T.unsqueeze(1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of a 1-D map over its frames that are not padding, (B, C·F, T, 1)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        data = innermost(x.to(torch.promote_types(x.dtype, torch.float32))).squeeze(2)
        groups = data.unflatten(2, (self.num_groups, -1))  # (B, T, groups, F)
        if mask is None:
            variance, mean = torch.var_mean(groups, dim=(1, 3), correction=0, keepdim=True)
            centred = groups - mean
        else:
            mask = mask.unsqueeze(3).transpose(1, 2)  # (B, T, 1, 1)
            count = mask.sum(dim=1, keepdim=True) * groups.shape[3]
            mean = (groups * mask).sum(dim=(1, 3), keepdim=True) / count
            centred = groups - mean
            variance = (centred.square() * mask).sum(dim=(1, 3), keepdim=True) / count
        normalised = (centred * (variance + self.eps).rsqrt()).flatten(2)
        return as_map(torch.addcmul(self.bias, normalised, self.weight)).to(x.dtype)


class Backbone(nn.Module):
    """Features (B, 1, F, T) to frames (B, ``out_channels``, T less ``before_pool_offset``).

    A map keeps the frames that its stage pooled: repeating them is left to who mixes it, for norms
    over all frames are the same before.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        f, c = config["F"], config["C"]
        size, n_maps = f * c, 1
        self.offset = config["before_pool_offset"] or 0

        def norm() -> list[nn.Module]:
            return [GroupNorm(config["C"], size)] if config["agg_gnorm"] else []

        self.stem = Sequence(Conv2d(1, c, 3), LayerNorm(c), To1d())
        self.stem_gnorm: nn.Module = Sequence()
        if config["agg_gnorm"]:
            self.stem_gnorm = GroupNorm(config["C"], size)
        self.pools: list[int] = []  # of each stage: frames that became one
        pool = 1
        for i, stage in enumerate(config["stages_setup"]):
            (stride, time_stride), n_blocks, expansion, kernel_sizes, reduction = stage
            width, pool = int(stride * c * expansion), pool * time_stride
            layers: list[nn.Module] = [PooledMapMix(n_maps, size), To2d(f, c)]
            if config["use_freq_pos_enc"]:
                layers.append(FrequencyEncoding(f, c))
            groups = math.gcd(c, width) if config["compress_tconvs"] else 1
            layers.append(PooledConv(c, width, (stride, pool), groups))
            f, c = f // stride, c * stride
            layers += [
                Block2d(config["block_2d_type"], width, f, config["group_divisor"], kernel_sizes)
                for _ in range(n_blocks)
            ]
            if expansion != 1:
                layers.append(Sequence(Conv2d(width, c), nn.BatchNorm2d(c, eps=1e-6)))
            layers.append(To1d())
            # Where the authors repeat frames, a layer that does nothing keeps the numbers of the rest.
            end = [nn.Identity(), *norm()]
            n_maps += 1
            if reduction is None:
                setattr(self, f"stage{i}", Sequence(*layers, *end))
            else:
                context = TimeContext(config["block_1d_type"], size, size // reduction)
                if config["dual_agg"]:
                    n_maps += 1
                    setattr(self, f"stage{i}_pre", Sequence(*layers))
                    setattr(self, f"stage{i}_1d", context)
                    setattr(self, f"stage{i}_up_2d", Sequence(nn.Identity(), *norm()))
                    setattr(self, f"stage{i}_up_1d", Sequence(*end))
                else:
                    setattr(self, f"stage{i}", Sequence(*layers, context, *end))
            self.pools.append(pool)
        self.fin_wght1d = PooledMapMix(n_maps, size)
        self.fin_to2d = To2d(f, c) if config["return_2d_output"] else nn.Identity()
        self.head: nn.Module = nn.Identity()
        self.out_channels = out_channels = config["out_channels"] or size
        if config["out_channels"] is not None:
            flat = not config["return_2d_output"]
            self.head = Conv1d(size, out_channels) if flat else Conv2d(c, out_channels)
            self.out_channels = out_channels * (1 if flat else f)

    def forward(self, feats: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = [self.stem_gnorm(self.stem(spectrum_map(feats), mask), mask)]
        for i, pool in enumerate(self.pools):
            # An utterance's frames are a multiple of each stride, so that no frame is half padding.
            pooled = None if mask is None else mask[..., ::pool]
            stage = getattr(self, f"stage{i}", None)
            if stage is not None:
                maps.append(stage(maps, pooled))
                continue
            before = getattr(self, f"stage{i}_pre")(maps, pooled)
            after = getattr(self, f"stage{i}_1d")(before, pooled)
            maps.append(getattr(self, f"stage{i}_up_2d")(before, pooled))
            maps.append(getattr(self, f"stage{i}_up_1d")(after, pooled))
        frames = self.head(self.fin_to2d(self.fin_wght1d(maps)))
        # channel-major, unlike every map before
        frames = frames.transpose(1, 2).flatten(2).transpose(1, 2)
        return frames[..., self.offset :]


class ReDimNet2(ReDimNet):
    """ReDimNet2 speaker encoder: waveforms to embeddings, state-dict keys as released.

    As ``ReDimNet``: an utterance's embedding does not depend on the rest of its batch.

    Arguments
    ---------
    **model_config
        A checkpoint's own ``model_config``; see ``complete_config``.

    Reference
    ---------
    Yakovlev and Okhotnikov, ReDimNet2: Scaling Speaker Verification via Time-Pooled Dimension
    Reshaping, Interspeech 2026, arXiv:2603.11841.

    Example
    -------
    >>> model = ReDimNet2.from_config(PRESETS["redimnet2_b0"]).eval()
    >>> model(torch.zeros(2, 16000)).shape
    torch.Size([2, 192])
    """

    presets = PRESETS
    complete_config = staticmethod(complete_config)

    def _add_network(self, config: dict[str, Any]) -> int:
        self.backbone: nn.Module = Backbone(config)
        of_tf = config["feat_type"].startswith("tf")
        params = {"spec_norm": "mn", **config["spec_params"]}
        self.spec: Any = (_Tf if of_tf else _Pt)(config["F"], config["hop_length"], **params)
        hop, stride = config["hop_length"], self.backbone.pools[-1]
        pad, offset = config["pad_right_samples"] or 0, self.backbone.offset
        self.spec.time_stride, self.spec.pad_right_samples = stride, pad
        # Two frames at least are pooled, for their deviation.
        others = stride * math.ceil((offset + 2) / stride) - 1
        if of_tf:
            needed = others * hop + WIN_LENGTH - 2 * (hop // 2)
        else:
            needed = max(MIN_SAMPLES, others * hop)
        self.min_samples = max(1, needed - pad)
        return self.backbone.out_channels


class MatryoshkaReDimNet2(MatryoshkaReDimNet, ReDimNet2):
    """``MatryoshkaReDimNet`` of a ReDimNet2: prefixes of its embedding are embeddings too.

    Arguments
    ---------
    embed_dim, mrl_dims
        As of ``MatryoshkaReDimNet``.
    backbone : str or dict
        "redimnet2_b0" … "redimnet2_b6", or a checkpoint's ``model_config``.

    Example
    -------
    >>> model = MatryoshkaReDimNet2(128, (64, 128), backbone="redimnet2_b0").eval()
    >>> {d: tuple(z.shape) for d, z in model(torch.zeros(16000), return_all_dims=True).items()}
    {64: (1, 64), 128: (1, 128)}
    """


class EmbeddingModel2(EmbeddingModel, MatryoshkaReDimNet2):
    """``EmbeddingModel`` of a ReDimNet2; arguments are the same."""
