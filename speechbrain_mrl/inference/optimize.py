"""The same embeddings in less time: a copy of a model for inference, and settings of a process on a CPU."""

import copy
import ctypes
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_mrl.models.redimnet import EmbeddingModel, ReDimNet
from speechbrain_mrl.models.redimnet2 import EmbeddingModel2

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 2**31 - 1  # bytes, what mallopt can be told


def prepare_cpu() -> None:
    """Let this process flush subnormal numbers and keep the memory of freed tensors.

    Subnormal numbers slow a CPU down. And glibc gives blocks of more than 32 MB back to the system
    when they are freed; each next one is mapped anew and cleared page by page, which a network pays
    at every layer whose maps are as large. After this call freed blocks (up to 2 GB) are used
    again; the process holds its peak until it ends. Other C libraries are left as they are.

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

    Differences are rounding errors, in float32 below 1e-4. The copy is called as the model is
    (``wav_lens``, ``target_dim``, ``return_all_dims``), always under ``torch.inference_mode``, and
    cannot be trained, saved or published: keep the model for that. On a CPU to make it takes up to
    a second, and its first call up to half a second more.

    Arguments
    ---------
    model : ReDimNet
        Or a subclass, or the ``mods.embedding_model`` of a published model. Is not changed; its
        later changes do not reach the copy.
    precision : str
        "float32", or "bfloat16" for the network between features and pooling, which stay float32.
        It pays on CPUs with AMX or AVX512-BF16, and on GPUs; on other CPUs it warns.

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
        fast.backbone.record(fast.model_config["F"], 16 * fast.spec.time_stride)
    return fast


def _arranged(model: ReDimNet, precision: str) -> ReDimNet:
    """The copy of ``optimize_for_inference``, whose layers Python still calls one by one."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if precision == "bfloat16" and model.linear.weight.device.type == "cpu":
        _warn_without_bfloat16()
    fast: Any = copy.deepcopy(model)  # its layers become others
    fast.eval().float().requires_grad_(False)
    tiny = torch.finfo(torch.float32).tiny
    for tensor in [*fast.parameters(), *fast.buffers()]:
        if tensor.is_floating_point():  # subnormal numbers slow a CPU down
            tensor.masked_fill_(tensor.abs() < tiny, 0.0)
    fast.backbone = _Backbone(fast.backbone, getattr(torch, precision))
    fast.__class__ = _inference_class(type(model))
    return fast


def _warn_without_bfloat16() -> None:
    look: Any = getattr(torch.cpu, "get_capabilities", dict)  # which torch before 2.10 has not
    instructions = look()
    if instructions and not any(has for name, has in instructions.items() if "bf16" in name):
        warnings.warn(
            "this processor has no bfloat16 instructions, so that bfloat16 takes up to ten times as "
            "long as float32 here; use precision 'float32'",
            stacklevel=4,
        )


@torch.no_grad()
def prepare(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Compute once, in float32, what the layers of a network in eval mode compute of their weights.

    BatchNorm is folded into convolutions and stage weights are softmaxed there; see ``prepared`` in
    ``redimnet.py``. Later changes of the weights have no effect.
    """

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
            return value.to(dtype).contiguous(memory_format=layout)
        if isinstance(value, dict):
            return {key: cast(one) for key, one in value.items()}
        return type(value)(map(cast, value)) if isinstance(value, (list, tuple)) else value

    module.requires_grad_(False)
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "prepared")]
    for layer, found in [(layer, cast(layer.prepared())) for layer in layers]:
        layer.prepared = lambda found=found: found
    module.to(dtype)


def for_inference(encoder: Any, precision: str = "float32") -> Any:
    """``encoder`` as by ``optimize_for_inference`` if it is a ReDimNet; else itself.

    It is ready sooner and as fast in batches; utterance by utterance it is slower. What holds a
    ReDimNet is asked by its method ``for_inference(precision)``, if it has one.
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
            f"model must be a ReDimNet, got {type(model).__name__}; any other network is used as it "
            "is, and of an EncoderClassifier pass mods.embedding_model"
        )
    published: Any = model
    same = travelled(published.model_config, published.mrl_dims, published.target_dim)
    same.load_state_dict(model.state_dict())
    return same.eval().to(next(model.parameters()).device)


def batch_seconds_for(model: ReDimNet) -> float:
    """Seconds of audio in a batch, all utterances together, up to which batches pay on a CPU.

    Beyond them the largest map passes 16 MB and leaves the processor's cache. Unless
    ``prepare_cpu`` was called, glibc's malloc then asks the system for new memory at each
    operation, whose pages are cleared every time. An utterance then costs more than alone. A single
    longer utterance is right nevertheless. Of a copy in bfloat16, whose maps are half as large,
    twice as many.

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


class _Backbone(nn.Module):
    """A backbone with its weights prepared; ``record`` lets torch run it without Python in between.

    Python takes 3 to 10 ms of an utterance, whatever its length. Padded utterances still call it.
    """

    def __init__(self, layers: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers, self.dtype, self.recorded = layers, dtype, None
        prepare(layers, dtype)

    def record(self, n_mels: int, frames: int) -> None:
        feats = torch.zeros(1, 1, n_mels, frames, dtype=self.dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated; its successors were slower
            self.recorded = torch.jit.trace(self.layers, feats, check_trace=False)

    def forward(self, feats: Tensor, mask: Tensor | None = None) -> Any:
        feats = feats.to(self.dtype)
        if mask is None and self.recorded is not None:
            return self.recorded(feats).float()
        return self.layers(feats, mask).float()
