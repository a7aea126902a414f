"""Exports a model as one ONNX file, and runs one from waveforms with ONNX Runtime or OpenVINO.

Needs the extra ``onnx`` or ``openvino``.
"""

import copy
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechbrain_mrl.inference.engines import METADATA_KEY, Options, check_engine, start
from speechbrain_mrl.inference.graphs import (
    EncoderGraph,
    FeatureGraph,
    ReDimNetGraph,
    whole_clips,
)
from speechbrain_mrl.inference.optimize import packaged
from speechbrain_mrl.models.kaldi import KaldiFbank
from speechbrain_mrl.models.matryoshka import EncoderModel, MatryoshkaEncoder
from speechbrain_mrl.models.redimnet import MIN_SAMPLES, SAMPLE_RATE, check_wavs, sample_counts
from speechbrain_mrl.utils import require, sha256

INPUTS = ("wavs", "fbank")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input: str = "wavs",
    target_dim: int | None = None,
) -> None:
    """Write ``model`` as an ONNX file, from waveforms or from filter-bank features to embeddings.

    ``"wavs"``: the input is ``wavs`` (B, T), float32 at 16 kHz, of any B, and any T that the model
    takes. Outputs are ``embeddings`` (B, target_dim), and ``feats``, (B, F, frames) or as the
    encoder's ``compute_features`` gives them. The sizes are in the file's metadata, as JSON under
    ``speechbrain_mrl``. ONNX Runtime runs all models; OpenVINO runs ReDimNets.

    ``"fbank"``: the input is ``feature`` (B, frames, 80), as ``KaldiFbank`` gives it, and the output
    ``embedding`` (B, target_dim). Names and metadata are those that the C++ runtimes of sherpa-onnx,
    WeSpeaker and 3D-Speaker ask for.

    Utterances of a batch have equal lengths.

    Arguments
    ---------
    model : ReDimNet or MatryoshkaEncoder
        Or the ``mods.embedding_model`` of a published model. Exported in eval mode, unchanged. For
        "fbank" a MatryoshkaEncoder whose ``compute_features`` is ``KaldiFbank()``.
    path : path
        The file to write.
    input : str
        "wavs" or "fbank".
    target_dim : int, optional
        One of the model's ``mrl_dims``: dimensions to write. None: all.

    Raises
    ------
    ImportError
        If the extra ``onnx`` is not installed.
    TypeError
        If ``model`` is neither, or is a copy by ``optimize_for_inference``.
    ValueError
        For another input or size, or "fbank" for a model with other features.
    """
    if input not in INPUTS:
        raise ValueError(f"input must be one of {INPUTS}, got {input!r}")
    onnx = require("onnx", "export_onnx")
    require("onnxscript", "export_onnx")  # torch.onnx uses it
    of_folder = type(model).__name__ == EncoderModel.__name__  # by a published folder's own code
    any_encoder = of_folder or isinstance(model, MatryoshkaEncoder)
    model = model if any_encoder else packaged(model)
    mrl_dims = tuple(getattr(model, "mrl_dims", (model.embed_dim,)))
    size: Any = model.embed_dim if target_dim is None else target_dim
    if not isinstance(size, int) or size not in mrl_dims:
        raise ValueError(f"target_dim must be one of mrl_dims {list(mrl_dims)}, got {target_dim!r}")
    if input == "fbank":
        _check_fbank(model)
    exact: Any = copy.deepcopy(model).float().cpu()
    example, names = torch.randn(2, SAMPLE_RATE), ["wavs", "embeddings", "feats"]
    graph_of: Any = EncoderGraph if any_encoder else ReDimNetGraph
    if input == "fbank":
        example, names = exact.compute_features(example), ["feature", "embedding"]
        graph_of = FeatureGraph
    with torch.no_grad(), whole_clips():
        program: Any = torch.onnx.export(
            graph_of(exact, size).eval(),
            (example,),
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=({0: "batch", 1: "samples" if input == "wavs" else "frames"},),
            dynamo=True,
            verbose=False,
        )
    exported = program.model_proto
    sizes = [d for d in mrl_dims if d <= size]
    facts = {"embed_dim": size, "min_samples": model.min_samples, "mrl_dims": sizes}
    facts["sample_rate"] = SAMPLE_RATE
    properties = {METADATA_KEY: json.dumps(facts)} if input == "wavs" else _for_sherpa(size)
    onnx.helper.set_model_props(exported, properties)
    onnx.save(exported, os.fspath(path))


def _check_fbank(model: Any) -> None:
    """ValueError unless its features are those that the runtimes compute."""
    features: Any = getattr(model, "compute_features", None)
    usual = KaldiFbank()
    if type(features).__name__ != KaldiFbank.__name__:  # a published folder has a class of its own
        raise ValueError(
            "input='fbank' is for a MatryoshkaEncoder with compute_features=KaldiFbank(), got a "
            f"{type(model).__name__} with features of its own; use input='wavs'"
        )
    bands = features.bands.float().cpu()
    if bands.shape != usual.bands.shape or not torch.allclose(bands, usual.bands, atol=1e-3):
        raise ValueError(
            "input='fbank' needs KaldiFbank() with its defaults, 80 bands from 20 to 7600 Hz, which "
            f"the runtimes feed; this model has {bands.shape[1]} other ones, use input='wavs'"
        )


def _for_sherpa(size: int) -> dict[str, str]:
    """Metadata that sherpa-onnx reads."""
    return {
        "framework": "wespeaker",
        "language": "any",
        "output_dim": str(size),
        "sample_rate": str(SAMPLE_RATE),
        "normalize_samples": "0",  # samples as 16-bit integers
        "feature_normalize_type": "global-mean",
        "comment": "speechbrain_mrl",
    }


class ExportedEncoder:
    """An exported model: waveforms in, embeddings out, both numpy.

    Arguments
    ---------
    path : path
        A file that ``export_onnx`` wrote with ``input="wavs"``.
    engine : str
        "onnxruntime" or "openvino".
    precision : str
        "float32", or "bfloat16" for the network behind the features (OpenVINO, on a CPU that has
        bfloat16 instructions).
    threads : int, optional
        Threads of the engine. None: its own choice.
    streams : int
        Utterances that run at the same time, each on its share of the threads: more utterances a second,
        and more time for one.
    shape : tuple of int, optional
        A shape (B, T) that most waveforms have, as windows of one length do; with streams, B is 1.
        The engine prepares itself for it too: in small models these take a tenth less time. Others
        run as without it.

    Raises
    ------
    ImportError
        If the engine is not installed.
    ValueError
        For another engine, precision, number of streams or shape, or a file of another origin.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        engine: str = "onnxruntime",
        precision: str = "float32",
        threads: int | None = None,
        streams: int = 1,
        shape: tuple[int, int] | None = None,
    ) -> None:
        check_engine(engine, precision)
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams}")
        path, options = os.fspath(path), Options(precision, threads, streams)
        self._any_shape, facts = start(engine, path, options)
        self.min_samples = least = facts.get("min_samples", MIN_SAMPLES)
        if shape is not None and (len(shape) != 2 or shape[0] < 1 or shape[1] < least):
            raise ValueError(
                f"shape must be (B, T), B at least 1 and T at least {least} samples, got {shape}"
            )
        fixed = options._replace(shape=shape)
        self._fixed = {} if shape is None else {tuple(shape): start(engine, path, fixed)[0]}
        self._map: Any = map if streams == 1 else ThreadPoolExecutor(streams).map
        self.streams = streams
        self.embed_dim, self.mrl_dims = facts["embed_dim"], tuple(facts["mrl_dims"])
        self.fingerprint = f"{sha256(path)} {engine} {precision}"

    def __call__(
        self,
        wavs: np.ndarray | Tensor,
        wav_lens: Sequence[float] | Tensor | None = None,
        target_dim: int | None = None,
    ) -> Any:
        """Embeddings of waveforms, or their prefixes; not length-normalised.

        Padded utterances are truncated to their lengths and run one by one, which is exact. An
        object of this class can be given to ``embed_folder``.

        Arguments
        ---------
        wavs : numpy.ndarray or torch.Tensor
            Float, 16 kHz, in [-1, 1]; (T,) or (B, T), T at least ``min_samples``.
        wav_lens : sequence of float or torch.Tensor, optional
            Lengths relative to T, in (0, 1], (B,). None: no utterance is padded.
        target_dim : int, optional
            One of ``mrl_dims``: dimensions to return. None: all.

        Returns
        -------
        numpy.ndarray or torch.Tensor, as ``wavs``
            (B, target_dim), float32.

        Raises
        ------
        ValueError
            For another shape, type or size, or an utterance of fewer than ``min_samples``.
        """
        if target_dim is not None and target_dim not in self.mrl_dims:
            raise ValueError(
                f"target_dim must be one of mrl_dims {list(self.mrl_dims)}, got {target_dim!r}"
            )
        signals = check_wavs(torch.as_tensor(wavs), self.min_samples)
        if wav_lens is not None:
            wav_lens = torch.as_tensor(wav_lens, dtype=torch.float64)
        counts = sample_counts(signals, wav_lens, self.min_samples)
        batch = np.ascontiguousarray(signals.numpy(), dtype=np.float32)
        if counts is None and (self.streams == 1 or len(batch) == 1):
            found = self._run(batch)
        else:
            lengths = [batch.shape[1]] * len(batch) if counts is None else counts.tolist()
            clips = [wav[None, :length] for wav, length in zip(batch, lengths)]
            found = np.concatenate(list(self._map(self._run, clips)))
        found = found[:, :target_dim]
        return torch.from_numpy(found) if isinstance(wavs, Tensor) else found

    def _run(self, wavs: np.ndarray) -> np.ndarray:
        return self._fixed.get(wavs.shape, self._any_shape)(wavs)
