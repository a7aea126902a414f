"""Starts ONNX Runtime or OpenVINO on a file of ``export_onnx``. Needs the extra of that name."""

import functools
import json
import os
import queue
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from speechbrain_mrl.utils import require

METADATA_KEY = "speechbrain_mrl"
ENGINES = ("onnxruntime", "openvino")

Run = Callable[[np.ndarray], np.ndarray]  # waveforms (B, T) to embeddings (B, embed_dim)


def check_engine(engine: str, precision: str) -> None:
    """Raise a ValueError unless the engine is known and has the precision."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    allowed = ("float32", "bfloat16") if engine == "openvino" else ("float32",)
    if precision not in allowed:
        raise ValueError(f"precision must be one of {allowed} with {engine}, got {precision!r}")


class Options(NamedTuple):
    """As of ``ExportedEncoder``; without a shape for any."""

    precision: str
    threads: int | None
    streams: int
    shape: tuple[int, int] | None = None


def start(engine: str, path: str, options: Options) -> tuple[Run, dict[str, Any]]:
    """What runs a file, and the facts in the file's metadata; ValueError for a foreign file."""
    return (_openvino if engine == "openvino" else _onnxruntime)(path, options)


def _facts(path: str, stored: str | None) -> Any:
    if stored is None:
        raise ValueError(f"{path} was not written by export_onnx with input='wavs'")
    return json.loads(stored)


def _onnxruntime(path: str, options: Options) -> tuple[Run, Any]:
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

    return run, _facts(path, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))


def _openvino(path: str, options: Options) -> tuple[Run, Any]:
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
    stored = model.get_rt_info(where).astype(str) if model.has_rt_info(where) else None
    facts = _facts(path, stored)
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
