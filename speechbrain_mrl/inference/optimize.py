"""The same embeddings in less time, in PyTorch alone: a copy of a model arranged for inference.

Maps are kept as (B, T, F, C), channels innermost, so that convolutions take their fast kernels, 1×1
convolutions over time are matrix products, and what turns (B, C, F, T) into (B, F·C, T) is free.
BatchNorm is folded into the layers around it, and stage weights are computed once. ``redimnet.py``
stays the reference that this file is tested against.
"""

import copy
import ctypes
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_mrl.models.redimnet import (
    Backbone,
    Block2d,
    Conv1d,
    Conv2d,
    ConvNeXtBlock,
    EmbeddingModel,
    FrequencySE,
    LayerNorm,
    MapMix,
    PositionalConv,
    ReDimNet,
    ResNetBlock,
    SelfAttention,
    Sequence,
    TimeContext,
    To1d,
    TransformerLayer,
)
from speechbrain_mrl.models.redimnet2 import EmbeddingModel2

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 2**31 - 1  # bytes, what mallopt can be told
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)  # the last of several processes


def prepare_cpu() -> None:
    """Let this process flush subnormal numbers and keep the memory of freed tensors.

    Subnormal numbers slow a CPU down. And glibc gives blocks of more than 32 MB back to the system
    when they are freed; each next one is mapped anew and cleared page by page, which a network pays
    at every layer whose maps are as large. After this call freed blocks (up to 2 GB) are used again;
    the process holds its peak until it ends. Other C libraries are left as they are.

    The recipes and ``python -m speechbrain_mrl`` call it. It concerns the whole process, so
    importing the package does not.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
        if set_option is not None:
            set_option(M_MMAP_THRESHOLD, LARGEST)
            set_option(M_TRIM_THRESHOLD, LARGEST)


MAP_BYTES = 16 * 2**20  # half of the largest block that glibc's malloc keeps: two are alive at once
PRECISIONS = ("float32", "bfloat16")


def optimize_for_inference(model: ReDimNet, precision: str = "float32") -> ReDimNet:
    """A copy of ``model`` that gives the same embeddings faster; for inference only.

    Differences are rounding errors, in float32 below 1e-4. The copy is called as the model is (``wav_lens``,
    ``target_dim``, ``return_all_dims``), always under ``torch.inference_mode``, and cannot be
    trained, saved or published: keep the model for that. On a CPU to make it takes up to a second, and
    its first call up to half a second more.

    Arguments
    ---------
    model : ReDimNet
        Or a subclass, or the ``mods.embedding_model`` of a published model. Is not changed; its
        later changes do not reach the copy.
    precision : str
        "float32", or "bfloat16" for the network between features and pooling, which stay float32.
        It pays on CPUs with AMX or AVX512-BF16, and on GPUs.

    Returns
    -------
    ReDimNet
        In eval mode, of the model's class and on its device. Its embeddings are float32.

    Raises
    ------
    TypeError
        If ``model`` is not a ReDimNet, or is such a copy already.
    ValueError
        For another precision.

    Example
    -------
    >>> from speechbrain_mrl import ReDimNetMRL
    >>> model = ReDimNetMRL(embed_dim=128, mrl_dims=(64, 128), backbone="b0").eval()
    >>> fast, wavs = optimize_for_inference(model), torch.rand(1, 16000)
    >>> bool((fast(wavs, target_dim=64) - model(wavs, target_dim=64)).abs().max() < 1e-4)
    True
    """
    fast: Any = _arranged(packaged(model), precision)
    on_cpu = fast.linear.weight.device.type == "cpu"  # measured there alone
    if on_cpu and sys.version_info < (3, 14):  # from where on torch does not support tracing
        frames = 16 * fast.spec.time_stride
        fast.backbone = _Recorded(fast.backbone, fast.model_config["F"], frames)
    return fast


def _arranged(model: ReDimNet, precision: str) -> ReDimNet:
    """The copy of ``optimize_for_inference``, whose layers Python still calls one by one."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    fast: Any = copy.deepcopy(model)  # its layers become others
    fast.eval().float().requires_grad_(False)
    with torch.no_grad():
        fast.linear = _linear_after_norm(fast.linear, fast.bn)
        if fast.bn2 is not None:
            scale, shift = _affine(fast.bn2)
            fast.linear.weight.mul_(scale[:, None])
            fast.linear.bias.mul_(scale).add_(shift)
        fast.bn, fast.bn2 = nn.Identity(), None
        if isinstance(fast.backbone, Backbone):  # that of ReDimNet2 stays as it is
            fast.backbone = _Backbone(fast.backbone)
        tiny = torch.finfo(torch.float32).tiny
        for tensor in [*fast.parameters(), *fast.buffers()]:
            if tensor.is_floating_point():  # subnormal numbers slow a CPU down
                tensor.masked_fill_(tensor.abs() < tiny, 0.0)
    fast.backbone.to(getattr(torch, precision))
    fast.__class__ = _inference_class(type(model))
    return fast


def for_inference(encoder: Any, precision: str = "float32") -> Any:
    """``encoder`` as by ``optimize_for_inference`` if it is a ReDimNet; else itself.

    It is ready sooner and as fast in batches; clip by clip it is slower. What holds a ReDimNet is
    asked by its method ``for_inference(precision)``, if it has one.
    """
    own = getattr(encoder, "for_inference", None)
    if own is not None:
        return own(precision)
    try:
        model = packaged(encoder)
    except TypeError:  # another network, or such a copy
        return encoder
    return _arranged(model, precision)


def arrange(encoders: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The same encoders as they run best on a device: on a CPU each by ``for_inference``."""
    on_cpu = torch.device(device).type == "cpu"
    return {name: for_inference(one) if on_cpu else one for name, one in encoders.items()}


def packaged(model: nn.Module) -> ReDimNet:
    """``model`` itself, or if it is of a published folder's own code, the same of this package.

    Raises
    ------
    TypeError
        If it is neither, or a copy made for inference.
    """
    if isinstance(model, ReDimNet):
        if type(model).__module__ == __name__:
            raise TypeError("model is a copy made for inference; pass the model it was made of")
        return model
    of_package = {one.__name__: one for one in (EmbeddingModel, EmbeddingModel2)}
    travelled = of_package.get(type(model).__name__)
    if travelled is None or not hasattr(model, "model_config"):
        raise TypeError(
            f"model must be a ReDimNet, got {type(model).__name__}; of an EncoderClassifier, "
            "pass mods.embedding_model"
        )
    published: Any = model
    same = travelled(published.model_config, published.mrl_dims, published.target_dim)
    same.load_state_dict(model.state_dict())
    return same.eval().to(next(model.parameters()).device)


def batch_seconds_for(model: ReDimNet) -> float:
    """Seconds of audio, over all clips of a batch, up to which batches of ``model`` pay on a CPU.

    Beyond them the largest map passes 16 MB and leaves the processor's cache, and unless
    ``prepare_cpu`` was called, glibc's malloc asks the system for new memory at each operation,
    whose pages are cleared every time: a clip then costs more than alone. A single longer clip is
    right nevertheless. Of a copy in bfloat16, whose maps are half as large, twice as many.

    Example
    -------
    >>> from speechbrain_mrl.models.redimnet import PRESETS
    >>> [round(batch_seconds_for(ReDimNet.from_config(PRESETS[size]))) for size in ("b2", "b6")]
    [55, 7]
    """
    config = model.model_config
    size = config["F"] * config["C"]  # of a stage's input; channels grow as frequencies shrink
    expansion = max(stage[2] for stage in config["stages_setup"])
    frame_bytes = next(model.backbone.parameters()).element_size()
    frames = MAP_BYTES / (size * expansion * frame_bytes)
    return frames * config["hop_length"] / 16000


def _inference_class(base: Any) -> type[ReDimNet]:
    """A subclass of ``base`` under its name that runs in inference mode."""

    class Fast(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.training:
                raise RuntimeError("a copy made for inference cannot be trained; train its model")
            with torch.inference_mode():
                out = super().forward(*args, **kwargs)
            if isinstance(out, dict):
                whole = out[max(out)].clone()
                return {d: whole[:, :d] for d in out}
            return out.clone()  # a normal tensor, which may enter a trained head

        def train(self, mode: bool = True) -> Any:
            if mode:
                raise RuntimeError("a copy made for inference cannot be trained; train its model")
            return super().train(False)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("a copy made for inference is not saved; save the model instead")

    Fast.__name__ = Fast.__qualname__ = base.__name__
    return Fast


# Folding


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm in eval mode."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def _linear_after_norm(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """``linear(norm(x))`` as one layer."""
    scale, shift = _affine(norm)
    folded = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device)
    folded.weight.copy_(linear.weight * scale)
    folded.bias.copy_(linear.bias + linear.weight @ shift)
    return folded.requires_grad_(False)


# Layers on (B, T, F, C); padding: of clips of unequal lengths, or None. What a layer gives beyond a
# clip's end is anything: who hears neighbouring frames clears it first. A map (B, T, S), S = F·C, is
# the same memory.


class _Padding(NamedTuple):
    mask: Tensor  # (B, T, 1, 1), 1 for a frame of the clip
    shortest: int  # frames

    def clear(self, x: Tensor) -> None:
        """Zeros beyond the clips' ends, in place."""
        x[:, self.shortest :] *= self.mask[:, self.shortest :]


class _Conv(nn.Module):
    """A convolution that keeps the size, and a scale and shift of its channels folded in."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: Any, affine: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        weight, bias = conv.weight.detach(), conv.bias
        bias = None if bias is None else bias.detach()
        product = conv.kernel_size == (1,)  # over maps of one frequency
        if weight.ndim == 3:
            weight = weight.unsqueeze(2)  # (out, in, F = 1, T)
        if affine is not None:
            scale, shift = affine
            weight = weight * scale.view(-1, 1, 1, 1)
            bias = shift if bias is None else shift + bias * scale
        weight = weight.transpose(2, 3)  # (out, in, T, F)
        self.groups = conv.groups
        self.padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        if product:
            weight = weight[:, :, 0, 0].contiguous()
        else:
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        if padding is not None and self.padding[0]:
            padding.clear(x)
        x = x.permute(0, 3, 1, 2)  # (B, C, T, F), channels last in memory
        out = F.conv2d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)
        return out.permute(0, 2, 3, 1).contiguous()


class _Stride(nn.Module):
    """Convolution over ``stride`` neighbouring frequencies: a matrix product."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: Any) -> None:
        super().__init__()
        width, channels, self.stride, _ = conv.weight.shape
        weight = conv.weight.detach()[..., 0].transpose(1, 2).reshape(width, -1)
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", conv.bias.detach().clone())

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        b, t, f, c = x.shape
        x = x.reshape(b, t, f // self.stride, self.stride * c)
        return F.linear(x, self.weight, self.bias)


class _ResNet(nn.Module):
    """``ResNetBlock``, its first BatchNorm and the activation before it one maximum.

    With the norm's scale s and shift, s · relu(y) + shift is max(|s| · y + floor, floor) times the
    sign of s, where floor is the shift times that sign. So |s| and the floor go into the convolution
    before it, and the sign into the one after, whose zero padding it does not change.
    """

    floor: Tensor

    def __init__(self, block: ResNetBlock) -> None:
        super().__init__()
        scale, shift = _affine(block.bn1)
        sign = torch.where(scale < 0, -1.0, 1.0)
        self.register_buffer("floor", shift * sign)
        before, after = (scale.abs(), self.floor), _affine(block.bn2)
        conv2: Any = copy.deepcopy(block.conv2)
        conv2.weight.mul_(_of_inputs(sign, conv2))
        pointwise = isinstance(block.conv1pw, nn.Conv2d)
        self.conv1 = _Conv(block.conv1, None if pointwise else before)
        self.conv1pw = _Conv(block.conv1pw, before) if pointwise else None
        self.conv2 = _Conv(conv2, None if pointwise else after)
        self.conv2pw = _Conv(block.conv2pw, after) if pointwise else None
        self.se = block.se

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        out = self.conv1(x, padding)
        if self.conv1pw is not None:
            out = self.conv1pw(out, padding)
        torch.maximum(out, self.floor, out=out)
        out = self.conv2(out, padding)
        if self.conv2pw is not None:
            out = self.conv2pw(out, padding)
        if self.se is None:
            return out.add_(x).relu_()
        return torch.addcmul(x, out, _gates(self.se, out, padding), out=out).relu_()


def _of_inputs(values: Tensor, conv: Any) -> Tensor:
    """One value per input channel, as it meets the weights (out, in / groups, …) of ``conv``."""
    of_groups = values.view(conv.groups, 1, -1).expand(-1, conv.out_channels // conv.groups, -1)
    return of_groups.reshape(conv.out_channels, -1, 1, 1)


def _gates(se: FrequencySE, x: Tensor, padding: _Padding | None) -> Tensor:
    pooled = x.mean(dim=3)  # (B, T, F)
    if padding is None:
        pooled = pooled.mean(dim=1)
    else:
        mask = padding.mask[..., 0]
        pooled = (pooled * mask).sum(dim=1) / mask.sum(dim=1)
    return se.gates(pooled)[:, None, :, None]


class _ConvNeXt(nn.Module):
    """``ConvNeXtBlock``; its BatchNorm is split over the parallel convolutions."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        width, self.convs = block.pwconv1.in_channels // len(block.dwconvs), nn.ModuleList()
        for i, conv in enumerate(block.dwconvs):
            part = copy.deepcopy(block.norm)
            for name in ("weight", "bias", "running_mean", "running_var"):
                setattr(part, name, _cut(getattr(part, name), slice(i * width, (i + 1) * width)))
            self.convs.append(_Conv(conv, _affine(part)))
        self.act, self.pwconv = block.act, _Conv(block.pwconv1)

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        parts = [conv(x, padding) for conv in self.convs]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return self.pwconv(self.act(out), padding).add_(x)


def _cut(tensor: Tensor, part: slice) -> Tensor:
    cut = tensor.detach()[part]
    return nn.Parameter(cut, requires_grad=False) if isinstance(tensor, nn.Parameter) else cut


class _Norm(nn.Module):
    """``LayerNorm`` over the channels, which lie innermost here."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)


class FastAttention(nn.Module):
    """``SelfAttention`` with one product for queries, keys and values."""

    weight: Tensor
    bias: Tensor

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.register_buffer("weight", torch.cat([p.weight.detach() for p in projections]))
        self.register_buffer("bias", torch.cat([p.bias.detach() for p in projections]))
        self.out_proj = attention.out_proj

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = F.linear(x, self.weight, self.bias).unflatten(-1, (3, 4, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, 4, T, C / 4) each
        keys = None if mask is None else mask.bool().unsqueeze(1)  # (B, 1, 1, T)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class _Transformer(nn.Module):
    """``TransformerLayer`` on a map of one frequency."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        layer.attention = FastAttention(layer.attention)  # type: ignore[assignment]
        self.layer = layer

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        mask = None if padding is None else padding.mask[:, None, :, 0, 0]  # (B, 1, T)
        return self.layer(x.squeeze(2).transpose(1, 2), mask).transpose(1, 2).unsqueeze(2)


class _Time(nn.Module):
    """``TimeContext`` on a map of one frequency."""

    def __init__(self, context: TimeContext) -> None:
        super().__init__()
        layers = [*context.red_dim_conv, *context.tcm, context.exp_dim_conv]
        self.layers = _Layers(layers)

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        one = x.flatten(2).unsqueeze(2)  # (B, T, 1, S)
        return self.layers(one, padding).add_(one).view_as(x)


class _Positional(nn.Module):
    def __init__(self, layer: PositionalConv) -> None:
        super().__init__()
        self.conv, self.norm = _Conv(layer.conv), _Norm(layer.norm)

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        return self.norm(self.conv(x, padding), padding).add_(x)


class _Act(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, padding: _Padding | None) -> Tensor:
        return self.act(x)


class _Mix(nn.Module):
    """``MapMix`` with its weights computed once."""

    weights: Tensor

    def __init__(self, mix: MapMix) -> None:
        super().__init__()
        weights = mix.w.detach().softmax(dim=1)[0, :, :, 0]  # (maps, S)
        self.register_buffer("weights", weights.contiguous())

    def forward(self, maps: list[Tensor]) -> Tensor:
        if len(maps) == 1:
            return maps[0]
        mixed = maps[0] * self.weights[0]
        for one, weights in zip(maps[1:], self.weights[1:]):
            mixed.addcmul_(one, weights)
        return mixed  # (B, T, S)


class _Layers(nn.Sequential):
    def __init__(self, layers: Iterable[nn.Module]) -> None:
        rest, converted = list(layers), []
        while rest:
            layer = rest.pop(0)
            folded = bool(rest) and isinstance(rest[0], BATCH_NORMS)
            converted.append(_convert(layer, rest.pop(0) if folded else None))
        super().__init__(*converted)

    def forward(self, x: Tensor, padding: _Padding | None = None) -> Tensor:
        for layer in self:
            x = layer(x, padding)
        return x


def _convert(layer: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    """The fast form of one layer of ``redimnet.py``."""
    if isinstance(layer, Block2d):
        layer = layer.conv_block
    if isinstance(layer, Sequence):
        return _Layers(layer)
    if isinstance(layer, (nn.GELU, nn.ReLU)):
        return _Act(layer)
    if isinstance(layer, (Conv1d, Conv2d)):
        return _Conv(layer, None if norm is None else _affine(norm))
    return _FAST[type(layer)](layer)


class _Stage(nn.Module):
    """Mixed maps (B, T, S) through one stage's layers."""

    def __init__(self, stage: Iterable[Any]) -> None:
        super().__init__()
        mix, to2d, *layers = stage
        self.mix, self.shape = _Mix(mix), (to2d.f, to2d.c)
        self.layers = _Layers(layer for layer in layers if not isinstance(layer, To1d))

    def forward(self, maps: list[Tensor], padding: _Padding | None) -> Tensor:
        x = self.mix(maps).unflatten(2, self.shape)  # (B, T, F, C)
        return self.layers(x, padding).flatten(2)


class _Backbone(nn.Module):
    """``Backbone`` without training: (B, 1, F, T) to (B, C·F or out_channels, T)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.stem = _Layers(layer for layer in backbone.stem if not isinstance(layer, To1d))
        stages = [getattr(backbone, f"stage{i}") for i in range(backbone.n_stages)]
        self.stages = nn.ModuleList(_Stage(stage) for stage in stages)
        self.mix = _Mix(backbone.fin_wght1d)
        self.mfa = _Layers(backbone.mfa) if isinstance(backbone.mfa, Sequence) else None

    def forward(self, feats: Tensor, mask: Tensor | None = None) -> Tensor:
        dtype, padding = self.mix.weights.dtype, None
        if mask is not None:
            shortest = int(mask.sum(dim=2).min())
            padding = _Padding(mask[:, 0, :, None, None].to(dtype), shortest)
        x = feats.to(dtype).permute(0, 3, 2, 1).contiguous()
        maps = [self.stem(x, padding).flatten(2)]
        for stage in self.stages:
            maps.append(stage(maps, padding))
        frames = self.mix(maps)
        if self.mfa is not None:
            frames = self.mfa(frames.unsqueeze(2), padding).squeeze(2)
        return frames.transpose(1, 2).float().contiguous()  # the pooling sums over time


class _Recorded(nn.Module):
    """``_Backbone`` whose operations on clips without padding torch runs without Python in between.

    Python takes 3 to 10 ms of a clip, whatever its length.
    """

    def __init__(self, backbone: nn.Module, n_mels: int, frames: int) -> None:
        super().__init__()
        self.layers = backbone
        feats = torch.zeros(1, 1, n_mels, frames)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated; its successors were slower
            self.record = torch.jit.trace(backbone, feats, check_trace=False)

    def forward(self, feats: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.record(feats) if mask is None else self.layers(feats, mask)


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _Stride,
    LayerNorm: _Norm,
    ConvNeXtBlock: _ConvNeXt,
    ResNetBlock: _ResNet,
    PositionalConv: _Positional,
    TransformerLayer: _Transformer,
    TimeContext: _Time,
}
