"""Writes a published model's card, every figure of it out of the model's report, and checks it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub  # its classes cost a second and load on first use

from speechbrain_mrl.utils import read_json

REPO_ID = "ORG/NAME"  # stands in a card until the upload knows better
OWN_LICENSES = ("non-commercial", "not stated")
METRICS = {"eer": "EER (fraction)", "min_dcf": "minDCF (p = 0.01)"}


@dataclass(frozen=True)
class Provenance:
    """What a model was made from; its card says so.

    Arguments
    ---------
    title : str
        The card's headline.
    license : str
        The weights' licence, by the Hub's name for it: "cc-by-4.0", "cc-by-nc-sa-4.0", …; or
        "non-commercial", or "not stated", with which nothing is uploaded.
    training_data : str
        A sentence on the speech that the weights were trained on.
    teachers : mapping of str to str
        Name of each model that taught this one, or that it started from -> its weights' licence.
    datasets : sequence of str
        Training sets, by their names on the Hub.
    trials : str
        Name of the trial list behind the report.

    Raises
    ------
    ValueError
        If a teacher's licence forbids commercial use and the model's does not.

    Example
    -------
    >>> Provenance("ReDimNet-MRL", "cc-by-4.0", "VoxCeleb2.", teachers={"M": "cc-by-nc-sa-4.0"})
    Traceback (most recent call last):
    ...
    ValueError: license 'cc-by-4.0' allows commercial use, which the teachers ['M'] do not: ...
    """

    title: str = "ReDimNet-MRL"
    license: str = "not stated"
    training_data: str = "Not stated."
    teachers: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    trials: str = ""

    def __post_init__(self) -> None:
        for name in ("title", "license", "training_data"):
            if not getattr(self, name):
                raise ValueError(f"{name} must say something about the model, it is empty")
        object.__setattr__(self, "datasets", tuple(self.datasets))  # JSON gives a list
        strict = [name for name, license in self.teachers.items() if _is_noncommercial(license)]
        if strict and not _is_noncommercial(self.license):
            raise ValueError(
                f"license {self.license!r} allows commercial use, which the teachers {strict} do "
                "not: a student of theirs needs a licence with the same restriction, such as "
                f"{self.teachers[strict[0]]!r}"
            )


def _is_noncommercial(license: str) -> bool:
    return license == "non-commercial" or "nc" in license.split("-")


def write_card(
    sizes: Sequence[int],
    provenance: Provenance,
    report: Mapping[str, Any] | None,
    has_plot: bool,
    n_speakers: int,
    widget: Sequence[Mapping[str, Any]],
    encoder: str = "ReDimNet",
    padding_cosine: float = 1.0,
) -> str:
    """The text of README.md; the repo's name is left open until the upload (``card_for``).

    Example
    -------
    >>> provenance = Provenance("ReDimNet b0", "cc-by-4.0", "VoxCeleb2.")
    >>> card = write_card([192], provenance, None, has_plot=False, n_speakers=0, widget=[])
    >>> huggingface_hub.ModelCard(card).data.license
    'cc-by-4.0'
    """
    if report is not None:
        _check_report(report, sizes, provenance)
    front = huggingface_hub.ModelCardData(
        library_name="speechbrain",
        # What the Hub has no name for is "other" there, with a name of its own.
        license="other" if provenance.license in OWN_LICENSES else provenance.license,
        license_name=provenance.license if provenance.license in OWN_LICENSES else None,
        pipeline_tag="audio-classification" if n_speakers else None,
        tags=["speechbrain", "speaker-verification", "speaker-recognition", "embeddings"]
        + [encoder.lower(), "matryoshka", "pytorch"],
        datasets=list(provenance.datasets) or None,
        model_name=provenance.title,
        eval_results=None if report is None else _eval_results(sizes, provenance, report),
        widget=widget or None,
    )
    if len(sizes) == 1:
        about_sizes = f"An embedding has {sizes[0]} dimensions."
    else:
        about_sizes = (
            f"Its first {_choices(sizes[:-1])} dimensions, normalised after truncation, are "
            f"embeddings as well; all {sizes[-1]} come out of the same forward pass."
        )
    teachers = "".join(f"* {name}: {license}\n" for name, license in provenance.teachers.items())
    card = huggingface_hub.ModelCard.from_template(
        front,
        template_path=str(Path(__file__).with_name("card.md")),
        title=provenance.title,
        encoder=encoder,
        padding=_about_padding(padding_cosine),
        sizes=about_sizes,
        results="None: no trial list was scored."
        if report is None
        else _results(sizes, provenance, report, has_plot),
        repo_id=REPO_ID,
        smallest=sizes[0],
        choices=_choices(sizes),
        classification=f"`classify_batch` recognises {n_speakers} speakers, at the same sizes."
        if n_speakers
        else "It has no list of speakers to recognise.",
        training_data=provenance.training_data,
        teachers=teachers and f"Models that it started from or was distilled from:\n\n{teachers}\n",
        license=provenance.license,
        noncommercial=" and **not for commercial use**"
        if _is_noncommercial(provenance.license)
        else "",
    )
    return str(card)


def _about_padding(cosine: float) -> str:
    measured = f"(cosine {cosine:.6f} with its embedding alone, measured at export)"
    if cosine >= 0.9999:
        return f"does not depend on the rest of its batch {measured}"
    return f"changes with the padding in its batch {measured}; embed it alone"


def _check_report(report: Mapping[str, Any], sizes: Sequence[int], provenance: Provenance) -> None:
    missing = [size for size in sizes if str(size) not in report["dims"]]
    if missing:
        raise ValueError(
            f"report has no results for the sizes {missing}, only for {list(report['dims'])}; "
            "verify the model that is published"
        )
    if not provenance.trials:
        raise ValueError("provenance.trials must name the trial list that report was made on")


def _choices(sizes: Sequence[int]) -> str:
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}" if others else last


def corpus_name(report: Mapping[str, Any]) -> str:
    """Of the folder that the trials' recordings were in its name alone, as it is published."""
    return "demo" if report["corpus"] == "demo" else Path(report["corpus"]).name


def _eval_results(
    sizes: Sequence[int], provenance: Provenance, report: Mapping[str, Any]
) -> list["huggingface_hub.EvalResult"]:
    corpus = corpus_name(report)
    return [
        huggingface_hub.EvalResult(
            task_type="speaker-verification",
            task_name="Speaker verification",
            dataset_type=corpus.lower().replace(" ", "-"),
            dataset_name=f"{corpus}, {provenance.trials}",
            metric_type=metric,
            metric_name=f"{METRICS[metric]}, {size} dimensions",
            metric_value=report["dims"][str(size)][metric],
        )
        for size in sizes
        for metric in METRICS
    ]


def _results(
    sizes: Sequence[int], provenance: Provenance, report: Mapping[str, Any], has_plot: bool
) -> str:
    trials, lines = report["trials"], []
    if corpus_name(report) == "demo":
        lines += [
            "**Demo numbers**: measured on a small corpus of synthetic voices. They show that the "
            "model works, and say nothing about real speech.",
            "",
        ]
    lines += [
        f"{corpus_name(report)}, {provenance.trials}: {trials['target']} target and "
        f"{trials['impostor']} impostor trials; from `report.json`.",
        "",
        "| dimensions | EER % | minDCF (p = 0.01) | threshold |",
        "| --- | --- | --- | --- |",
    ]
    rows = {str(size): report["dims"][str(size)] for size in sizes}
    teachers = report.get("baselines", {}).get("teachers", {})
    rows |= {f"{found['dim']}: teacher {name}": found for name, found in teachers.items()}
    for name, found in rows.items():
        cells = f"{100 * found['eer']:.2f} | {found['min_dcf']:.3f} | {found['threshold']:.3f}"
        lines.append(f"| {name} | {cells} |")
    if has_plot:
        lines += ["", "![EER against embedding size](eer_by_dim.png)"]
    return "\n".join(lines)


def card_problems(folder: Path, n_labels: int, sizes: Sequence[int]) -> list[str]:
    """What keeps the card of an exported folder from being published."""
    card, problems = huggingface_hub.ModelCard.load(folder / "README.md").data, []
    if card.get("library_name") != "speechbrain":
        problems.append("README.md needs library_name: speechbrain")
    if not card.get("license") or card.get("license_name") == "not stated":
        problems.append("README.md names no license")
    if (card.get("pipeline_tag") == "audio-classification") != (n_labels > 0):
        problems.append(f"README.md has pipeline_tag {card.get('pipeline_tag')}, {n_labels} labels")
    if not (folder / "report.json").is_file():
        return [*problems, "it has no report.json; export the model with the report of its trials"]
    report = read_json(folder / "report.json")
    if report["corpus"] != corpus_name(report):
        problems.append(f"report.json names the folder {report['corpus']}; export the model again")
    dims = report["dims"]
    measured = {
        f"{name}, {size} dimensions": dims[str(size)][metric]
        for size in sizes
        for metric, name in METRICS.items()
    }
    told = {result.metric_name: result.metric_value for result in card.get("eval_results", [])}
    if told != measured:
        problems.append("README.md has a model-index with other numbers than report.json")
    return problems


def card_for(folder: Path, repo_id: str, endpoint: str) -> str:
    """The card of an exported folder with the repo's name and addresses filled in."""
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    for example in card.data.get("widget", []):
        example["src"] = huggingface_hub.hf_hub_url(repo_id, example["src"], endpoint=endpoint)
    return str(card).replace(REPO_ID, repo_id)
