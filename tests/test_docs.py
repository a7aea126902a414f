"""Every code block of README and docs does what it says: Python is run, commands are checked."""

import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import encoders
import huggingface_hub
import numpy as np
import publish
import pytest
import soundfile
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from read_hparams import read_yaml, split_stages
from ruamel.yaml import YAML
from speechbrain.utils import fetching

from speechbrain_mrl import cli as command_line
from speechbrain_mrl import export_model
from speechbrain_mrl.models import redimnet
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.publish.card import Provenance
from speechbrain_mrl.training import distill as training

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    ROOT / "recipes/voxceleb/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
RECIPE_YAML = ROOT / "hparams" / "mrl_distill.yaml"
SIZES = (64, 128, 192, 256)
DEMO = "results/mrl_distill/1986"  # what the demo leaves, by the names that it gives
MODEL = f"{DEMO}/model"
# What stands in a page, and what the test puts in its place.
PLACES = {"org/redimnet-mrl": MODEL, "ORG/NAME": "org/tiny", "results/voxceleb/model": MODEL}
PROGRAMS = (
    "mypy",
    "ruff",
    "pre-commit",
    "python3 -m venv",
    ". .venv",
    "hf auth",
    "tensorboard --logdir",
    "pytest",
    "mkdocs",
)
PROGRAMS += ("python -m speechbrain_mrl.publish.space --model",)  # serves until it is stopped


def blocks(page):
    """(line, language, text) of each fenced block of a page."""
    fence, found = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S), []
    text = page.read_text(encoding="utf-8")
    for match in fence.finditer(text):
        found.append((text[: match.start()].count("\n") + 1, match[1], match[2]))
    assert text.count("```") == 2 * len(found), f"{page} has a fence that is not closed"
    return found


def commands(language):
    """Commands of all blocks in a shell's language and of sentences, each by its page and line."""
    for page in PAGES:
        inside = re.findall(r"`(?:python )?(benchmarks/\w+\.py[^`]*)`", page.read_text("utf-8"))
        for number, command in enumerate(inside):
            yield pytest.param(
                ["python", *shlex.split(command)], id=f"{page.name}, sentence {number}"
            )
        for line, found, text in blocks(page):
            if found != language:
                continue
            for command in text.replace("\\\n", " ").splitlines():
                for part in command.split("&&"):
                    if words := shlex.split(part, comments=True):
                        yield pytest.param(words, id=f"{page.name}:{line}:{words[-1][:30]}")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_config, random_model, small_corpus, voices):
    """A folder with all that the pages speak of, small."""
    place = tmp_path_factory.mktemp("workplace")
    release = random_model({**tiny_config, "embed_dim": 192})
    hub = place / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    content = {"model_config": release.model_config, "state_dict": release.state_dict()}
    for name in ("b0-vox2-ft_lm", "b2-vox2-ft_lm", "b6-vox2-ft_lm", "b0-vox2-ptn", "b2-vox2-ptn"):
        torch.save(content, hub / f"{name}.pt")
    student = MatryoshkaReDimNet.from_redimnet(release, 256, SIZES).eval()
    dims = {str(d): {"eer": 0.1, "min_dcf": 0.5, "threshold": 0.3} for d in SIZES}
    trials = {"target": 30, "impostor": 150}
    report = {"dims": dims, "trials": trials, "corpus": "demo", "baselines": {}}
    provenance = Provenance("Tiny", "cc-by-4.0", "Nothing.", trials="a list")
    export_model(student, place / MODEL, provenance, report=report)
    demo_clips = {
        f"{voice}/{clip}": (number, take)
        for number, voice in enumerate(("demo0000", "demo0006"))
        for take, clip in enumerate(("s00/00000.wav", "s01/00002.wav", "s03/00006.wav"))
    }
    for clip, (number, take) in demo_clips.items():
        path = place / DEMO / "voices/wav" / clip
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, voices(number, 1.0, take).numpy(), 16000)
    (place / DEMO / "lists").mkdir()
    first, second, _, _, _, other = demo_clips
    demo_trials = f"1 {first} {second}\n0 {first} {other}\n"
    (place / DEMO / "lists/test_trials.txt").write_text(demo_trials)
    meeting = torch.cat([voices(speaker, 6.0) for speaker in (1, 2, 1)])
    soundfile.write(place / "meeting.wav", meeting.numpy(), 16000)
    shutil.copytree(small_corpus / "wav", place / "data" / "recordings")
    shutil.copytree(small_corpus / "wav", place / "calls")
    clips = ["id00/s0/0.wav", "id00/s1/0.wav", "id01/s0/0.wav"]
    encoders.write_published(place / "speechbrain" / "spkrec-ecapa-voxceleb", "ecapa")
    lines = f"1 {clips[0]} {clips[1]}\n0 {clips[0]} {clips[2]}\n"
    (place / "data" / "veri_test2.txt").write_text(lines)
    return place


@pytest.fixture
def at_work(workplace, monkeypatch, tiny_config):
    """In that folder; released architectures are tiny, trainings short, nothing is uploaded."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(workplace / "hub"))
    tiny = {name: tiny_config for name in redimnet.PRESETS}
    monkeypatch.setattr(redimnet.ReDimNet, "presets", tiny)
    for module in (sys.modules["speechbrain_mrl.publish.hub"],):
        monkeypatch.setattr(module, "push_to_hub", lambda folder, repo_id, **_: str(repo_id))
        monkeypatch.setattr(module, "push_space", lambda space, model, **_: space)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: MODEL)
    epochs = training.EpochCounter
    monkeypatch.setattr(training, "EpochCounter", lambda limit: epochs(1))
    monkeypatch.chdir(workplace)
    return workplace


def names_of_a_page(workplace):
    """What pages take for granted."""
    wavs = 0.1 * torch.randn(4, 16000)
    clips = np.loadtxt(workplace / "data/veri_test2.txt", dtype=str)[:, 1:].ravel()
    return {
        "wavs": wavs,
        "wav_lens": torch.ones(4),
        "model": MatryoshkaReDimNet().eval(),
        "report": None,
        "speakers": {"ann": torch.ones(256)},
        "embeddings_by_clip_id": {clip: torch.randn(256) for clip in clips},
        "cohort": torch.randn(400, 256),
    }


EXTRAS = {
    "inference.md": ["onnxscript", "openvino"],
    "runtimes.md": ["onnxscript", "sherpa_onnx", "pyannote.audio", "sentence_transformers"],
    "search.md": ["faiss", "milvus_lite"],
}
PYTHON_PAGES = [page for page in PAGES if any(b[1] == "python" for b in blocks(page))]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, at_work, monkeypatch):
    for module in EXTRAS.get(page.name, ()):
        pytest.importorskip(module)
    names = names_of_a_page(at_work)
    torch.manual_seed(0)
    for line, language, text in blocks(page):
        if language != "python":
            continue
        if "FetchConfig" in text and not hasattr(fetching, "FetchConfig"):
            pytest.skip("the page shows SpeechBrain 1.1's way and says what 1.0 has instead")
        text = text.replace('"/data/', f'"{at_work}/data/')
        for ours, small in PLACES.items():
            text = text.replace(f'source="{ours}"', f'source="{small}"')
        with torch.no_grad() if "train_distilled_mrl" not in text else torch.enable_grad():
            exec(compile("\n" * line + text, page, "exec"), names)  # noqa: S102


@pytest.mark.parametrize("words", list(commands("bash")))
def test_a_command_has_the_options_that_it_uses(words, at_work):
    while "=" in words[0]:  # VARIABLE=value in front
        words = words[1:]
    line = " ".join(words)
    if words[:2] == ["pip", "install"]:
        return check_pip(words[2:])
    if line.startswith(PROGRAMS):
        return None
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if words[0] == "speechbrain-mrl":
        return check_own_command(words[1:])
    if words[:3] == ["python", "-m", "speechbrain_mrl"]:
        return check_own_command(words[3:])
    assert words[0] in ("python", "torchrun") and script is not None, f"unknown program: {line}"
    path, options = ROOT / words[script], words[script + 1 :]
    assert path.is_file(), f"{line}: there is no {path}"
    if path.name in ("train.py", "verify.py"):
        check_recipe(path.name, options)
    elif path.name == "publish.py":
        publish.main(options)
    else:
        source, keys = path.read_text(encoding="utf-8"), YAML().load(RECIPE_YAML)
        if "timing" in source:
            source += path.with_name("timing.py").read_text(encoding="utf-8")
        for option in (word.split("=")[0] for word in options if word.startswith("--")):
            known = f'"{option}"' in source or option.removeprefix("--") in keys
            assert known, f"{path} has no option {option}"
    return None


def check_pip(words):
    """Extras that a pip install names are those of setup.cfg."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for word in words:
        for extra in re.findall(r"\[(.*)\]", word):
            assert set(extra.split(",")) <= set(config["options.extras_require"])


def check_own_command(words):
    """Run it, as it stands, in the small workplace."""
    if "--help" in words or "VoxCeleb" in " ".join(words):
        command_line.parser().parse_args(
            [word for word in words if word != "--help"] or ["info", ""]
        )
    else:
        assert command_line.main([PLACES.get(word, word) for word in words]) == 0


def check_recipe(script, options):
    """The YAML is there and every override is one of its keys."""
    yaml = ROOT / options[0]
    _, _, overrides = sb.parse_arguments([str(yaml), *options[1:]])
    if script == "train.py":  # an unknown key raises
        split_stages(read_yaml(yaml, overrides))
    else:
        keys = YAML().load(yaml)
        assert set(load_hyperpyyaml(overrides)) <= set(keys), overrides


def test_yaml_blocks_have_only_keys_of_the_recipe():
    keys = set(YAML().load(RECIPE_YAML))
    found = [text for page in PAGES for _, language, text in blocks(page) if language == "yaml"]
    assert found
    for text in found:
        assert set(YAML().load(text)) <= keys


def test_every_block_says_its_language_and_none_is_indented():
    for page in PAGES:
        languages = {language for _, language, _ in blocks(page)}
        assert languages <= {"bash", "python", "yaml", "text"}, page
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert not re.search(r"\n\n    \S", text), f"{page} has an indented block"


def test_links_of_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(
            r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")
        ):
            assert (page.parent / target).exists(), f"{page} links {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # not -q: it hides warnings
    command += ["-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<math" in (tmp_path / "site" / "objective" / "index.html").read_text(encoding="utf-8")
    api = (tmp_path / "site" / "reference" / "models" / "index.html").read_text(encoding="utf-8")
    assert "Parameters" in api and "Arguments\n" not in api
    training_page = tmp_path / "site" / "reference" / "training" / "index.html"
    assert "DEFAULTS" not in training_page.read_text(encoding="utf-8")  # values are shown
    notebook = (tmp_path / "site" / "notebook" / "index.html").read_text(encoding="utf-8")
    assert "<img" in notebook  # its outputs are stored
    assert (tmp_path / "site" / "examples" / "diarise.py").is_file()
