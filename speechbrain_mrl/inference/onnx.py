"""Exports a model as one ONNX file, waveforms to embeddings, and runs it with ONNX Runtime or OpenVINO.

Needs the extra ``onnx`` or ``openvino``.
"""

import copy
import functools
import json
import os
import queue
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from speechbrain_mrl.inference.graphs import EncoderGraph, ReDimNetGraph, whole_clips
from speechbrain_mrl.inference.optimize import packaged
from speechbrain_mrl.models.matryoshka import EncoderModel, MatryoshkaEncoder
from speechbrain_mrl.models.redimnet import MIN_SAMPLES, SAMPLE_RATE, check_wavs, sample_counts
from speechbrain_mrl.utils import require, sha256

METADATA_KEY = "speechbrain_mrl"
ENGINES = ("onnxruntime", "openvino")

_Run = Callable[[np.ndarray], np.ndarray]  # waveforms (B, T) to embeddings (B, embed_dim)


def export_onnx(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model`` as an ONNX file that holds its features, network and embedding.

    The input is ``wavs`` (B, T), float32 at 16 kHz, of any B, and any T that the model takes. Outputs
    are ``embeddings`` (B, embed_dim), and ``feats``, (B, F, frames) or as the encoder's
    ``compute_features`` gives them. Utterances of a batch have equal lengths. The sizes are in the
    file's metadata, as JSON under ``speechbrain_mrl``. ONNX Runtime runs all models; OpenVINO runs
    ReDimNets.

    Arguments
    ---------
    model : ReDimNet or MatryoshkaEncoder
        Or the ``mods.embedding_model`` of a published model. Exported in eval mode, unchanged.
    path : path
        The file to write.

    Raises
    ------
    ImportError
        If the extra ``onnx`` is not installed.
    TypeError
        If ``model`` is neither, or is a copy by ``optimize_for_inference``.
    """
    onnx = require("onnx", "export_onnx")
    require("onnxscript", "export_onnx")  # torch.onnx uses it
    of_folder = type(model).__name__ == EncoderModel.__name__  # by a published folder's own code
    if of_folder or isinstance(model, MatryoshkaEncoder):
        graph: nn.Module = EncoderGraph(copy.deepcopy(model).float().cpu()).eval()
    else:
        model = packaged(model)
        graph = ReDimNetGraph(copy.deepcopy(model).float().cpu()).eval()
    with torch.no_grad(), whole_clips():
        program: Any = torch.onnx.export(
            graph,
            (torch.randn(2, SAMPLE_RATE),),
            input_names=["wavs"],
            output_names=["embeddings", "feats"],
            dynamic_shapes={"wavs": {0: "batch", 1: "samples"}},
            dynamo=True,
            verbose=False,
        )
    exported = program.model_proto
    facts = {name: getattr(model, name) for name in ("embed_dim", "min_samples")}
    facts["mrl_dims"] = getattr(model, "mrl_dims", (model.embed_dim,))
    facts["sample_rate"] = SAMPLE_RATE
    onnx.helper.set_model_props(exported, {METADATA_KEY: json.dumps(facts)})
    onnx.save(exported, os.fspath(path))


def check_engine(engine: str, precision: str) -> None:
    """Raise a ValueError unless the engine is known and has the precision."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    allowed = ("float32", "bfloat16") if engine == "openvino" else ("float32",)
    if precision not in allowed:
        raise ValueError(f"precision must be one of {allowed} with {engine}, got {precision!r}")


class ExportedEncoder:
    """An exported model: waveforms in, embeddings out, both numpy.

    Arguments
    ---------
    path : path
        A file that ``export_onnx`` wrote.
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
        start = _openvino if engine == "openvino" else _onnxruntime
        path, options = os.fspath(path), _Options(precision, threads, streams)
        self._any_shape, facts = start(path, options)
        if facts is None:
            raise ValueError(f"{path} was not written by export_onnx")
        facts = json.loads(facts)
        self.min_samples = least = facts.get("min_samples", MIN_SAMPLES)
        if shape is not None and (len(shape) != 2 or shape[0] < 1 or shape[1] < least):
            raise ValueError(
                f"shape must be (B, T), B at least 1 and T at least {least} samples, got {shape}"
            )
        fixed = options._replace(shape=shape)
        self._fixed = {} if shape is None else {tuple(shape): start(path, fixed)[0]}
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


class _Options(NamedTuple):
    """As of ``ExportedEncoder``; without a shape for any."""

    precision: str
    threads: int | None
    streams: int
    shape: tuple[int, int] | None = None


# Each engine's start gives what runs a file, and the file's metadata.


def _onnxruntime(path: str, options: _Options) -> tuple[_Run, Any]:
    onnxruntime = require("onnxruntime", "engine 'onnxruntime'")
    settings, threads = onnxruntime.SessionOptions(), options.threads
    if options.streams > 1:
        threads = max(1, (threads or os.cpu_count() or 1) // options.streams)
    settings.intra_op_num_threads = threads or 0
    settings.add_session_config_entry("session.set_denormal_as_zero", "1")
    for name, size in zip(("batch", "samples"), options.shape or ()):
        settings.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def run(wavs: np.ndarray) -> Any:
        return session.run(["embeddings"], {"wavs": wavs})[0]

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)


def _openvino(path: str, options: _Options) -> tuple[_Run, Any]:
    core = _openvino_core()
    import openvino
    from openvino import opset13

    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ValueError(
            f"OpenVINO cannot read the graph of {path}, as that of SpeechBrain's own features; use "
            "engine 'onnxruntime'"
        ) from error
    if options.shape is not None:
        model.reshape(list(options.shape))
    where = ["framework", METADATA_KEY]
    facts = model.get_rt_info(where).astype(str) if model.has_rt_info(where) else None
    settings: dict[str, Any] = {"NUM_STREAMS": options.streams, "CPU_DENORMALS_OPTIMIZATION": True}
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    wavs_in, results = model.get_parameters()[0], {r.get_any_name(): r for r in model.outputs}
    embeddings, feats = (results[name].get_node() for name in ("embeddings", "feats"))
    # Features are a graph of their own. They stay float32, for bfloat16 has 8 bits for a Fourier
    # transform; and the network is prepared anew for other frames only, not for each sample more.
    exact = {**settings, "INFERENCE_PRECISION_HINT": "f32"}
    front = core.compile_model(openvino.Model([feats], [wavs_in]), "CPU", exact)
    source = feats.input_value(0)
    feats_in = opset13.parameter(source.get_partial_shape(), np.float32, name="feats_in")
    for target in list(source.get_target_inputs()):
        target.replace_source_output(feats_in.output(0))
    hint = {"INFERENCE_PRECISION_HINT": "f32" if options.precision == "float32" else "bf16"}
    network = core.compile_model(
        openvino.Model([embeddings], [wavs_in, feats_in]), "CPU", settings | hint
    )
    features = _shared([front.create_infer_request() for _ in range(options.streams)])
    embedded = _shared([network.create_infer_request() for _ in range(options.streams)])
    return lambda wavs: embedded(wavs, features(wavs)), facts


@functools.cache
def _openvino_core() -> Any:
    """The process' only ``openvino.Core``, kept until its end.

    A core puts the signal stack of its thread aside for its own, and puts that back when it is
    freed. Of two cores freed in the order they were made, the second puts back the first one's
    freed stack. The next signal that Python handles (a worker that ends) then kills the process.
    """
    # OpenVINO would report its use to its makers, over the network and from a fork of this process,
    # with the threads of whatever runs here; it does without where its reporter is not installed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return require("openvino", "engine 'openvino'").Core()


def _shared(requests: list[Any]) -> Callable[..., np.ndarray]:
    """A function that several threads may call; each call uses a request that no other does."""
    idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for request in requests:
        idle.put(request)

    def run(*inputs: np.ndarray) -> np.ndarray:
        request = idle.get()
        try:
            return request.infer(list(inputs))[0]
        finally:
            idle.put(request)

    return run
