"""What a training leaves behind: the report of its test trials, and the model folder."""

import json
import time
from collections import defaultdict
from pathlib import Path

from read_hparams import is_demo

from speechbrain_mrl import export_model
from speechbrain_mrl.dataio.clips import iter_clips, read_clips, speaker_of
from speechbrain_mrl.evaluation.baselines import evaluate_student
from speechbrain_mrl.evaluation.plots import write_plots
from speechbrain_mrl.evaluation.report import agreement, make_report, print_report, write_report
from speechbrain_mrl.evaluation.verification import read_trials, score_trials
from speechbrain_mrl.inference.extract import embed_clips
from speechbrain_mrl.models.releases import release_license
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.utils import replacing

ENROLMENT_CLIPS = 5  # a training speaker's, for the exported classifier
N_BOOTSTRAP = 200  # draws of speakers for the report's 95 % intervals


def report_agreement(student, teachers, corpus, hparams, **embed_options):
    """Write and print the student's agreement with its teachers on the validation utterances."""
    clips = read_clips(corpus.valid_csv)
    found = embed_clips({"student": student, **teachers}, clips, **embed_options)
    result = agreement(found.pop("student"), found, hparams["mrl_dims"])
    path = Path(hparams["output_folder"]) / "agreement.json"
    text = json.dumps({"clips": len(clips), "dims": result}, indent=2, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n")
    print(
        f"agreement with the teachers on {len(clips)} unlabelled utterances (correlation of cosines)"
    )
    for dim, value in result.items():
        print(f"{dim:>6}{value:9.3f}")


def report_on(
    student,
    start,
    teachers,
    fit_embeddings,
    fit_labels,
    corpus,
    hparams,
    started,
    **embed_options,
):
    """Verify student and baselines on the test trials; write and print the report.

    ``start`` is the student before its first step, or None. ``teachers`` and ``fit_embeddings`` are
    the teachers' embeddings of test and training utterances; ``fit_labels`` are the speakers of the
    latter as numbers, or None.
    """
    trials, clips = read_trials(corpus.test_trials), read_clips(corpus.test_csv)
    trials.check_clips({clip.id for clip in clips})
    students = {"student": student}
    if start is not None:
        students["start"] = start.to(embed_options["device"])

    def stack(found):
        ids = [clip.id for clip in clips]
        return {name: trials.stack(dict(zip(ids, x, strict=True))) for name, x in found.items()}

    whole = {**embed_options, "max_seconds": None}  # as verify.py embeds them
    found, mrl_dims = stack(embed_clips(students, clips, **whole)), hparams["mrl_dims"]
    results = evaluate_student(
        found["student"],
        trials,
        mrl_dims,
        found.get("start"),
        stack(teachers),
        fit_embeddings,
        N_BOOTSTRAP,
        fit_labels,
    )
    report = make_report(
        trials=trials,
        corpus="demo" if is_demo(hparams) else hparams["data_folder"],
        params=sum(p.numel() for p in student.parameters()),
        seconds=round(time.time() - started, 1),
        **results,
    )
    folder = Path(hparams["output_folder"])
    write_report(report, folder)
    scores = score_trials(found["student"], trials, mrl_dims)
    write_plots(report, scores, trials.labels, folder)
    print_report(report)
    return report


def enrol(student, corpus, **embed_options):
    """Embeddings of a few utterances of each training speaker, for the exported classifier."""
    clips = defaultdict(list)
    for clip in iter_clips(corpus.train_csv):
        found = clips[speaker_of(clip.id)]
        if len(found) < ENROLMENT_CLIPS:
            found.append(clip)
    chosen = [clip for found in clips.values() for clip in found]
    embeddings = embed_clips({"student": student}, chosen, **embed_options)["student"]
    of_each = embeddings.split([len(found) for found in clips.values()])
    return dict(zip(clips, of_each, strict=True))


def export(student, speakers, teachers, report, corpus, hparams):
    """Write the model folder."""
    licenses = {name: release_license(name, hparams["teacher_dataset"]) for name in teachers}
    if is_demo(hparams):  # the repository's own
        licenses = dict.fromkeys(teachers, hparams["license"])
    first_clips = {}
    for clip in iter_clips(corpus.train_csv) if speakers else ():
        first_clips.setdefault(speaker_of(clip.id), clip.wav)
    folder = Path(hparams["output_folder"])
    export_model(
        student,
        folder / "model",
        Provenance(
            hparams["model_title"],
            hparams["license"],
            hparams["training_data"],
            teachers=licenses,
            trials=str(hparams["trials"] or "made from held-out speakers of the same corpus"),
        ),
        report=report,
        plot=None if report is None else folder / "eer_by_dim.png",
        speakers=speakers,
        examples=dict(list(first_clips.items())[: hparams["card_examples"]]),
    )
