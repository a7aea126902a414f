"""Commands that work on recordings: embed, verify, enroll, identify, diarize, calibrate.

A command imports what it needs when it runs, so that ``--help`` does not wait for torch.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechbrain_mrl.utils import check_device, check_writable, only_run, print_table, replacing

COMMANDS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}


def option(*names: str, **settings: Any) -> Any:
    """What ``add_argument`` takes."""
    return names, settings


def command(*options: Any) -> Any:
    """Decorator: a command of the function's name and docstring; what it returns becomes JSON."""
    return lambda run: COMMANDS.setdefault(run.__name__, (run, options))[0]


MODEL = option(
    "model",
    metavar="MODEL",
    help="folder or Hub id of a SpeechBrain speaker encoder, a released name (b0 … b6, "
    "redimnet2_b2, b2-vox2-ptn, …), or a checkpoint file of ReDimNet or ReDimNet2",
)
DEVICE = option("--device", default="cpu", help="cpu or cuda (default: cpu)")
SECONDS = option("--max_seconds", type=float, help="seconds of each recording (default: all)")
REGISTRY = option("registry", metavar="REGISTRY", help="folder of enrolled speakers")
DIM = option("--target_dim", type=int, metavar="D", help="first dimensions to use (default: all)")
DECISIONS: dict[Any, str] = {True: "same speaker", False: "different speakers", None: "-"}


@command(
    MODEL,
    option("recordings", metavar="RECORDING", nargs="+", help="files, or folders of them"),
    option("--output", metavar="FILE.npz", help="write the embeddings there"),
    DIM,
    DEVICE,
    SECONDS,
)
def embed(given: argparse.Namespace) -> Any:
    """Turn recordings into embeddings.

    Examples:
      speechbrain-mrl embed models/b2 calls/ --output calls.npz
      speechbrain-mrl embed org/redimnet-mrl one.wav two.flac --target_dim 64 --json

    the .npz holds ids (N,) and embeddings (N, target_dim), float32, L2-normalised
    """
    import numpy as np
    from torch.nn.functional import normalize

    from speechbrain_mrl.dataio.clips import SAMPLE_RATE, clips_at
    from speechbrain_mrl.inference.encoders import chosen_size

    if given.output is not None:
        check_writable(given.output)
    clips = clips_at(given.recordings)
    embeddings, encoder, _, _ = _embed(given, clips)
    size = chosen_size(encoder, embeddings.shape[1], given.target_dim)
    embeddings = normalize(embeddings[:, :size], dim=1).numpy()
    found = [{"id": c.id, "seconds": round(c.num_frames / SAMPLE_RATE, 2)} for c in clips]
    if given.output is None:
        found = [f | {"embedding": e.tolist()} for f, e in zip(found, embeddings, strict=True)]
    else:
        with replacing(given.output) as part, open(part, "wb") as file:
            np.savez(file, ids=[clip.id for clip in clips], embeddings=embeddings)
    if given.json:
        return dict(model=given.model, target_dim=size, output=given.output, recordings=found)
    few = ["  ".join(f"{x:+.3f}" for x in row[:6]) + " …" for row in embeddings]
    rows = [[f["id"], f["seconds"], start] for f, start in zip(found, few, strict=True)]
    print_table(["recording", "seconds", "first dimensions"], rows)
    where = f"written to {given.output}" if given.output else "to keep them, give --output"
    print(f"{len(clips)} embeddings of {size} dimensions, L2-normalised; {where}")


@command(
    MODEL,
    option("recordings", metavar="RECORDING", nargs="*", help="two files"),
    option("--threshold", type=float, help="lowest cosine of one speaker (default: the model's)"),
    option("--trials", metavar="LIST", help="measure error rates on this list instead"),
    option("--data_folder", metavar="FOLDER", help="holds the recordings of the list"),
    option("--output", metavar="FOLDER", help="write report.json of the list there"),
    DEVICE,
    SECONDS,
)
def verify(given: argparse.Namespace) -> Any:
    """Decide whether two recordings are of one speaker, or measure a trial list.

    Examples:
      speechbrain-mrl verify models/b2 first.wav second.wav --threshold 0.4
      speechbrain-mrl verify org/redimnet-mrl --trials veri_test2.txt --data_folder VoxCeleb1/wav

    a trial list has lines "1 a b" (same speaker) or "0 a b"; a and b are paths below --data_folder.
    The decision is by the cosine at the model's equal error rate, unless --threshold says
    otherwise. Intervals, normalisation, calibration, comparison: recipes/voxceleb/verify.py.
    """
    if given.trials is not None:
        return _verify_list(given)
    from torch.nn.functional import cosine_similarity

    from speechbrain_mrl.dataio.clips import clips_at

    clips = clips_at(given.recordings, folders=False)
    (first, second), _, sizes, thresholds = _embed(given, clips)
    scores = []
    for size in sizes:
        cosine = cosine_similarity(first[:size], second[:size], dim=0).item()
        threshold = thresholds.get(size) if given.threshold is None else given.threshold
        same = None if threshold is None else cosine >= threshold
        scores.append({"size": size, "score": cosine, "threshold": threshold, "same": same})
    if given.json:
        return {"model": given.model, "recordings": given.recordings, "scores": scores}
    rows = [[s["size"], s["score"], s["threshold"], DECISIONS[s["same"]]] for s in scores]
    print_table(["dimensions", "cosine", "threshold", "decision"], rows)
    if not thresholds and given.threshold is None:
        print("The model brings no threshold; give --threshold, fitted to recordings like yours.")


def _verify_list(given: argparse.Namespace) -> Any:
    from speechbrain_mrl.evaluation.report import make_report, print_report, write_report
    from speechbrain_mrl.evaluation.verification import evaluate

    started = time.time()
    if given.output is not None:
        check_writable(Path(given.output, "report.json"))
    trials, _, embeddings, encoder, sizes = _embed_list(given)
    dims = evaluate(embeddings, trials, sizes)
    params = sum(p.numel() for p in encoder.parameters())
    seconds = round(time.time() - started, 1)
    report = make_report(dims, trials, {}, given.data_folder, params, seconds)
    if given.output is not None:
        write_report(report, given.output)
    if given.json:
        return report
    print_report(report)


@command(
    REGISTRY,
    option("name", metavar="NAME", help="of the speaker"),
    option("recordings", metavar="RECORDING", nargs="+", help="files, or folders of them"),
    option("--model", help="of a registry that is new: folder, Hub id, released name or file"),
    DIM,
    option(
        "--threshold",
        type=float,
        help="lowest cosine that names a speaker (default: by the model's report)",
    ),
    DEVICE,
)
def enroll(given: argparse.Namespace) -> Any:
    """Add a speaker's recordings to a registry.

    Examples:
      speechbrain-mrl enroll staff ann ann1.wav ann2.wav --model models/b2
      speechbrain-mrl enroll staff bob recordings/bob/

    The first call makes the registry and needs --model; later ones need it where the model was
    moved. Voices are biometric data: ask first.
    """
    from speechbrain_mrl.inference.registry import FILE, VoiceRegistry

    if not Path(given.registry, FILE).is_file() and given.model is None:
        raise ValueError(f"{given.registry} is no registry yet; give --model to make it")
    with only_run(given.registry, patience=-1):  # two at once would lose one's speaker
        if Path(given.registry, FILE).is_file():
            for name in ("target_dim", "threshold"):
                if getattr(given, name) is not None:
                    raise ValueError(
                        f"--{name} is for a new registry, which {given.registry} is not"
                    )
            registry = VoiceRegistry.load(given.registry, given.model, given.device)
        else:
            registry = VoiceRegistry(given.model, given.target_dim, given.threshold, given.device)
        registry.enroll(given.name, given.recordings)
        registry.save(given.registry)
    count, seconds = registry.speakers[given.name]
    if given.json:
        return {"name": given.name, "recordings": count, "seconds": round(seconds, 2)}
    print_table(
        ["speaker", "recordings", "seconds of sound"],
        [[name, n, total] for name, (n, total) in registry.speakers.items()],
    )


@command(
    REGISTRY,
    option("recordings", metavar="RECORDING", nargs="+", help="files, or folders of them"),
    DEVICE,
)
def identify(given: argparse.Namespace) -> Any:
    """Name the enrolled speaker of each recording, or nobody.

    Examples:
      speechbrain-mrl identify staff call.wav
      speechbrain-mrl identify staff monday.wav calls/ --json

    margin: score minus that of the next speaker. seconds: of sound in the recording.
    """
    from speechbrain_mrl.dataio.clips import clips_at
    from speechbrain_mrl.inference.registry import VoiceRegistry

    registry = VoiceRegistry.load(given.registry, device=given.device)
    paths = [clip.wav for clip in clips_at(given.recordings)]
    found = [(path, registry.identify(path)) for path in tqdm(paths, disable=None)]
    if given.json:
        return {"recordings": [{"recording": path, **one._asdict()} for path, one in found]}
    heads = ["recording", "speaker", "score", "margin", "seconds", "why nobody"]
    print_table(
        heads,
        [
            [path, one.name or "nobody", one.score, one.margin, one.seconds, one.reason or ""]
            for path, one in found
        ],
    )


@command(
    MODEL,
    option("recording", metavar="RECORDING", help="file"),
    option("--n_speakers", type=int, metavar="N", help="how many speak (default: estimated)"),
    option("--output", metavar="FILE.rttm", help="write the turns there"),
    DIM,
    DEVICE,
)
def diarize(given: argparse.Namespace) -> Any:
    """Find who speaks when in a recording.

    Examples:
      speechbrain-mrl diarize models/b2 meeting.wav
      speechbrain-mrl diarize org/redimnet-mrl call.wav --n_speakers 2 --output call.rttm

    Windows of 1.5 s are clustered; silent ones are left out. Who speaks is a number, from 1.
    """
    from speechbrain_mrl.inference.diarization import diarize as find_turns
    from speechbrain_mrl.inference.encoders import load_teacher

    if given.output is not None:
        check_writable(given.output)
    device = check_device(given.device)
    encoder = load_teacher(given.model, device=device)
    options = {"n_speakers": given.n_speakers, "device": device}
    turns = find_turns(encoder, given.recording, given.target_dim, **options)
    if given.output is not None:
        name = Path(given.recording).stem.replace(" ", "_")
        with replacing(given.output) as part:
            part.write_text(
                "".join(
                    f"SPEAKER {name} 1 {one.start:.3f} {one.end - one.start:.3f} <NA> <NA> "
                    f"speaker{one.speaker} <NA> <NA>\n"
                    for one in turns
                ),
                encoding="utf-8",
            )
    if given.json:
        return {"recording": given.recording, "turns": [one._asdict() for one in turns]}
    print_table(["from, s", "to, s", "speaker"], [list(one) for one in turns])


@command(
    MODEL,
    option("--trials", metavar="LIST", required=True, help="lines 1 a b (same speaker) or 0 a b"),
    option("--data_folder", metavar="FOLDER", required=True, help="holds the recordings"),
    option("--output", metavar="FILE.json", default="calibration.json", help="to be written"),
    option("--p_target", type=float, default=0.01, help="prior of a target trial (default: 0.01)"),
    DEVICE,
)
def calibrate(given: argparse.Namespace) -> Any:
    """Fit what a model's cosines are worth, as log-likelihood ratios, on a trial list.

    Examples:
      speechbrain-mrl calibrate models/b2 --trials trials.txt --data_folder calls/

    Durations are taken into account. publish --calibration publishes the file with the model. With
    a domain or cohort: recipes/voxceleb/verify.py.
    """
    from speechbrain_mrl.dataio.clips import SAMPLE_RATE
    from speechbrain_mrl.evaluation import calibration
    from speechbrain_mrl.evaluation.verification import score_trials

    check_writable(given.output)
    trials, clips, embeddings, _, sizes = _embed_list(given)
    quality = calibration.log_durations(
        trials, {clip.id: clip.num_frames / SAMPLE_RATE for clip in clips}
    )
    fitted = {
        size: calibration.Calibration.fit(scores, trials.labels, quality, given.p_target)
        for size, scores in score_trials(embeddings, trials, sizes).items()
    }
    calibration.write_calibrations(fitted, given.output)
    if given.json:
        return {str(size): asdict(one) for size, one in fitted.items()}
    rows = [[size, one.offset, one.scale, *one.quality] for size, one in fitted.items()]
    print_table(["dimensions", "offset", "scale", "log shorter", "log longer"], rows)
    print(f"log-likelihood ratio = offset + scale · cosine + durations; written to {given.output}")


def _embed(given: argparse.Namespace, clips: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Embeddings of the utterances, (N, D); their encoder, its sizes and its thresholds."""
    from speechbrain_mrl.inference.encoders import load_teacher, sizes_and_thresholds
    from speechbrain_mrl.inference.extract import embed_clips

    device = check_device(given.device)
    encoder = load_teacher(given.model, device=device)
    with tqdm(total=len(clips), unit=" utterances", desc="Embedding", disable=None) as bar:
        options = {
            "device": device,
            "max_seconds": getattr(given, "max_seconds", None),
            "progress": bar,
        }
        embeddings = embed_clips({"model": encoder}, clips, **options)["model"]
    return embeddings, encoder, *sizes_and_thresholds(encoder, embeddings.shape[1])


def _embed_list(given: argparse.Namespace) -> tuple[Any, Any, Any, Any, Any]:
    """A trial list, its utterances, their embeddings (N, D) in its order, the encoder, its sizes."""
    from speechbrain_mrl.dataio.clips import find_clips
    from speechbrain_mrl.evaluation.verification import read_trials

    trials = read_trials(given.trials)
    clips = find_clips(given.data_folder, trials.clip_ids)
    trials.check_clips({clip.id for clip in clips})
    found, encoder, sizes, _ = _embed(given, clips)
    ids = (clip.id for clip in clips)
    return trials, clips, trials.stack(dict(zip(ids, found, strict=True))), encoder, sizes
