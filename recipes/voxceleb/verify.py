"""Verify any speaker encoder at every size: one or several trial lists, report, plots and table.

python recipes/voxceleb/verify.py hparams/verify.yaml --source=<folder or Hub id> \\
    --data_folder=/data/VoxCeleb1 --trials=veri_test2.txt

Embeddings are kept on disk: a killed run resumes, and another list costs only its new
utterances.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import speechbrain as sb
import torch
from check_hparams import VERIFICATION, check
from command import limit_workers, run_command
from headers import read_headers
from hyperpyyaml import load_hyperpyyaml
from read_hparams import help_text, parse, read_yaml, resolved, run_options
from speechbrain.utils.distributed import ddp_init_group, if_main_process
from voxceleb_prepare import find_recordings

from speechbrain_mrl.dataio.clips import SAMPLE_RATE, Clip, speaker_of, stem_of
from speechbrain_mrl.dataio.lists import read_clip_list
from speechbrain_mrl.evaluation.calibration import (
    Calibration,
    log_durations,
    read_calibrations,
    s_norm,
    write_calibrations,
)
from speechbrain_mrl.evaluation.duration import eer_by_duration
from speechbrain_mrl.evaluation.plda import plda_scores
from speechbrain_mrl.evaluation.plots import write_plots
from speechbrain_mrl.evaluation.report import count_trials, make_report, print_report, write_report
from speechbrain_mrl.evaluation.verification import (
    compare,
    evaluate_scores,
    read_trials,
    score_trials,
)
from speechbrain_mrl.inference.encoders import load_teacher, sizes_and_thresholds
from speechbrain_mrl.inference.fingerprint import fingerprint
from speechbrain_mrl.inference.store import TeacherStore
from speechbrain_mrl.utils import check_device, only_run

CLIP_LISTS = ("domain", "cohort", "plda")


def read_lists(hparams):
    """Trials by name; the calibration's trials, or None; utterance ids by path of their list."""
    paths = hparams["trials"]
    if not isinstance(paths, Mapping):
        files = [paths] if isinstance(paths, str) else list(paths)
        paths = {Path(file).stem: file for file in files}
        if not files or len(paths) < len(files):
            raise ValueError(f"trials must be files of different names, got {files}")
    trials = {name: read_trials(path) for name, path in paths.items()}
    calibration = hparams["calibration"]
    to_fit = None
    if calibration is not None and not _is_fitted(calibration):
        to_fit = read_trials(calibration)
    chosen = {hparams[role] for role in CLIP_LISTS if hparams[role] is not None}
    clip_lists = {path: read_clip_list(path) for path in sorted(chosen)}

    tested = {speaker_of(clip_id) for one in trials.values() for clip_id in one.clip_ids}
    others = clip_lists | ({} if to_fit is None else {calibration: to_fit.clip_ids})
    for path, clip_ids in others.items():
        if shared := sorted(tested.intersection(map(speaker_of, clip_ids))):
            raise ValueError(
                f"{path} has {len(shared)} speakers of the trials, such as {shared[0]!r}; "
                "what is fitted must not know whom it is tested on"
            )
    return trials, to_fit, clip_lists


def _is_fitted(calibration):
    return Path(calibration).suffix == ".json"


def locate_clips(data_folder, trial_lists, clip_lists):
    """Every utterance of the lists by its id."""
    folders = [data_folder] if isinstance(data_folder, str) else data_folder
    paths = find_recordings([os.path.abspath(folder) for folder in folders])
    wanted = [*clip_lists.values(), *(trials.clip_ids for trials in trial_lists)]
    stems = {clip_id: stem_of(clip_id) for ids in wanted for clip_id in ids}
    stems = {clip_id: stem for clip_id, stem in stems.items() if stem in paths}
    for trials in trial_lists:
        trials.check_clips(stems)
    for path, clip_ids in clip_lists.items():
        for number, clip_id in enumerate(clip_ids, start=1):
            if clip_id not in stems:
                raise ValueError(f"{path}, line {number}: utterance {clip_id!r} is missing")
    lengths = read_headers({stem: paths[stem] for stem in set(stems.values())})
    if bad := sorted(reason for reason in lengths.values() if isinstance(reason, str)):
        raise ValueError(f"{len(bad)} of {len(lengths)} utterances are bad, the first: {bad[0]}")
    return {
        clip_id: Clip(clip_id, paths[stem], 0, lengths[stem]) for clip_id, stem in stems.items()
    }


def embed(source, lists, clips, folder, device, **options):
    """A model's embeddings by utterance id, the sizes that it has, and its parameters' number.

    Each list has a store of those of its utterances that no list before it has, named after them.
    """
    encoder = load_teacher(source, device=device)
    embeddings, name = {}, fingerprint(encoder)[:16]
    for list_name, clip_ids in lists.items():
        new = [clips[clip_id] for clip_id in clip_ids if clip_id not in embeddings]
        if new:
            digest = hashlib.sha256("\n".join(sorted(clip.id for clip in new)).encode())
            store = TeacherStore(Path(folder) / f"{list_name}-{digest.hexdigest()[:8]}")
            store.fill({name: encoder}, new, device, max_seconds=None, **options)
            embeddings |= dict(zip(store.rows, store.embeddings[name]))
    full_size = len(next(iter(embeddings.values())))
    sizes, _ = sizes_and_thresholds(encoder, full_size)
    return embeddings, sizes, sum(p.numel() for p in encoder.parameters())


class Steps:
    """What is done with a model's embeddings, the same on every list.

    Each step works on what the one before it left: cosine, cosine of centred embeddings,
    normalised by a cohort, calibrated. PLDA stands on its own.

    Arguments
    ---------
    embeddings : dict of str to torch.Tensor
        (D,) by utterance id.
    mrl_dims : list of int
    clip_lists : dict of str to list of str
        Clip ids by path of their list.
    seconds : dict of str to float
        Length of each utterance.
    hparams : dict
    """

    def __init__(self, embeddings, mrl_dims, clip_lists, seconds, hparams):
        self.embeddings, self.mrl_dims, self.seconds = embeddings, mrl_dims, seconds
        self.n_bootstrap, self.cohort_top = hparams["n_bootstrap"], hparams["cohort_top"]
        found = {
            path: torch.stack([embeddings[i] for i in ids]) for path, ids in clip_lists.items()
        }
        self.domain, self.cohort, self.plda = (found.get(hparams[role]) for role in CLIP_LISTS)
        if self.plda is not None:
            self.plda_speakers = [speaker_of(clip_id) for clip_id in clip_lists[hparams["plda"]]]
        self.calibrations = None

    def uncalibrated(self, trials):
        """Scores by step and size, {"cosine": {64: (n_trials,)}, ...}, the last one the best."""
        clips, cohort = trials.stack(self.embeddings), self.cohort
        steps = {"cosine": score_trials(clips, trials, self.mrl_dims)}
        if self.domain is not None:
            mean = self.domain.mean(0)
            clips, cohort = clips - mean, None if cohort is None else cohort - mean
            steps["centred"] = score_trials(clips, trials, self.mrl_dims)
        if cohort is not None:
            _, cosines = _last(steps)
            steps["as_norm"] = s_norm(cosines, clips, trials, cohort, self.cohort_top)
        return steps

    def fit_calibration(self, trials, p_target):
        """Learn on these trials what the last step's scores are worth."""
        self.calibrated_step, scores = _last(self.uncalibrated(trials))
        quality = log_durations(trials, self.seconds)
        self.calibrations = {
            size: Calibration.fit(values, trials.labels, quality, p_target)
            for size, values in scores.items()
        }

    def read_calibration(self, path):
        """Use the calibration of an earlier run."""
        self.calibrations, self.calibrated_step = read_calibrations(path)

    def scores(self, trials):
        """Scores of every step, by step and size."""
        steps = self.uncalibrated(trials)
        if self.calibrations is not None:
            step, scores = _last(steps)
            if step != self.calibrated_step or not scores.keys() <= self.calibrations.keys():
                raise ValueError(
                    f"the calibration is of {self.calibrated_step} at {sorted(self.calibrations)} "
                    f"dimensions, this run's scores are {step} at {sorted(scores)}"
                )
            quality = log_durations(trials, self.seconds)
            steps["calibrated"] = {
                size: self.calibrations[size](values, quality) for size, values in scores.items()
            }
        if self.plda is not None:
            clips = trials.stack(self.embeddings)
            fit = self.plda, self.plda_speakers
            steps["plda"] = plda_scores(clips, trials, *fit, self.mrl_dims)
        return steps

    def results(self, trials, steps):
        """A report's part on one list."""
        found = {
            step: evaluate_scores(scores, trials, self.n_bootstrap, step == "calibrated")
            for step, scores in steps.items()
        }
        dims = found.pop("cosine")
        for size in dims:
            dims[size] |= {step: by_size[size] for step, by_size in found.items()}
        by_duration = eer_by_duration(
            steps["cosine"], trials, self.seconds, n_bootstrap=self.n_bootstrap
        )
        return {"trials": count_trials(trials), "dims": dims, "by_duration": by_duration}


def _name(source):
    return type(source).__name__ if isinstance(source, torch.nn.Module) else str(source)


def _last(steps):
    return list(steps.items())[-1]


def verify(hparams, device):
    """Embed, score, evaluate; write and print the report."""
    started = time.time()
    folder = Path(hparams["output_folder"])
    trials, to_fit, clip_lists = read_lists(hparams)
    trial_lists = [*trials.values(), *([] if to_fit is None else [to_fit])]
    clips = locate_clips(hparams["data_folder"], trial_lists, clip_lists)
    options = {"folder": folder / "embeddings", "device": device}
    options |= {key: hparams[key] for key in ("batch_seconds", "num_workers")}
    tested = {f"trials/{name}": one.clip_ids for name, one in trials.items()}
    roles = [role for role in CLIP_LISTS if hparams[role] is not None]
    fitted = {role: clip_lists[hparams[role]] for role in roles}
    if to_fit is not None:
        fitted["calibration"] = to_fit.clip_ids
    embeddings, mrl_dims, params = embed(hparams["source"], tested | fitted, clips, **options)
    other = None
    if hparams["compare_to"] is not None:
        other, other_dims, _ = embed(hparams["compare_to"], tested, clips, **options)
        other_dim = None if set(mrl_dims) <= set(other_dims) else other_dims[-1]
    if not if_main_process():
        return

    seconds = {clip_id: clip.num_frames / SAMPLE_RATE for clip_id, clip in clips.items()}
    pipeline = Steps(embeddings, mrl_dims, clip_lists, seconds, hparams)
    if to_fit is not None:
        pipeline.fit_calibration(to_fit, hparams["calibration_p_target"])
        fitted_file = folder / "calibration.json"
        write_calibrations(pipeline.calibrations, fitted_file, pipeline.calibrated_step)
    elif hparams["calibration"] is not None:
        pipeline.read_calibration(hparams["calibration"])

    parts, cosines = {}, {}
    for name, one in trials.items():
        steps = pipeline.scores(one)
        cosines[name], parts[name] = steps["cosine"], pipeline.results(one, steps)
        if other is not None:
            sizes = mrl_dims if other_dim is None else [other_dim]
            others = score_trials(one.stack(other), one, sizes)
            differences = compare(cosines[name], others, one, pipeline.n_bootstrap)
            about = {"source": _name(hparams["compare_to"]), "size": other_dim}
            parts[name]["comparison"] = about | {"dims": differences}

    report_on(hparams, trials, parts, cosines, params, started)


def report_on(hparams, trials, parts, cosines, params, started):
    """Write the report, of the first list with a part for each, and every list's plots; print."""
    folder = Path(hparams["output_folder"])
    first, *_ = trials
    report = make_report(
        parts[first]["dims"],
        trials[first],
        baselines={},
        corpus=str(hparams["data_folder"]),
        params=params,
        seconds=round(time.time() - started, 1),
    )
    report |= {**parts[first], "source": _name(hparams["source"]), "list": first, "lists": parts}
    write_report(report, folder)
    for name, one in trials.items():
        place = folder if name == first else folder / name
        place.mkdir(exist_ok=True)
        write_plots(report | parts[name], cosines[name], one.labels, place)
        print(f"\n{name}")
        print_report(report | parts[name])
    print(f"Report and plots: {folder}")


def main(argv):
    """From the command line to the report."""
    if {"-h", "--help"}.intersection(argv):
        return print(help_text(__doc__, argv, "verify.yaml"))
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    document = read_yaml(hparams_file, overrides)
    check(parse(document), VERIFICATION)
    hparams = load_hyperpyyaml(resolved(document))
    limit_workers(hparams)
    options = run_options(run_opts, hparams)
    device = check_device(options.get("device") or "cpu")
    ddp_init_group(options)
    with only_run(hparams["output_folder"]):
        verify(hparams, device)


if __name__ == "__main__":
    run_command(main)
