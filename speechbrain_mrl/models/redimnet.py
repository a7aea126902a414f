"""ReDimNet speaker encoders, and the same encoders with a Matryoshka head.

This one file is everything that a published model needs: it is copied unchanged into the published
folder, so it imports only torch, torchaudio, speechbrain and the standard library.

Reference
---------
Yakovlev et al., Reshape Dimensions Network for Speaker Recognition, Interspeech 2024,
arXiv:2407.18223. Kusupati et al., Matryoshka Representation Learning, 2022, arXiv:2205.13147.
"""

from __future__ import annotations

import copy
import math
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Optional, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from speechbrain.augment.freq_domain import SpectrogramDrop
from speechbrain.utils.checkpoints import mark_as_transfer, register_checkpoint_hooks
from torch import Tensor, nn

SAMPLE_RATE = 16000  # Hz, that of every released model
N_FFT, WIN_LENGTH = 512, 400  # samples
MIN_SAMPLES = N_FFT // 2 + 1  # the shortest signal that reflect padding allows, and two frames
WIDGET_SAMPLES = 160  # 10 ms, the shortest recording that the Hub's widget must answer

# What the authors' constructor assumes where a checkpoint's model_config is silent.
CONFIG_DEFAULTS = {
    "F": 72,
    "C": 16,
    "block_1d_type": "att",
    "block_2d_type": "convnext_like",
    "stages_setup": [
        [1, 2, 1, [[3, 3]], 12],
        [2, 2, 1, [[3, 3]], 12],
        [1, 3, 1, [[3, 3]], 12],
        [2, 4, 1, [[3, 3]], 8],
        [1, 4, 1, [[3, 3]], 8],
        [2, 4, 1, [[3, 3]], 4],
    ],
    "group_divisor": 4,
    "out_channels": None,
    "embed_dim": 192,
    "num_classes": None,
    "class_dropout": 0.0,
    "feat_agg_dropout": 0.0,
    "head_activation": None,
    "hop_length": 160,
    "pooling_func": "ASTP",
    "feat_type": "pt",
    "global_context_att": False,
    "emb_bn": False,
    "spec_params": {},
    "return_all_outputs": False,
    "tf_optimized_arch": False,
}
SPEC_DEFAULTS = {
    "do_spec_aug": False,
    "norm_signal": False,
    "do_preemph": True,
    "spec_norm": "mn",
    "freq_mask_width": (0, 8),
    "time_mask_width": (0, 10),
    "num_apply_spec_aug": 1,
    "freq_start_bin": 0,
    "sample_rate": SAMPLE_RATE,
    "n_fft": N_FFT,
    "win_length": WIN_LENGTH,
    "f_min": 20.0,
    "f_max": 7600.0,
}
# Options of the authors' code that are refused unless they have one of these values.
SUPPORTED = {
    "block_1d_type": ("fc", "conv", "att", "conv+att"),
    "block_2d_type": (
        "convnext_like",
        "convnext_like_relu",
        "basic_resnet",
        "basic_resnet_fwse",
    ),
    "num_classes": (None,),
    "head_activation": (None,),
    "pooling_func": ("ASTP", "TSTP"),
    "feat_type": ("pt", "pt_mel"),
    "return_all_outputs": (False, None),
    "tf_optimized_arch": (False, None),
    "spec_norm": ("mn", "mvn"),
    "freq_start_bin": (0,),
    "sample_rate": (SAMPLE_RATE,),
    "n_fft": (N_FFT,),
}


def _preset(
    n_mels: int, channels: int, block_2d_type: str, group_divisor: int | None, stages: list[Any]
) -> dict[str, Any]:
    return {
        **CONFIG_DEFAULTS,
        "F": n_mels,
        "C": channels,
        "block_1d_type": "conv+att",
        "block_2d_type": block_2d_type,
        "stages_setup": [[s, n, e, [[3, 3]], red] for s, n, e, red in stages],
        "group_divisor": group_divisor,
        "hop_length": 240,
        "global_context_att": True,
    }


# Architectures for random initialisation. b0, b2 and b5 are those of the released checkpoints; b1,
# b3, b4 and b6 are a third party's (WeSpeaker's) and were never compared with a checkpoint. Of each
# stage there are stride, blocks, expansion and reduction.
# fmt: off
PRESETS = {
    "b0": _preset(60, 10, "basic_resnet", 1, [
        (1, 2, 1, 30), (2, 3, 2, 30), (1, 3, 3, 30), (2, 4, 2, 10), (1, 3, 1, 10)]),
    "b1": _preset(72, 12, "convnext_like", 8, [
        (1, 2, 1, None), (2, 3, 1, None), (3, 4, 1, 12), (2, 5, 1, 12), (2, 3, 1, 8)]),
    "b2": _preset(72, 16, "convnext_like", 4, [
        (1, 2, 1, 12), (2, 2, 1, 12), (1, 3, 1, 12), (3, 4, 1, 8), (1, 4, 1, 8), (2, 4, 1, 4)]),
    "b3": _preset(72, 16, "basic_resnet_fwse", 1, [
        (1, 6, 4, 32), (2, 6, 2, 32), (1, 8, 2, 32), (2, 10, 2, 16), (1, 10, 1, 16), (2, 8, 1, 16)]),
    "b4": _preset(72, 32, "basic_resnet_fwse", 1, [
        (1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)]),
    "b5": _preset(72, 32, "basic_resnet_fwse", 16, [
        (1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16)]),
    "b6": _preset(72, 32, "basic_resnet", 32, [
        (1, 4, 4, 32), (2, 6, 2, 32), (1, 6, 2, 24), (3, 8, 1, 24), (1, 8, 1, 16), (2, 8, 1, 16)]),
}
# fmt: on


# Front end


class TooShort(ValueError, RuntimeError):
    """A signal has fewer samples than give an embedding.

    A RuntimeError too, by which pyannote.audio finds out how many are needed.
    """


def check_wavs(wavs: Tensor, min_samples: int = MIN_SAMPLES) -> Tensor:
    """Waveforms as (B, T); refuses what is not a float signal of one channel.

    Arguments
    ---------
    wavs : torch.Tensor
        Float, 16 kHz, in [-1, 1]; (T,), (B, T) or (B, 1, T).
    min_samples : int
        The model's own.

    Returns
    -------
    torch.Tensor
        (B, T).

    Raises
    ------
    ValueError
        For another shape or type of numbers; ``TooShort`` for fewer than ``min_samples``.
    TypeError
        If it is no tensor.
    """
    if not isinstance(wavs, Tensor):
        raise TypeError(
            f"wavs must be a torch.Tensor, got {type(wavs).__name__}; torch.as_tensor makes it one"
        )
    if not wavs.is_floating_point():
        raise ValueError(f"wavs must be float in [-1, 1], got {wavs.dtype}; divide integers first")
    if wavs.ndim == 3 and wavs.shape[1] == 1:
        wavs = wavs.squeeze(1)
    if wavs.ndim == 1:
        wavs = wavs.unsqueeze(0)
    if wavs.ndim != 2 or wavs.shape[0] == 0:
        raise ValueError(
            f"wavs must be (T,), (B, T) or (B, 1, T), got {tuple(wavs.shape)}; "
            "average the channels of a stereo recording first"
        )
    if wavs.shape[1] < min_samples:
        raise TooShort(
            f"wavs must hold at least {min_samples} samples ({_milliseconds(min_samples)}), "
            f"got {wavs.shape[1]}; the signal is too short for an embedding"
        )
    return wavs


def _is_size(target_dim: object, mrl_dims: Iterable[int]) -> bool:
    """Whether it is one of the sizes, as an integer: 64.0 truncates nothing."""
    return isinstance(target_dim, int) and target_dim in mrl_dims


def _milliseconds(samples: int) -> str:
    return f"{1000 * samples // SAMPLE_RATE} ms at 16 kHz"


def sample_counts(
    wavs: Tensor,
    wav_lens: Tensor | None,
    min_samples: int = MIN_SAMPLES,
    training: bool = False,
) -> Tensor | None:
    """Samples of each utterance before padding, (B,); None where no utterance is padded.

    To look at ``wav_lens`` makes the host wait for a GPU, so that in training they are only limited
    to what is possible there. And whether utterances are padded is not asked where processes train
    together, for all of them must take the same way through BatchNorm: pass None for utterances of
    equal lengths.

    Raises
    ------
    ValueError
        If ``wav_lens`` is not (B,) in (0, 1], or leaves an utterance fewer than ``min_samples``.
    """
    if wav_lens is None:
        return None
    if wav_lens.shape != wavs.shape[:1]:
        raise ValueError(
            f"wav_lens must have shape ({wavs.shape[0]},) for wavs {tuple(wavs.shape)}, "
            f"got {tuple(wav_lens.shape)}"
        )
    total = wavs.shape[1]
    if training and wav_lens.device.type == "cuda":
        return (wav_lens.double() * total).round().long().clamp(min_samples, total)
    relative = wav_lens.tolist()
    if not all(-math.inf < n * total <= total + 0.5 for n in relative):
        raise ValueError(f"wav_lens must be relative lengths in (0, 1], got {relative}")
    counts = [min(round(n * total), total) for n in relative]
    if (shortest := min(counts)) < min_samples:
        raise TooShort(
            f"wavs[{counts.index(shortest)}] has {shortest} samples by its wav_lens and needs at "
            f"least {min_samples} ({_milliseconds(min_samples)}); leave so short an utterance out"
        )
    if shortest == total and not (training and _in_processes()):
        return None
    return torch.tensor(counts, device=wavs.device)


def _in_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


def valid_samples(wavs: Tensor, counts: Tensor | None) -> Tensor | None:
    """1 for a sample and 0 for padding, (B, 1, T); None where no utterance is padded."""
    if counts is None:
        return None
    positions = torch.arange(wavs.shape[1], device=wavs.device)
    return (positions < counts[:, None]).unsqueeze(1).float()


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """X with the padding frames at zero: what an utterance alone has past its end."""
    if mask is None:
        return x
    return x * (mask if x.ndim == 3 else mask.unsqueeze(3)).to(x.dtype)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over time of (B, C, T), padding left out, (B, C, 1)."""
    if mask is None:
        return x.mean(dim=-1, keepdim=True)
    dtype = torch.promote_types(x.dtype, mask.dtype)  # float16 sums of many frames overflow
    mean = masked(x, mask).sum(dim=-1, keepdim=True, dtype=dtype) / mask.sum(dim=-1, keepdim=True)
    return mean.to(x.dtype)


def _mean_and_variance(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over time of (B, C, T), padding left out, each (B, C, 1)."""
    mean = _mean(x, mask)
    count = x.shape[-1] if mask is None else mask.sum(dim=-1, keepdim=True)
    squares = masked((x - mean) ** 2, mask).sum(dim=-1, keepdim=True)
    return mean, squares / (count - 1)


class _StaysFloat(nn.Module):
    """A module whose tensors move between devices but stay as they are in a half-precision model.

    Powers of samples and sums of squares over time are in it, which float16 cannot hold.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Any:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


class PreEmphasis(nn.Module):
    """y[n] = x[n] - 0.97 x[n-1], the first sample reflected; (B, T) -> (B, T)."""

    flipped_filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flipped_filter", torch.tensor([[[-0.97, 1.0]]]))

    def forward(self, wavs: Tensor) -> Tensor:
        of_before, of_now = self.flipped_filter.flatten()  # a convolution takes five times as long
        before = torch.cat([wavs[:, 1:2], wavs[:, :-1]], dim=1)
        return of_now * wavs + of_before * before


class MelSpectrogram(torchaudio.transforms.MelSpectrogram):
    """torchaudio's of power 2, in a form that ``torch.compile`` takes into one graph."""

    def forward(self, waveform: Tensor) -> Tensor:
        """Waveforms (B, T) to (B, F, frames)."""
        spec = self.spectrogram
        spectrum = torch.stft(
            waveform,
            spec.n_fft,
            spec.hop_length,
            spec.win_length,
            spec.window,
            center=spec.center,
            pad_mode=spec.pad_mode,
            return_complex=True,
        )
        mel: Tensor = self.mel_scale(spectrum.abs().pow(2.0))
        return mel


class LogMel(_StaysFloat, nn.Module):
    """Log-mel spectrogram without its mean over time; padding does not change it.

    Arguments
    ---------
    n_mels : int
        F, number of mel bands between 20 and 7600 Hz.
    hop_length : int
        Samples between frames.
    do_spec_aug, norm_signal, do_preemph, spec_norm, freq_mask_width, time_mask_width, …
        A checkpoint's ``spec_params``; of ``freq_start_bin``, ``sample_rate`` and ``n_fft`` the
        defaults alone are supported.
    """

    smallest_deviation = 1e-6  # added to that of a signal before it is divided by it
    time_stride = 1  # of the network: divides the frames that it is given

    def __init__(
        self,
        n_mels: int,
        hop_length: int,
        do_spec_aug: bool,
        norm_signal: bool,
        do_preemph: bool,
        spec_norm: str,
        freq_mask_width: Iterable[int],
        time_mask_width: Iterable[int],
        num_apply_spec_aug: int = 1,
        freq_start_bin: int = 0,
        sample_rate: int = SAMPLE_RATE,
        n_fft: int = N_FFT,
        win_length: int = WIN_LENGTH,
        f_min: float = 20.0,
        f_max: float = 7600.0,
    ) -> None:
        super().__init__()
        self.hop_length, self.norm_signal, self.spec_norm = hop_length, norm_signal, spec_norm
        # Named and numbered like the release's state dict.
        preemphasis = PreEmphasis() if do_preemph else nn.Identity()
        mel = self._mel(n_mels, win_length, f_min, f_max)
        self.torchfbank = nn.Sequential(nn.Identity(), preemphasis, mel)
        self.drops = nn.ModuleList()
        if do_spec_aug:
            for dim, (low, high) in ((1, time_mask_width), (2, freq_mask_width)):
                self.drops.append(
                    SpectrogramDrop(
                        drop_length_low=low,
                        drop_length_high=high,
                        drop_count_low=num_apply_spec_aug,
                        drop_count_high=num_apply_spec_aug,
                        dim=dim,
                    )
                )

    def _mel(self, n_mels: int, win_length: int, f_min: float, f_max: float) -> nn.Module:
        """Power mel spectrogram of waveforms, (B, T) -> (B, F, frames)."""
        return MelSpectrogram(
            sample_rate=SAMPLE_RATE,
            n_fft=N_FFT,
            win_length=win_length,
            hop_length=self.hop_length,
            f_min=f_min,
            f_max=f_max,
            n_mels=n_mels,
            window_fn=torch.hamming_window,
            center=False,
        )

    def forward(self, wavs: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Waveforms (B, T), and samples of each (B,) or None, to features and their mask.

        Returns
        -------
        feats : torch.Tensor
            (B, F, 1 + T // hop_length), float32.
        mask : torch.Tensor or None
            (B, 1, 1 + T // hop_length), 1 for a frame of the utterance and 0 for padding.
        """
        with torch.autocast(wavs.device.type, enabled=False):
            return self._features(wavs.float(), counts)

    def _features(self, wavs: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.norm_signal:
            valid = valid_samples(wavs, counts)
            x = wavs.unsqueeze(1)
            mean = _mean(x, valid)
            deviation = _mean((x - mean) ** 2, valid).sqrt()
            wavs = ((x - mean) / (deviation + self.smallest_deviation)).squeeze(1)
        feats, mask = self._log_mel(self.torchfbank[1](wavs), counts)
        mean, variance = _mean_and_variance(feats, mask)
        feats = feats - mean
        if self.spec_norm == "mvn":
            feats = feats / (variance.sqrt() + 1e-8)
        if self.training:
            for drop in self.drops:
                feats = drop(feats.transpose(1, 2)).transpose(1, 2)
        return masked(feats, mask), mask

    def _log_mel(self, wavs: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        half, total = N_FFT // 2, wavs.shape[1]
        if counts is None:
            wavs, mask = F.pad(wavs.unsqueeze(1), (half, half), "reflect").squeeze(1), None
        else:
            # Each utterance is reflected at its own end, not at the batch's.
            last = counts[:, None] - 1
            positions = torch.arange(-half, total + half, device=wavs.device).abs()
            positions = (last - (last - positions).abs()).clamp_min(0)
            wavs = wavs.gather(1, positions)
            frames = torch.arange(1 + total // self.hop_length, device=wavs.device)
            mask = (frames <= counts[:, None] // self.hop_length).unsqueeze(1).float()

        return (self.torchfbank[2](wavs) + 1e-6).log(), mask  # (B, F, frames)


# Layers that know which frames are padding. A map is (B, C, T, F), or (B, F·C, T, 1) of the same
# numbers. Its memory is (B, T, F, C), which torch calls ``channels_last``: convolutions take their
# fast kernels there, and both shapes are free.
# A layer's output beyond an utterance's end is undefined; a layer that reads neighbouring frames
# clears it first.
# ``prepared`` is what a layer computes of its weights alone, and a copy for inference only once.

# weight (out, in, T, F), bias, groups
Kernel = tuple[Tensor, Optional[Tensor], int]  # noqa: UP045 (Python 3.9 runs this line)


def kernel(
    conv: Any,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Kernel:
    """Of a convolution: weight and bias for ``convolve``, after which channels are scaled and shifted."""
    weight, bias, groups = conv.weight, conv.bias, conv.groups
    weight = weight.unsqueeze(3) if weight.ndim == 3 else weight.transpose(2, 3)
    if scale is not None and shift is not None:
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
    if input_scale is not None:
        of_groups = input_scale.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        weight = weight * of_groups.reshape(len(weight), -1, 1, 1)
    return weight, bias, groups


def convolve(
    x: Tensor, kernel: Kernel, mask: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """A convolution that keeps the size, (B, C, T, F); padding is silent to it.

    ``plus`` is added to what comes out.
    """
    weight, bias, groups = kernel
    x = x if weight.shape[2] == 1 else masked(x, mask)
    x = F.conv2d(x, weight, bias, padding="same", groups=groups)
    if plus is not None:
        x += plus
    return x


def innermost(x: Tensor) -> Tensor:
    """Channels of a map last, as they lie in memory: (B, C, T, F) -> (B, T, F, C)."""
    return x.permute(0, 2, 3, 1)


def as_map(x: Tensor) -> Tensor:
    """(B, T, F, C), or (B, T, C) where F is 1, as a map (B, C, T, F)."""
    return (x.unsqueeze(2) if x.ndim == 3 else x).permute(0, 3, 1, 2)


class Conv1d(nn.Conv1d):
    """Conv1d that keeps the length, (B, C, T, 1)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding="same", groups=groups)

    def prepared(self) -> Kernel:
        return kernel(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return convolve(x, self.prepared(), mask)


class Conv2d(nn.Conv2d):
    """Conv2d that keeps the size, (B, C, T, F)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding="same", groups=groups, bias=bias
        )

    def prepared(self) -> Kernel:
        return kernel(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return convolve(x, self.prepared(), mask)


class StrideConv(nn.Conv2d):
    """Convolution over ``stride`` frequencies at a time, (B, c, T, f) -> (B, C, T, f / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, (stride, 1), (stride, 1))

    def prepared(self) -> Kernel:
        """That of one frequency which has the channels of all, for those lie side by side."""
        return self.weight.transpose(1, 2).flatten(1, 2).unsqueeze(3), self.bias, 1

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        joined = innermost(x).unflatten(2, (-1, self.stride[0])).flatten(3)
        return convolve(as_map(joined), self.prepared())


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of the channels by a BatchNorm in eval mode."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


class _SumOverProcesses(torch.autograd.Function):
    """A tensor summed over the processes of ``group``, its gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _SumOverProcesses.apply(gradient, ctx.group), None


def batch_norm(norm: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``norm(x)``; in training its statistics are those of the frames that are not padding.

    A function and no layer, for ``SyncBatchNorm.convert_sync_batchnorm`` replaces layers of any
    class. After it the statistics are those of all processes, also on a CPU, where torch refuses.

    Arguments
    ---------
    norm : torch.nn.BatchNorm1d, BatchNorm2d or SyncBatchNorm
        With running statistics.
    x : torch.Tensor
        (B, C), or a map (B, C, T, F).
    mask : torch.Tensor, optional
        (B, 1, T), 1 for a frame of the utterance and 0 for padding. None: no utterance is padded.

    Returns
    -------
    torch.Tensor
        As ``x``.
    """
    synchronized = isinstance(norm, nn.SyncBatchNorm)
    if not norm.training or (mask is None and not (synchronized and x.device.type == "cpu")):
        if x.ndim == 2 or synchronized:
            return norm(x)
        if norm.training:
            norm.num_batches_tracked.add_(1)
        statistics, weights = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
        return F.batch_norm(x, *statistics, *weights, norm.training, norm.momentum, norm.eps)

    def total(of: Tensor) -> Any:
        if synchronized and _in_processes():
            return _SumOverProcesses.apply(of, norm.process_group)
        return of

    dims, shape = [0, *range(2, x.ndim)], (-1,) + (1,) * (x.ndim - 2)
    data = x.to(torch.promote_types(x.dtype, torch.float32))
    count = data.new_full((1,), x[:, 0].numel())
    if mask is not None:
        count = mask.sum().view(1).to(data) * (x.shape[3] if x.ndim == 4 else 1)
    sums = total(torch.cat([masked(data, mask).sum(dims), count]))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    centred = data - mean.view(shape)
    variance = total(masked(centred, mask).square().sum(dims)) / count
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
        unbiased = variance * (count / (count - 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var), norm.momentum)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return (centred * scale.view(shape) + norm.bias.view(shape)).to(x.dtype)


class Sequence(nn.Sequential):
    """nn.Sequential that hands the mask to BatchNorm and its own layers; torch's others take none."""

    def prepared(self) -> dict[int, Kernel]:
        """Convolutions that have the BatchNorm behind them in them, where that does not train."""
        layers = list(self)
        return {
            i: kernel(conv, *affine(norm))
            for i, (conv, norm) in enumerate(zip(layers, layers[1:]))
            if _is_batch_norm(norm) and not norm.training and isinstance(conv, (Conv1d, Conv2d))
        }

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        joined = self.prepared()
        for i, layer in enumerate(self):
            if i in joined:
                x = convolve(x, joined[i], mask)
            elif _is_batch_norm(layer):
                x = x if i - 1 in joined else batch_norm(layer, x, mask)
            else:
                x = layer(x) if type(layer).__module__.startswith("torch.") else layer(x, mask)
        return x


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return as_map(super().forward(innermost(x)))


class To1d(nn.Module):
    """(B, C, T, F) -> (B, F·C, T, 1), frequency-major."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return as_map(innermost(x).flatten(2))


class To2d(nn.Module):
    """(B, f·c, T, 1) -> (B, c, T, f)."""

    def __init__(self, f: int, c: int) -> None:
        super().__init__()
        self.f, self.c = f, c

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return as_map(innermost(x).squeeze(2).unflatten(2, (self.f, self.c)))


class MapMix(nn.Module):
    """Sum of the earlier 1-D maps, weighted per channel by a softmax over the maps."""

    def __init__(self, n_maps: int, channels: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, n_maps, channels, 1), requires_grad=n_maps > 1)

    def prepared(self) -> tuple[Tensor, ...]:
        """Of each map (1, channels, 1, 1)."""
        return self.w.softmax(dim=1).unsqueeze(-1).unbind(dim=1)

    def forward(self, maps: list[Tensor], mask: Tensor | None = None) -> Tensor:
        if len(maps) == 1:
            return maps[0]
        weights = self.prepared()
        mixed = maps[0] * weights[0]
        for one, weight in zip(maps[1:], weights[1:]):
            mixed.addcmul_(one, weight.to(one.dtype))  # in place: a new map leaves the cache
        return mixed


class ConvNeXtBlock(nn.Module):
    """Parallel grouped convolutions, BatchNorm, activation, 1×1 convolution, plus the input."""

    def __init__(
        self,
        conv: type[nn.Module],
        norm: type[nn.Module],
        channels: int,
        kernel_sizes: Collection[Any],
        groups: int,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        width = channels * len(kernel_sizes)
        self.dwconvs = nn.ModuleList(
            [conv(channels, channels, size, groups=groups) for size in kernel_sizes]
        )
        self.norm = norm(width)
        self.act = activation()
        self.pwconv1: Any = conv(width, channels)

    def prepared(self) -> list[Kernel]:
        """Of the parallel convolutions; in eval mode with their share of BatchNorm in them."""
        if self.norm.training:
            return [kernel(conv) for conv in self.dwconvs]
        shares = zip(*(values.chunk(len(self.dwconvs)) for values in affine(self.norm)))
        return [kernel(conv, *share) for conv, share in zip(self.dwconvs, shares)]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = [convolve(x, one, mask) for one in self.prepared()]
        out = parts[0]
        if len(parts) > 1:  # joined as they lie in memory
            out = as_map(torch.cat([innermost(one) for one in parts], dim=3))
        if self.norm.training:
            out = batch_norm(self.norm, out, mask)
        return convolve(self.act(out), self.pwconv1.prepared(), plus=x)


class FrequencySE(nn.Module):
    """Squeeze-excitation with one gate per frequency, (B, C, T, F)."""

    def __init__(self, n_freqs: int, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(n_freqs, width)
        self.exitation = nn.Linear(width, n_freqs)  # spelt so in the release

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        pooled = _mean(x.mean(dim=1).transpose(1, 2), mask).squeeze(-1)  # (B, F)
        return x * self.gates(pooled)[:, None, None, :]

    def gates(self, pooled: Tensor) -> Tensor:
        """Factors of the frequencies, (…, F), from their means."""
        return self.exitation(self.squeeze(pooled).relu()).sigmoid()


class ResNetBlock(nn.Module):
    """Residual block with ReLU before its first BatchNorm, optionally squeeze-excited."""

    def __init__(
        self, channels: int, n_freqs: int, groups: int, pointwise: bool, squeeze_excite: bool
    ) -> None:
        super().__init__()

        def pw() -> nn.Module:
            return Conv2d(channels, channels) if pointwise else nn.Identity()

        self.conv1 = Conv2d(channels, channels, 3, groups=groups, bias=False)
        self.conv1pw = pw()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, groups=groups, bias=False)
        self.conv2pw = pw()
        self.bn2 = nn.BatchNorm2d(channels)
        width = min(64, max(channels, 32))
        self.se = FrequencySE(n_freqs, width) if squeeze_excite else None

    def prepared(self) -> tuple[list[Kernel], Tensor, list[Kernel]]:
        """In eval mode: convolutions with both norms in them, and a maximum between them.

        With the first norm's scale s, s · relu(y) + shift is max(|s| · y + floor, floor) times the
        sign of s. There, floor is the shift times that sign. So |s| and the floor go into
        the convolution before, and the sign into the one after, whose silent padding it leaves.
        """
        scale, shift = affine(self.bn1)
        sign = torch.ones_like(scale).copysign(scale)
        floor = shift * sign
        if isinstance(self.conv1pw, Conv2d):
            before = [kernel(self.conv1), kernel(self.conv1pw, scale.abs(), floor)]
            after = [
                kernel(self.conv2, input_scale=sign),
                kernel(self.conv2pw, *affine(self.bn2)),
            ]
        else:
            before = [kernel(self.conv1, scale.abs(), floor)]
            after = [kernel(self.conv2, *affine(self.bn2), input_scale=sign)]
        return before, floor.view(-1, 1, 1), after

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.bn1.training:
            out = batch_norm(self.bn1, self.conv1pw(self.conv1(x, mask)).relu(), mask)
            out = batch_norm(self.bn2, self.conv2pw(self.conv2(out, mask)), mask)
        else:
            before, floor, after = self.prepared()
            out = x
            for one in before:
                out = convolve(out, one, mask)
            out = torch.maximum(out, floor)
            for one in after:
                out = convolve(out, one, mask)
        if self.se is not None:
            out = self.se(out, mask)
        out += x
        return out.relu_()


class Block2d(nn.Module):
    """One 2-D block of the named type, under the release's name.

    ``kernel_sizes`` are those of the parallel convolutions of a ConvNeXt block.
    """

    def __init__(
        self,
        block_type: str,
        channels: int,
        n_freqs: int,
        group_divisor: int | None,
        kernel_sizes: Collection[Any] = (3,),
    ) -> None:
        super().__init__()
        groups = _groups(channels, group_divisor)
        if block_type.startswith("convnext_like"):
            activation = nn.ReLU if block_type.endswith("relu") else nn.GELU
            block: nn.Module = ConvNeXtBlock(
                Conv2d, nn.BatchNorm2d, channels, kernel_sizes, groups, activation
            )
        else:
            squeeze_excite = block_type.endswith("fwse")
            block = ResNetBlock(
                channels, n_freqs, groups, group_divisor is not None, squeeze_excite
            )
        self.conv_block = block

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.conv_block(x, mask)


class PositionalConv(nn.Module):
    """x + LayerNorm(depthwise convolution of 59 frames), (B, C, T, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv1d(channels, channels, 59, groups=channels)
        self.norm = LayerNorm(channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.norm(self.conv(x, mask))


class SelfAttention(nn.Module):
    """Four-head self-attention over the frames that are not padding, (B, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def prepared(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of queries, keys and values in one product."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([projection.weight for projection in projections])
        return weight, torch.cat([projection.bias for projection in projections])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = F.linear(x, *self.prepared()).unflatten(-1, (3, 4, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, 4, T, C / 4) each
        keys = None if mask is None else mask.bool().unsqueeze(1)  # (B, 1, 1, T)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, tanh GELU, Linear."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(channels, width)
        self.output_dense = nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x), approximate="tanh"))


class TransformerLayer(nn.Module):
    """Post-norm transformer layer on (B, C, T, 1)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(
                f"a time-context block has {channels} channels, which its 4 attention heads do "
                "not divide; check C, F and stages_setup in model_config"
            )
        self.attention = SelfAttention(channels)
        self.layer_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feed_forward = FeedForward(channels, width)
        self.final_layer_norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = innermost(x).squeeze(2)
        x = self.layer_norm(x + self.attention(x, mask))
        return as_map(self.final_layer_norm(x + self.feed_forward(x)))


class TimeContext(nn.Module):
    """x + expand(context(reduce(x))) on (B, C·F, T, 1)."""

    def __init__(self, block_type: str, channels: int, hidden: int) -> None:
        super().__init__()
        self.red_dim_conv = Sequence(Conv1d(channels, hidden), LayerNorm(hidden))

        def convnext(*kernel_sizes: int) -> nn.Module:
            return ConvNeXtBlock(Conv1d, nn.BatchNorm1d, hidden, kernel_sizes, hidden, nn.GELU)

        if block_type == "fc":
            layers = [
                Conv1d(hidden, 2 * hidden),
                LayerNorm(2 * hidden),
                nn.GELU(),
                Conv1d(2 * hidden, hidden),
            ]
        elif block_type == "conv":
            layers = [convnext(7, 15, 31) for _ in range(4)]
        elif block_type == "att":
            layers = [PositionalConv(hidden), TransformerLayer(hidden, 2 * hidden)]
        else:
            layers = [convnext(size) for size in (7, 19, 31, 59)]
            layers.append(TransformerLayer(hidden, hidden))
        self.tcm = Sequence(*layers)
        self.exp_dim_conv = Conv1d(hidden, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        context = self.tcm(self.red_dim_conv(x), mask)
        return convolve(context, self.exp_dim_conv.prepared(), plus=x)


def _groups(channels: int, group_divisor: int | None, in_channels: int | None = None) -> int:
    """Convolution groups of ``group_divisor`` channels each (1 group where it is None)."""
    if group_divisor is None:
        return 1
    groups = channels // group_divisor
    if groups == 0 or channels % groups or (in_channels or channels) % groups:
        raise ValueError(
            f"group_divisor {group_divisor} does not fit a layer of {in_channels or channels} to "
            f"{channels} channels; check C, stages_setup and group_divisor in model_config"
        )
    return groups


def spectrum_map(feats: Tensor) -> Tensor:
    """Features (B, 1, F, T) as a map (B, 1, T, F)."""
    return as_map(feats.permute(0, 3, 2, 1).contiguous())


class Backbone(nn.Module):
    """Features (B, 1, F, T) to frames (B, C·F or out_channels, T)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        f, c, divisor = config["F"], config["C"], config["group_divisor"]
        size = f * c
        self.stem = Sequence(Conv2d(1, c, 3), LayerNorm(c), To1d())
        for i, (stride, n_blocks, expansion, _, reduction) in enumerate(config["stages_setup"]):
            width = int(stride * c * expansion)
            layers = [
                MapMix(i + 1, size if i else 1),
                To2d(f, c),
                StrideConv(c, width, stride),
            ]
            f, c = f // stride, c * stride
            layers += [Block2d(config["block_2d_type"], width, f, divisor) for _ in range(n_blocks)]
            if expansion != 1:
                groups = _groups(c, divisor, width)
                layers.append(
                    Sequence(
                        Conv2d(width, c, 3, groups=groups),
                        nn.BatchNorm2d(c, eps=1e-6),
                        nn.GELU(),
                        Conv2d(c, c),
                    )
                )
            layers.append(To1d())
            if reduction is not None:
                layers.append(TimeContext(config["block_1d_type"], size, size // reduction))
            setattr(self, f"stage{i}", Sequence(*layers))
        self.n_stages = len(config["stages_setup"])
        self.dropout = nn.Dropout(config["feat_agg_dropout"])
        self.fin_wght1d = MapMix(self.n_stages + 1, size)
        out_channels = config["out_channels"]
        self.mfa = Sequence()
        if out_channels is not None:
            self.mfa = Sequence(Conv1d(size, out_channels), nn.BatchNorm1d(out_channels))

    def forward(self, feats: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = [self.stem(spectrum_map(feats), mask)]
        for i in range(self.n_stages):
            maps.append(self.dropout(getattr(self, f"stage{i}")(maps, mask)))
        return self.mfa(self.fin_wght1d(maps), mask).squeeze(3)


class ASTP(_StaysFloat, nn.Module):
    """Attentive statistics pooling, (B, C, T) -> (B, 2C)."""

    def __init__(self, channels: int, global_context_att: bool) -> None:
        super().__init__()
        self.global_context_att = global_context_att
        self.linear1 = Conv1d(channels * (3 if global_context_att else 1), 128)
        self.linear2 = Conv1d(128, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = None
        if self.global_context_att:
            bias = self.context_bias(*_mean_and_variance(x, mask))
        logits = self.logits(x, bias)
        if mask is not None:
            logits = logits.masked_fill(mask == 0, -torch.inf)
        weights = logits.transpose(1, 2).softmax(dim=1).transpose(1, 2)  # in place in memory
        mean = (weights * x).sum(dim=-1)
        variance = (weights * x**2).sum(dim=-1) - mean**2
        return torch.cat([mean, variance.clamp_min(1e-7).sqrt()], dim=1)

    def context_bias(self, mean: Tensor, variance: Tensor) -> Tensor:
        """What an utterance's own mean and variance, (B, C, 1) each, add to each of its frames."""
        context = torch.cat([mean, (variance + 1e-7).sqrt()], dim=1)
        return F.conv1d(context, self.linear1.weight[:, mean.shape[1] :], self.linear1.bias)

    def logits(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Weights before the softmax over time, of frames (B, C, T); None: no global context."""
        frames = as_map(x.transpose(1, 2))
        if bias is None:
            hidden = self.linear1(frames)
        else:
            weight = self.linear1.weight[:, : x.shape[1]]
            hidden = convolve(frames, (weight.unsqueeze(3), None, 1)) + bias.unsqueeze(3)
        return self.linear2(hidden.tanh()).squeeze(3)


class TSTP(_StaysFloat, nn.Module):
    """Mean and deviation over time, (B, C, T) -> (B, 2C)."""

    def __init__(self, channels: int, global_context_att: bool) -> None:
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mean, variance = _mean_and_variance(x, mask)
        return torch.cat([mean, (variance + 1e-7).sqrt()], dim=1).squeeze(-1)


# The encoder


def complete_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's ``model_config`` with every key, or an error that names what is unsupported.

    Arguments
    ---------
    model_config : dict
        Keyword arguments of the authors' model. Nothing in it is evaluated.

    Returns
    -------
    dict
        All keys of ``CONFIG_DEFAULTS``, ``spec_params`` complete too.

    Raises
    ------
    ValueError
        For an unknown key, or a value that this implementation does not reproduce.
    """
    config = check_config(model_config, CONFIG_DEFAULTS, SPEC_DEFAULTS, SUPPORTED)
    if config["hop_length"] >= MIN_SAMPLES:
        raise ValueError(
            f"model_config has hop_length={config['hop_length']}; it must be below {MIN_SAMPLES}, "
            "so that the shortest signal has two frames"
        )
    dropout = config["feat_agg_dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"model_config has feat_agg_dropout={dropout!r}; it must be in [0, 1)")
    check_stages(config)
    return config


def check_config(
    model_config: dict[str, Any],
    defaults: dict[str, Any],
    spec_defaults: dict[str, Any],
    supported: dict[str, tuple[Any, ...]],
) -> dict[str, Any]:
    """``model_config`` with every key of ``defaults``; checks what every ReDimNet has."""
    config = _merged("model_config", model_config, defaults)
    config["spec_params"] = _merged("spec_params", config["spec_params"], spec_defaults)
    for key, values in supported.items():
        value = config[key] if key in config else config["spec_params"][key]
        if not any(value is one or value == one for one in values):
            allowed = ", ".join(map(repr, values))
            raise ValueError(f"model_config has {key}={value!r}; supported: {allowed}")
    for key in ("F", "C", "embed_dim", "hop_length"):
        check_positive(key, config[key])
    for key in ("group_divisor", "out_channels"):
        if config[key] is not None:
            check_positive(key, config[key])
    for key in ("global_context_att", "emb_bn"):
        check_bool(key, config[key])
    for key in ("do_spec_aug", "norm_signal", "do_preemph"):
        check_bool(key, config["spec_params"][key])
    for key in ("freq_mask_width", "time_mask_width"):
        _check_range(key, config["spec_params"][key])
    if "n_fft" in spec_defaults:
        _check_mel(config["spec_params"])
    return config


def _merged(name: str, given: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{name} must be a mapping, got {type(given).__name__}")
    unknown = sorted(str(key) for key in set(given) - set(defaults))
    if unknown:
        raise ValueError(
            f"{name} has unknown keys {unknown}; known keys are {sorted(defaults)}, and a model "
            "with other options would not be reproduced exactly"
        )
    return {**defaults, **given}


def check_positive(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**16:
        raise ValueError(
            f"model_config has {key}={value!r}; it must be a positive integer below 65536"
        )


def check_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"model_config has {key}={value!r}; it must be true or false")


def _check_range(key: str, value: Any) -> None:
    ok = isinstance(value, (list, tuple)) and len(value) == 2
    if not ok or not all(type(x) is int for x in value) or not 0 <= value[0] < value[1]:
        raise ValueError(f"spec_params has {key}={value!r}; it must be two ascending integers")


def _check_mel(spec_params: dict[str, Any]) -> None:
    for key in ("num_apply_spec_aug", "win_length"):
        check_positive(key, spec_params[key])
    if spec_params["win_length"] > N_FFT:
        raise ValueError(
            f"spec_params has win_length={spec_params['win_length']}; it must be at most {N_FFT}"
        )
    edges = [spec_params["f_min"], spec_params["f_max"]]
    numbers = all(isinstance(f, (int, float)) and not isinstance(f, bool) for f in edges)
    if not numbers or not 0 <= edges[0] < edges[1] <= SAMPLE_RATE / 2:
        raise ValueError(
            f"spec_params has f_min={edges[0]!r} and f_max={edges[1]!r}; they must be ascending "
            f"frequencies in 0..{SAMPLE_RATE // 2} Hz"
        )


def check_stages(config: dict[str, Any]) -> None:
    """Raise a ValueError that names the stage unless ``stages_setup`` can be built."""
    stages, f, size = config["stages_setup"], config["F"], config["F"] * config["C"]
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ValueError(f"model_config has stages_setup={stages!r}; it must list the stages")
    c = config["C"]
    for i, stage in enumerate(stages):
        where = f"stages_setup[{i}]"
        if not isinstance(stage, (list, tuple)) or len(stage) != 5:
            raise ValueError(
                f"{where} is {stage!r}; it must be [stride, blocks, expansion, kernels, reduction]"
            )
        stride, n_blocks, expansion, _, reduction = stage
        if type(stride) is not int or stride not in (1, 2, 3) or f % stride:
            raise ValueError(
                f"{where} has stride {stride!r}; it must be 1, 2 or 3 and divide the {f} "
                "frequencies left there"
            )
        if type(n_blocks) is not int or not 0 <= n_blocks < 1000:
            raise ValueError(f"{where} has {n_blocks!r} blocks; it must be an integer, 0..999")
        f, c = f // stride, c * stride
        if isinstance(expansion, bool) or not isinstance(expansion, (int, float)):
            raise ValueError(f"{where} has expansion {expansion!r}; it must be a number")
        if not 1 <= c * expansion < 2**16:
            raise ValueError(f"{where} has expansion {expansion!r}, {c * expansion} channels")
        if reduction is not None and (type(reduction) is not int or not 1 <= reduction <= size):
            raise ValueError(f"{where} has reduction {reduction!r}; it must be 1..{size} or null")


def refuse_foreign_weights(
    model: nn.Module, state_dict: Mapping[str, Any], where: str | os.PathLike[str] = "state_dict"
) -> None:
    """Raise if ``state_dict`` is of another architecture than ``model``, or of an old release.

    Raises
    ------
    ValueError
        If a backbone tensor has another shape, or the keys are those of a release before 2024.11.
    """
    if any(str(key).startswith("backbone.inputs_weights") for key in state_dict):
        raise ValueError(
            f"{where} has the key names of releases before 2024.11; get today's file of the same "
            "model from https://github.com/IDRnD/ReDimNet/releases"
        )
    for key, own in model.state_dict().items():
        shape = getattr(state_dict.get(key), "shape", own.shape)
        if key.startswith("backbone.") and shape != own.shape:
            raise ValueError(
                f"{where} is of another ReDimNet ({key} is {tuple(shape)}, here "
                f"{tuple(own.shape)}), whose weights cannot be transferred because no channel of "
                "one network corresponds to one of the other; to join models use distillation "
                "(train_distilled_mrl), progressive expansion (expand_model) or routing "
                "(MultiModelEnsemble)"
            )


_Model = TypeVar("_Model", bound="ReDimNet")


class ReDimNet(nn.Module):
    """ReDimNet speaker encoder: waveforms to embeddings, state-dict keys as released.

    An utterance's embedding does not depend on the rest of its batch: with ``wav_lens``, padding
    changes nothing (convolutions, attention, pooling and the front end all leave it out).

    Arguments
    ---------
    **model_config
        A checkpoint's own ``model_config``; see ``complete_config``.

    Reference
    ---------
    Yakovlev et al., Reshape Dimensions Network for Speaker Recognition, Interspeech 2024,
    arXiv:2407.18223.

    Example
    -------
    >>> model = ReDimNet.from_config(PRESETS["b0"]).eval()
    >>> model(torch.zeros(2, 16000)).shape
    torch.Size([2, 192])
    """

    presets = PRESETS
    complete_config = staticmethod(complete_config)
    min_samples = MIN_SAMPLES

    def __init__(self, **model_config: dict[str, Any]) -> None:
        super().__init__()
        self.model_config = config = self.complete_config(model_config)
        self.embed_dim = config["embed_dim"]
        channels = self._add_network(config)
        pool = {"ASTP": ASTP, "TSTP": TSTP}[config["pooling_func"]]
        self.pool = pool(channels, config["global_context_att"])
        self.bn = nn.BatchNorm1d(2 * channels)
        self.linear = nn.Linear(2 * channels, self.embed_dim)
        self.bn2 = nn.BatchNorm1d(self.embed_dim) if config["emb_bn"] else None

    def _add_network(self, config: dict[str, Any]) -> int:
        """Make ``backbone`` and ``spec``; returns the channels that are pooled."""
        self.backbone: nn.Module = Backbone(config)
        self.spec = LogMel(config["F"], config["hop_length"], **config["spec_params"])
        return int(config["out_channels"] or config["C"] * config["F"])

    @classmethod
    def from_config(cls: type[_Model], model_config: dict[str, Any]) -> _Model:
        """Random weights in the architecture of a checkpoint's ``model_config``.

        Raises
        ------
        ValueError
            For an unknown key, or a value that this implementation does not reproduce.
        """
        return cls(**cls.complete_config(model_config))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, but weights of another ReDimNet are refused with the reason.

        Raises
        ------
        ValueError
            If the weights are of another architecture, or of a release before 2024.11.
        RuntimeError
            For anything else that does not fit.
        """
        refuse_foreign_weights(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Embeddings of waveforms, not length-normalised.

        Arguments
        ---------
        wavs : torch.Tensor
            Float, 16 kHz, in [-1, 1]; (T,), (B, T) or (B, 1, T), at least 257 samples.
        wav_lens : torch.Tensor, optional
            Lengths relative to T, in (0, 1], (B,). None: no utterance is padded.

        Returns
        -------
        torch.Tensor
            (B, embed_dim).

        Raises
        ------
        ValueError
            For another shape or type, or an utterance of fewer than 257 samples.
        """
        wavs = check_wavs(wavs, self.min_samples)
        counts = sample_counts(wavs, wav_lens, self.min_samples, self.training)
        feats, mask = self.spec(wavs, counts)
        frames = self.backbone(feats.unsqueeze(1).to(self.linear.weight.dtype), mask)
        with torch.autocast(wavs.device.type, enabled=False):  # sums of squares over time
            if mask is not None:
                mask = mask[..., -frames.shape[-1] :]
            pooled = self.pool(frames.float(), mask)  # (B, 2 * channels)
            embeddings = self.linear(batch_norm(self.bn, pooled.to(self.linear.weight.dtype)))
            return embeddings if self.bn2 is None else batch_norm(self.bn2, embeddings)


def check_mrl_dims(mrl_dims: Iterable[int], embed_dim: int) -> tuple[int, ...]:
    """``mrl_dims`` as a tuple, if it is strictly ascending, positive and ends in ``embed_dim``.

    The package's own rule is in ``prefixes.py``; this file travels without it.

    Raises
    ------
    ValueError
        Otherwise.
    """
    dims = tuple(mrl_dims)
    integers = all(isinstance(d, int) and not isinstance(d, bool) for d in dims)
    if not dims or not integers or dims[0] < 1 or list(dims) != sorted(set(dims)):
        raise ValueError(f"mrl_dims must be strictly ascending positive integers, got {mrl_dims!r}")
    if dims[-1] != embed_dim:
        raise ValueError(
            f"mrl_dims must end in embed_dim {embed_dim}, got {list(dims)}; "
            f"add {embed_dim} or set embed_dim to {dims[-1]}"
        )
    return dims


_Student = TypeVar("_Student", bound="MatryoshkaHead")
_ReDimNetStudent = TypeVar("_ReDimNetStudent", bound="MatryoshkaReDimNet")


def resized_rows(linear: nn.Linear, n_rows: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the first ``n_rows`` rows; rows that are missing are small and random."""
    weight, bias = linear.weight.data[:n_rows], linear.bias.data[:n_rows]
    n_new = n_rows - len(weight)
    small = 0.01 * weight.std() * torch.randn(n_new, weight.shape[1])
    return torch.cat([weight, small.to(weight)]), torch.cat([bias, bias.new_zeros(n_new)])


class MatryoshkaHead(nn.Module):
    """A network whose linear output layer gives an embedding that is truncated to its sizes.

    A subclass has a ``linear`` layer, the sizes ``mrl_dims`` that end in ``embed_dim``, and
    ``of_sizes``. ``min_samples`` are the fewest samples that it embeds. Beside this class it has a
    network, or ``_whole``.
    """

    linear: nn.Linear
    embed_dim: int
    mrl_dims: tuple[int, ...]
    min_samples: int

    def of_sizes(self: _Student, mrl_dims: tuple[int, ...]) -> _Student:
        """One of the same architecture with other sizes, before its weights are loaded."""
        raise NotImplementedError

    def check_target_dim(self, target_dim: int | None) -> None:
        """ValueError unless it is one of ``mrl_dims``, or None."""
        if target_dim is not None and not _is_size(target_dim, self.mrl_dims):
            raise ValueError(
                f"target_dim must be one of mrl_dims {list(self.mrl_dims)}, got {target_dim!r}"
            )

    def forward(
        self,
        wavs: Tensor,
        wav_lens: Tensor | None = None,
        target_dim: int | None = None,
        return_all_dims: bool = False,
    ) -> Any:
        """Embeddings of waveforms, or their prefixes; not length-normalised.

        Arguments
        ---------
        wavs : torch.Tensor
            Float, 16 kHz, in [-1, 1]; (T,), (B, T) or (B, 1, T), at least ``min_samples``.
        wav_lens : torch.Tensor, optional
            Lengths relative to T, in (0, 1], (B,). None: no utterance is padded.
        target_dim : int, optional
            One of ``mrl_dims``: dimensions to return. None: all.
        return_all_dims : bool
            Return the prefix of every size instead.

        Returns
        -------
        torch.Tensor or dict
            (B, target_dim), or {d: (B, d)}. The prefixes are views of one embedding.

        Raises
        ------
        ValueError
            If ``target_dim`` is not one of ``mrl_dims``, or the signal is refused.
        """
        self.check_target_dim(target_dim)
        embeddings = self._whole(wavs, wav_lens)
        if return_all_dims:
            return {d: embeddings[:, :d] for d in self.mrl_dims}
        return embeddings[:, :target_dim]

    def _whole(self, wavs: Tensor, wav_lens: Tensor | None) -> Tensor:
        """All dimensions, (B, D): what the network that a subclass has beside this one gives."""
        embeddings: Tensor = super().forward(wavs, wav_lens)
        return embeddings

    @torch.no_grad()
    def rotate_head(self, matrix: Tensor, mean: Tensor | None = None) -> None:
        """Multiply the embedding's first k dimensions by ``matrix``, inside the linear layer.

        An orthogonal ``matrix`` without ``mean`` leaves every cosine of those k dimensions as it
        was. With the principal components as rows it sorts the dimensions by importance.

        Arguments
        ---------
        matrix : torch.Tensor
            (k, k), k at most ``embed_dim``.
        mean : torch.Tensor, optional
            (k,), subtracted from the dimensions first.
        """
        k = matrix.shape[0]
        if matrix.shape != (k, k) or k > self.embed_dim:
            raise ValueError(
                f"matrix must be square with at most {self.embed_dim} rows, "
                f"got {tuple(matrix.shape)}"
            )
        weight, bias = self.linear.weight, self.linear.bias
        matrix = matrix.to(weight.device, torch.float64)
        offset = bias[:k].double() if mean is None else bias[:k].double() - mean.to(matrix)
        weight[:k] = (matrix @ weight[:k].double()).to(weight.dtype)
        bias[:k] = (matrix @ offset).to(bias.dtype)


class MatryoshkaReDimNet(MatryoshkaHead, ReDimNet):
    """ReDimNet whose embedding's first d dimensions, d in ``mrl_dims``, are embeddings too.

    Arguments
    ---------
    embed_dim : int
        D, size of the whole embedding.
    mrl_dims : sequence of int
        Sizes of the prefixes, ascending, the last one ``embed_dim``.
    backbone : str or dict
        "b0" … "b6" for a preset architecture, or a checkpoint's ``model_config`` (its ``embed_dim``
        and ``emb_bn`` are replaced). The weights are random.

    Reference
    ---------
    Kusupati et al., Matryoshka Representation Learning, 2022, arXiv:2205.13147.

    Example
    -------
    >>> model = MatryoshkaReDimNet(embed_dim=128, mrl_dims=(64, 128), backbone="b0").eval()
    >>> {d: tuple(z.shape) for d, z in model(torch.zeros(16000), return_all_dims=True).items()}
    {64: (1, 64), 128: (1, 128)}
    """

    def __init__(
        self,
        embed_dim: int = 256,
        mrl_dims: Iterable[int] = (64, 128, 192, 256),
        backbone: str | dict[str, Any] = "b2",
    ) -> None:
        mrl_dims = check_mrl_dims(mrl_dims, embed_dim)
        if isinstance(backbone, str):
            if backbone not in self.presets:
                raise ValueError(
                    f"backbone must be one of {sorted(self.presets)}, got {backbone!r}"
                )
            backbone = self.presets[backbone]
        super().__init__(**{**backbone, "embed_dim": embed_dim, "emb_bn": False})
        self.mrl_dims = mrl_dims

    @classmethod
    def from_redimnet(
        cls: type[_ReDimNetStudent],
        redimnet: ReDimNet,
        embed_dim: int = 256,
        mrl_dims: Iterable[int] = (64, 128, 192, 256),
    ) -> _ReDimNetStudent:
        """A copy of ``redimnet`` with more dimensions: its own first, new small random ones after.

        Every tensor comes from ``redimnet``; a BatchNorm behind its linear layer is folded into it.

        Raises
        ------
        ValueError
            If ``embed_dim`` is smaller than that of ``redimnet``.
        """
        if embed_dim < redimnet.embed_dim:
            raise ValueError(
                f"embed_dim {embed_dim} is smaller than the {redimnet.embed_dim} dimensions of "
                f"the pretrained model; keep them and read a prefix: {embed_dim} may be in mrl_dims"
            )
        model = cls(embed_dim, mrl_dims, redimnet.model_config)
        state = {k: v for k, v in redimnet.state_dict().items() if not k.startswith("bn2.")}
        linear = copy.deepcopy(redimnet.linear)
        if redimnet.bn2 is not None:
            norm: Any = redimnet.bn2
            scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
            linear.weight.data *= scale[:, None]
            linear.bias.data = (linear.bias.data - norm.running_mean) * scale + norm.bias.data
        state["linear.weight"], state["linear.bias"] = resized_rows(linear, embed_dim)
        model.load_state_dict(state)
        return model

    def of_sizes(self: _ReDimNetStudent, mrl_dims: tuple[int, ...]) -> _ReDimNetStudent:
        """Random weights in the same architecture."""
        return type(self)(mrl_dims[-1], mrl_dims, self.model_config)


# The parts of a published model, under the names that SpeechBrain's EncoderClassifier calls


def check_state_dict(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, list[str]]:
    """What keeps ``state_dict`` from filling every tensor of ``module``, by kind of problem.

    Example
    -------
    >>> state_dict = {"weight": torch.ones(2, 3), "scale": torch.ones(1)}
    >>> check_state_dict(nn.Linear(3, 2), state_dict)
    {'missing': ['bias'], 'unexpected': ['scale']}
    """
    expected, shapes, types, broken = module.state_dict(), [], [], []
    for key in sorted(expected.keys() & state_dict.keys()):
        value, own = state_dict[key], expected[key]
        if not isinstance(value, Tensor) or value.shape != own.shape:
            shapes.append(f"{key} {tuple(getattr(value, 'shape', ()))}")
        elif _kind(value) != _kind(own):
            types.append(f"{key} {value.dtype}")
        elif not value.to(own.dtype).isfinite().all():
            broken.append(key)
    problems = {
        "missing": sorted(set(expected) - set(state_dict)),
        "unexpected": sorted(map(str, set(state_dict) - set(expected))),
        "of another shape": shapes,
        "of another type": types,
        "not finite": broken,
    }
    return {what: keys for what, keys in problems.items() if keys}


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.layout, tensor.is_meta


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint file holds, tensors and plain settings; runs no code of it.

    Raises
    ------
    ValueError
        If it holds anything else, or is damaged, as far as its format has checksums. That of
        ``torch.save`` has them since torch 1.6, but torch does not check them.
    """
    with open(path, "rb") as file:
        try:
            if file.read(2) == b"PK":
                with zipfile.ZipFile(file) as archive:
                    if (record := archive.testzip()) is not None:
                        raise ValueError(f"the checksum of {record} is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # many types, for damaged files and for unsafe pickles
            raise ValueError(
                f"{path} is damaged or holds more than tensors and settings "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
                "delete it and load it again from a source that you trust"
            ) from error


@register_checkpoint_hooks
class StrictlyLoaded(nn.Module):
    """A module whose published weights load completely or not at all.

    SpeechBrain's own loading only warns about a missing key and leaves random weights there.
    """

    @mark_as_transfer
    def load_published(self, path: str | os.PathLike[str]) -> None:
        """Load a file of tensors, float16 or float32; ValueError lists the keys that do not fit."""
        state_dict = read_tensors(path)
        if problems := check_state_dict(self, state_dict):
            raise ValueError(
                f"{path} does not fit {type(self).__name__}: "
                + "; ".join(f"{len(keys)} {what}: {keys}" for what, keys in problems.items())
                + ". Fetch the model again, with all files of one revision"
            )
        self.load_state_dict(state_dict)


class WaveformInput(nn.Module):
    """``compute_features``: any recording as (B, T).

    SpeechBrain does not tell this step the utterances' lengths, on which every feature depends, so
    the features themselves are computed by ``EmbeddingModel``.

    Arguments
    ---------
    min_samples : int
        The fewest that the network accepts.

    Example
    -------
    >>> inputs = WaveformInput()
    >>> inputs(torch.zeros(1, 16000, 2)).shape
    torch.Size([1, 16000])
    """

    def __init__(self, min_samples: int = MIN_SAMPLES) -> None:
        super().__init__()
        self.min_samples = min_samples

    def forward(self, wavs: Tensor) -> Tensor:
        """(T,), (B, T), or channels along the shorter side of (B, T, channels), which are averaged.

        ``TooShort`` for less than 10 ms. What is longer than that, but shorter than the network
        accepts, is repeated.
        """
        if isinstance(wavs, Tensor) and wavs.ndim == 3:
            wavs = wavs.mean(dim=1 if wavs.shape[1] < wavs.shape[2] else 2)
        wavs = check_wavs(wavs, min(WIDGET_SAMPLES, self.min_samples))
        if wavs.shape[1] < self.min_samples:
            wavs = wavs.repeat(1, -(-self.min_samples // wavs.shape[1]))[:, : self.min_samples]
        return wavs


class SilentPadding(nn.Module):
    """``mean_var_norm``: zeros after each utterance's end; the network normalises the features.

    Example
    -------
    >>> SilentPadding()(torch.ones(2, 4), torch.tensor([1.0, 0.5]))
    tensor([[1., 1., 1., 1.],
            [1., 1., 0., 0.]])
    """

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        ends = (wav_lens.double() * wavs.shape[1]).round().unsqueeze(1)
        padding = torch.arange(wavs.shape[1], device=wavs.device) >= ends
        return wavs.masked_fill(padding, 0.0)


class OfOneSize(StrictlyLoaded, MatryoshkaHead):
    """A network that gives embeddings of the size ``target_dim``, as SpeechBrain calls it."""

    target_dim: int | None

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Embeddings (B, 1, target_dim). A ``wav_lens`` of one element holds for every utterance.

        An utterance of zeros, nobody's voice, has an embedding of zeros, which scores 0 with any
        other.
        """
        if wav_lens is not None:
            wav_lens = wav_lens.expand(len(wavs))
        embeddings = super().forward(wavs, wav_lens, self.target_dim)
        is_sound = wavs.reshape(len(embeddings), -1).any(dim=1, keepdim=True)
        return (embeddings * is_sound).unsqueeze(1)


class EmbeddingModel(OfOneSize, MatryoshkaReDimNet):
    """``embedding_model``: waveforms to embeddings of one size, (B, 1, target_dim).

    Arguments
    ---------
    model_config : dict
        Architecture; see ``complete_config``.
    mrl_dims : sequence of int
        Sizes that the model was trained for, ascending, the last one ``embed_dim``.
    target_dim : int, optional
        One of ``mrl_dims``: dimensions to return. None: all.

    Example
    -------
    >>> model = EmbeddingModel(PRESETS["b0"], mrl_dims=(64, 192), target_dim=64).eval()
    >>> model(torch.zeros(2, 16000)).shape
    torch.Size([2, 1, 64])
    """

    def __init__(
        self, model_config: dict[str, Any], mrl_dims: Iterable[int], target_dim: int | None = None
    ) -> None:
        super().__init__(model_config["embed_dim"], mrl_dims, model_config)
        self.check_target_dim(target_dim)
        self.target_dim = target_dim


class PrefixSpeakerClassifier(StrictlyLoaded, nn.Module):
    """``classifier``: log-posteriors of the speakers, from the cosines of the first dimensions.

    Arguments
    ---------
    embed_dim : int
        D, size of the speakers' vectors.
    n_classes : int
        C, number of speakers. 0: a model that was published without speakers.
    target_dim : int, optional
        Dimensions that are compared, 1..D. None: all.
    scale : float
        What the cosines are multiplied by before the softmax.

    Example
    -------
    >>> classifier = PrefixSpeakerClassifier(embed_dim=2, n_classes=2, target_dim=1, scale=10.0)
    >>> classifier.weight.data = torch.tensor([[1.0, 5.0], [-1.0, 5.0]])
    >>> classifier(torch.tensor([[[2.0, 0.0]]])).exp().detach()
    tensor([[[1.0000e+00, 2.0612e-09]]])
    """

    def __init__(
        self, embed_dim: int, n_classes: int, target_dim: int | None = None, scale: float = 30.0
    ) -> None:
        super().__init__()
        if target_dim is not None and not _is_size(target_dim, range(1, embed_dim + 1)):
            raise ValueError(f"target_dim must be in 1..{embed_dim}, got {target_dim!r}")
        self.target_dim, self.scale = target_dim, scale
        self.weight = nn.Parameter(torch.zeros(n_classes, embed_dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., d), d at least ``target_dim``, to log-posteriors (..., C)."""
        if len(self.weight) == 0:
            raise ValueError(
                "this model was published without speakers to choose from; "
                "compare embeddings instead (encode_batch, verify_batch)"
            )
        speakers = F.normalize(self.weight[:, : self.target_dim], dim=-1)
        embeddings = F.normalize(embeddings[..., : self.target_dim], dim=-1)
        return (self.scale * embeddings @ speakers.T).log_softmax(dim=-1)


class LengthNorm(nn.Module):
    """``mean_var_norm_emb``: embeddings at unit length."""

    def forward(self, embeddings: Tensor, lens: Tensor | None = None) -> Tensor:
        return F.normalize(embeddings, dim=-1)
