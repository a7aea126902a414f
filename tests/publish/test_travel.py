"""A published model in other people's hands: copied, pickled, beside others, without this package."""

import ast
import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from speechbrain.inference.speaker import SpeakerRecognition
from test_utils import full_disk

from speechbrain_mrl import ReDimNetMRL, export_model
from speechbrain_mrl.models import kaldi, matryoshka, redimnet, redimnet2
from speechbrain_mrl.publish.load import load_published

TRAVELLERS = [Path(m.__file__) for m in (redimnet, redimnet2, matryoshka, kaldi)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each family, b0 and redimnet2_b0, random and small-headed."""
    torch.manual_seed(0)
    parent, found = tmp_path_factory.mktemp("published"), {}
    for backbone in ("b0", "redimnet2_b0"):
        model = ReDimNetMRL(32, (8, 32), backbone=backbone).eval()
        speakers = {name: torch.randn(32) for name in ("ann", "bob")}
        found[backbone] = export_model(model, parent / backbone, speakers=speakers)
    return found


@pytest.fixture(params=["b0", "redimnet2_b0"])
def folder(folders, request):
    return folders[request.param]


def wavs():
    return torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))


def load(folder):
    return SpeakerRecognition.from_hparams(folder)


def embed(model, queue):
    queue.put(model.encode_batch(wavs()).tolist())


def test_it_can_be_copied_and_pickled_also_after_a_second_load(folder):
    first, second = load(folder), load(folder)
    expected = first.encode_batch(wavs())
    for model in (first, second):
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again.encode_batch(wavs()), expected)
        assert type(model.mods.embedding_model) is type(first.mods.embedding_model)
        assert not any(isinstance(v, types.ModuleType) for v in vars(model.hparams).values())


def test_a_spawned_process_takes_it(folder):
    model, spawn = load(folder), multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=embed, args=(model, queue))
    process.start()
    found = torch.tensor(queue.get(timeout=120))
    process.join()
    torch.testing.assert_close(found, model.encode_batch(wavs()))


def test_two_families_and_an_older_definition_live_in_one_process(folders, tmp_path):
    """The older one: another text of the file, so another package and another class."""
    older = tmp_path / "older"
    export_model(load_published(folders["b0"]), older)
    text, name = (older / "hyperparams.yaml").read_text(), package(folders["b0"])
    text = text.replace(name, "redimnet_older").replace(
        "def check_wavs", "OLDER = 1\n\n\n          def check_wavs"
    )
    (older / "hyperparams.yaml").write_text(text)
    models = {name: load(path) for name, path in {**folders, "older": older}.items()}
    classes = {type(model.mods.embedding_model) for model in models.values()}
    assert len(classes) == 3
    assert {hasattr(sys.modules[c.__module__], "OLDER") for c in classes} == {True, False}
    expected = models["b0"].encode_batch(wavs())
    assert torch.equal(models["older"].encode_batch(wavs()), expected)
    assert pickle.loads(pickle.dumps(models["b0"])).encode_batch(wavs()).equal(expected)


def package(folder):
    (line,) = [
        x for x in (folder / "hyperparams.yaml").read_text().splitlines() if "package: " in x
    ]
    return line.split()[-1]


def test_what_the_process_wrote_to_import_it_is_gone_when_it_ends(folder, tmp_path):
    script = (
        "import sys; sys.modules['speechbrain_mrl'] = None\n"
        "from speechbrain.inference.speaker import SpeakerRecognition\n"
        "model = SpeakerRecognition.from_hparams(sys.argv[1])\n"
        "print(model.mods.embedding_model.__class__.__module__)\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(package(folder))
    assert not list(tmp_path.rglob("redimnet*"))


def test_a_full_disk_is_a_sentence_that_names_the_file(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    yaml = copied / "hyperparams.yaml"  # of a package that this process has not written yet
    yaml.write_text(yaml.read_text().replace(package(folder), "redimnet_of_a_full_disk"))
    message = r"cannot write .*redimnet\.py: .*; make room, or set TMPDIR"
    with full_disk(tmp_path), pytest.raises(OSError, match=message):
        load(copied)


def test_the_yaml_is_a_yaml_first_and_the_code_comes_last(folder):
    text = (folder / "hyperparams.yaml").read_text()
    before, after = text.split("definition: !apply:builtins.exec")
    assert before.count("\n") < 100 and "pretrainer:" in before and "def " not in before
    assert all(f"{path.name}: |" in after for path in TRAVELLERS[: 1 + ("redimnet2" in before)])


def test_ten_milliseconds_are_repeated_for_the_network_and_less_is_refused(folder):
    model, wavs = load(folder), 0.1 * torch.randn(1, 160)
    least = model.mods.compute_features.min_samples
    repeated = torch.cat([wavs] * 200, dim=1)[:, :least]
    torch.testing.assert_close(model.encode_batch(wavs), model.encode_batch(repeated))
    for exception in (ValueError, RuntimeError):
        with pytest.raises(exception, match="too short for an embedding"):
            model.classify_batch(wavs[:, :159], torch.ones(1))


@pytest.mark.parametrize("path", TRAVELLERS, ids=lambda path: path.name)
def test_the_files_that_travel_run_on_python_3_9_and_import_nothing_of_the_package(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports[0].module == "__future__" and imports[0].names[0].name == "annotations"
    names = {
        alias.name.split(".")[0] for n in imports if isinstance(n, ast.Import) for alias in n.names
    }
    names |= {
        n.module.split(".")[0] for n in imports if isinstance(n, ast.ImportFrom) and not n.level
    }
    allowed = {"torch", "torchaudio", "speechbrain"} | sys.stdlib_module_names
    assert names <= allowed
    for node in ast.walk(tree):  # a union is an annotation, which is not run
        if isinstance(node, ast.Assign):
            parts = [x for x in ast.walk(node.value) if isinstance(x, ast.BinOp)]
            unions = [x for x in parts if isinstance(x.op, ast.BitOr) and is_none(x.right)]
            assert not unions, (
                f"line {node.lineno}: Python 3.9 needs Optional[...] outside annotations"
            )


def is_none(node):
    return isinstance(node, ast.Constant) and node.value is None
