import hashlib
import http.server
import pickle
import re
import socket
import threading
import time
from pathlib import Path

import fill
import pytest
import torch

from speechbrain_mrl.models import releases
from speechbrain_mrl.models.pretrained import (
    ReDimNetMRL,
    load_checkpoint,
    load_pretrained_redimnet,
    load_pretrained_redimnet2,
    load_released,
    load_strictly,
    read_checkpoint,
)
from speechbrain_mrl.models.redimnet import PRESETS, ReDimNet
from speechbrain_mrl.models.redimnet2 import ReDimNet2
from speechbrain_mrl.models.releases import (
    RELEASES,
    RELEASES2,
    parse_release,
    release_license,
)

# Files and folders


@pytest.mark.parametrize("name", ["b0", "b2"])
def test_release_file_gives_the_authors_embeddings(parity, release_file, name):
    fixture = parity(name)
    path = release_file(fixture["model_config"], fixture.weights(), f"{name}-vox2-ptn")
    for model in (
        load_pretrained_redimnet(source=path),
        load_pretrained_redimnet(name, "ptn", source=str(path.parent)),
    ):
        assert not model.training
        case = fixture["cases"][0]
        with torch.no_grad():
            embeddings = model(fill.waveform(case["seconds"]))
        assert fill.max_abs_diff(embeddings, case["output"]) < 1e-5


def test_release_file_of_redimnet2_gives_the_authors_embeddings(parity, release_file):
    fixture = parity("redimnet2_b2")
    path = release_file(fixture["model_config"], fixture.weights(), "b2-vox2-ptn")
    for model in (
        load_pretrained_redimnet2(source=path),
        load_pretrained_redimnet2("b2", "ptn", source=path.parent),
        load_released("redimnet2_b2", "ptn", source=path.parent),
        load_checkpoint(path),
    ):
        assert type(model) is ReDimNet2 and not model.training
        case = fixture["cases"][0]
        with torch.no_grad():
            embeddings = model(fill.waveform(case["seconds"]))
        assert fill.max_abs_diff(embeddings, case["output"]) < 1e-5


def test_large_margin_has_one_name_where_both_families_are_named(
    tiny_config, tiny_config2, release_file
):
    folder = release_file(tiny_config, name="b2-vox2-ft_lm").parent
    release_file(tiny_config2, name="b2-vox2-lm")
    for train_type in ("ft_lm", "lm"):
        assert type(load_released("b2", train_type, source=folder)) is ReDimNet
        assert type(load_released("redimnet2_b2", train_type, source=folder)) is ReDimNet2


def test_file_of_the_other_family_is_recognised_and_named(tiny_config, tiny_config2, release_file):
    first = release_file(tiny_config, name="b2-vox2-ptn")
    second = release_file(tiny_config2, name="b6-vox2-ptn")
    message = (
        "b6-vox2-ptn.pt holds a ReDimNet2, not a ReDimNet; load it with load_pretrained_redimnet2,"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained_redimnet("b6", "ptn", source=second.parent)
    message = (
        "b2-vox2-ptn.pt holds a ReDimNet, not a ReDimNet2; load it with load_pretrained_redimnet,"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained_redimnet2(source=first)


def test_what_was_trained_on_voxblink2_is_said_to_be_non_commercial(tiny_config2, release_file):
    path = release_file(tiny_config2, name="b6-vb2+vox2_v0-lm")
    with pytest.warns(
        UserWarning, match=r"b6-vb2\+vox2_v0-lm.pt was trained on VoxBlink2, .* not for"
    ):
        load_pretrained_redimnet2("b6", dataset="vb2+vox2_v0", source=path.parent)


def test_missing_file_is_named_with_the_place_where_it_is_to_be_had(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained_redimnet("b5", "ptn", source=tmp_path)
    assert f"{str(tmp_path)!r} is neither a checkpoint nor a folder" in str(error.value)
    assert "download it from https://github.com/IDRnD/ReDimNet/" in str(error.value)
    assert str(error.value).endswith("/b5-vox2-ptn.pt")


def test_missing_file_of_an_own_model_is_not_said_to_be_released(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder that holds demo0-mine-ptn.pt$"):
        load_pretrained_redimnet("demo0", "ptn", "mine", source=tmp_path)


@pytest.mark.parametrize(
    "names, file",
    [
        (("b9",), "b9-vox2-ft_lm.pt"),
        (("b2", "ft_mix"), "b2-vox2-ft_mix.pt"),
        (("M", "ptn"), "M-vox2-ptn.pt"),
        (("S", "ft_mix", "vb2"), "S-vb2-ft_mix.pt"),
        (("b2", "ptn", "vox1"), "b2-vox1-ptn.pt"),
    ],
)
def test_model_that_was_never_released_is_refused(names, file):
    known = "b0/b1/b2/b3/b4/b5/b6-vox2-ptn/ft_lm, S/M-vb2-ptn, S/M-vb2+vox2+cnc-ft_mix"
    message = f"{file} of ReDimNet was never released; released are {known}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_pretrained_redimnet(*names)


def test_redimnet2_that_was_never_released_is_refused():
    known = "b0/b1/b2/b3/b4/b5/b6-vox2-ptn/lm, b6-vb2+vox2_v0-ptn/lm/dis, "
    message = f"b2-vox2-ft_lm.pt of ReDimNet2 was never released; released are {known}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}b3/b6-vb2"):
        load_pretrained_redimnet2("b2", "ft_lm")


def test_a_release_is_named_by_model_dataset_and_training():
    assert parse_release("S-vb2+vox2+cnc-ft_mix") == ("S", "vb2+vox2+cnc", "ft_mix")
    expected = ("redimnet2_b6", "vb2+vox2_v0", "dis")
    assert parse_release("redimnet2_b6-vb2+vox2_v0-dis") == expected


def test_a_models_name_alone_is_its_usual_release():
    assert parse_release("b2") == ("b2", "vox2", "ft_lm")
    assert parse_release("redimnet2_b2") == ("redimnet2_b2", "vox2", "lm")
    assert parse_release("M", "ft_mix", "vb2+vox2+cnc") == ("M", "vb2+vox2+cnc", "ft_mix")


@pytest.mark.parametrize(
    ("name", "dataset", "licence"),
    [
        ("b2", "vox2", "cc-by-4.0"),
        ("M-vb2-ptn", "vox2", "non-commercial"),
        ("b2-vox2-ptn", "vb2", "cc-by-4.0"),
        ("b2", "vb2", "not stated"),
        ("mine", "vox2", "not stated"),
        ("b2-org/b2-vox2-ptn", "vox2", "not stated"),
    ],
)
def test_a_teachers_licence_is_that_of_its_release(name, dataset, licence):
    assert release_license(name, dataset) == licence


@pytest.mark.parametrize("name", ["b2-vox2", "b2-vox2-ft-lm", "b2-vox1-ptn", "vox2-b2-ptn"])
def test_what_is_no_release_is_told_how_one_is_named(name):
    message = f"like b2, b2-vox2-ft_lm or .*'vox2', 'vb2', 'vb2.vox2.cnc'.* got '{name}'$"
    with pytest.raises(ValueError, match=message):
        parse_release(name)


def test_docs_list_every_release_with_its_licence():
    text = (Path(__file__).parents[2] / "docs" / "releases.md").read_text()
    rows = {
        cells[1].strip(" `"): cells
        for line in text.splitlines()
        if len(cells := line.split("|")) > 8
    }
    for dataset, release in RELEASES.items():
        licence = "CC BY 4.0" if release["license"] == "cc-by-4.0" else "non-commercial"
        for model_name in release["model_names"]:
            for train_type in release["train_types"]:
                row = rows.pop(f"{model_name}-{dataset}-{train_type}.pt")
                assert row[7].strip() == licence
                assert row[8].strip() == {
                    **dict.fromkeys(("b0", "b2", "b5"), "as released"),
                    **dict.fromkeys(("S", "M"), "none"),
                }.get(model_name, "third party's")
    assert set(rows) == {"file", "---"}


def test_docs_list_every_release_of_redimnet2_with_its_licence_and_hash():
    text = (Path(__file__).parents[2] / "docs" / "which_redimnet.md").read_text()
    rows = {
        cells[1].strip(" `"): cells
        for line in text.splitlines()
        if len(cells := line.split("|")) > 1 and cells[1].strip(" `").endswith(".pt")
    }
    for dataset, release in RELEASES2.items():
        for model_name in release["model_names"]:
            for train_type in release["train_types"]:
                name = f"{model_name}-{dataset}-{train_type}.pt"
                cells = [cell.strip() for cell in rows.pop(name)]
                assert cells[7] == ("MIT" if release["license"] == "mit" else "non-commercial")
                assert cells[8].strip("`") == releases.SHA256.get(name, "–")
    assert not rows


# Damage


def test_sha256_is_checked(tiny_config, release_file):
    path = release_file(tiny_config)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    load_pretrained_redimnet(source=path, sha256=digest.upper())
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, expected {'0' * 64}"):
        load_pretrained_redimnet(source=path, sha256="0" * 64)


def test_missing_and_unexpected_keys_are_listed(tiny_config, random_model, release_file):
    state_dict = random_model(tiny_config).state_dict()
    del state_dict["bn.running_mean"], state_dict["backbone.stem.0.weight"]
    state_dict["classifier.weight"] = torch.zeros(3)
    path = release_file(tiny_config, state_dict)
    with pytest.raises(ValueError) as error:
        load_pretrained_redimnet(source=path)
    assert str(error.value) == (
        f"{path} does not fit the model: "
        "2 missing: ['backbone.stem.0.weight', 'bn.running_mean']; "
        "1 unexpected: ['classifier.weight']"
    )


def test_tensors_of_another_shape_and_other_things_are_listed(
    tiny_config, random_model, release_file
):
    state_dict = random_model(tiny_config).state_dict()
    state_dict["linear.weight"] = state_dict["linear.weight"][:, :-1]
    state_dict["linear.bias"] = 3
    path = release_file(tiny_config, state_dict)
    message = r"2 of another shape: \['linear.bias \(\)', 'linear.weight \(32, 191\)'\]"
    with pytest.raises(ValueError, match=message):
        load_pretrained_redimnet(source=path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_listed(tiny_config, random_model, release_file, number):
    state_dict = random_model(tiny_config).state_dict()
    state_dict["bn.running_var"][3] = number
    with pytest.raises(ValueError, match=r"1 not finite: \['bn.running_var'\]"):
        load_pretrained_redimnet(source=release_file(tiny_config, state_dict))


def test_weights_of_another_redimnet_are_refused_with_the_ways_there_are(tiny_config):
    student = ReDimNet.from_config(tiny_config)
    state_dict = ReDimNet.from_config(PRESETS["b0"]).state_dict()
    with pytest.raises(ValueError, match="b0.pt is of another ReDimNet .*train_distilled_mrl"):
        load_strictly(student, state_dict, "b0.pt")


def test_key_names_of_old_releases_are_refused_with_the_reason(
    tiny_config, random_model, release_file
):
    state_dict = random_model(tiny_config).state_dict()
    state_dict["backbone.inputs_weights.0"] = state_dict.pop("backbone.stage0.0.w")
    with pytest.raises(ValueError, match="key names of releases before 2024.11; get today's file"):
        load_pretrained_redimnet(source=release_file(tiny_config, state_dict))
    with pytest.raises(ValueError, match="key names of releases before 2024.11"):
        random_model(tiny_config).load_state_dict(state_dict)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_file_is_called_damaged(tiny_config, release_file, share):
    path = release_file(tiny_config)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="b2-vox2-ft_lm.pt is damaged or holds more than tensors"):
        load_pretrained_redimnet(source=path)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], r"must hold \['model_config', 'state_dict'\]"),
        ({"state_dict": {}}, r"must hold \['model_config', 'state_dict'\]"),
        ({"model_config": {}, "state_dict": [1]}, "its state_dict is a list"),
        ({"model_config": "b2", "state_dict": {}}, "model_config must be a mapping, got str"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_pretrained_redimnet(source=tmp_path / "a.pt")


class Payload:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def save_as_plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_as_plain_pickle])
def test_code_in_a_checkpoint_does_not_run(tmp_path, tiny_config, save):
    path, proof = tmp_path / "evil.pt", tmp_path / "ran"
    save({"model_config": tiny_config, "state_dict": {"x": Payload(proof)}}, path)
    with pytest.raises(ValueError, match="holds more than tensors and settings"):
        load_pretrained_redimnet(source=path)
    assert not proof.exists()
    if save is torch.save:  # it is armed
        torch.load(path, weights_only=False)["state_dict"]["x"].close()
        assert proof.exists()


def test_settings_that_the_authors_would_evaluate_are_refused(tmp_path, tiny_config, release_file):
    proof = tmp_path / "ran"
    config = {**tiny_config, "head_activation": f"open({str(proof)!r}, 'w')"}
    path = release_file(config, {})
    with pytest.raises(ValueError, match="head_activation=.*; supported: None"):
        load_pretrained_redimnet(source=path)
    assert not proof.exists()


def test_missing_checkpoint_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "a.pt")


def test_subnormal_weights_become_zero_and_others_stay(tiny_config, random_model, release_file):
    state_dict = random_model(tiny_config).state_dict()
    smallest_normal = 2.0**-126
    numbers = torch.tensor([1e-40, -1e-44, smallest_normal, -smallest_normal, 1e-30, 0.5])
    state_dict["linear.bias"][:6] = numbers
    model = load_pretrained_redimnet(source=release_file(tiny_config, state_dict))
    expected = [0.0, 0.0, smallest_normal, -smallest_normal, *numbers[4:].tolist()]
    assert model.linear.bias[:6].tolist() == expected
    for key, value in model.state_dict().items():
        assert key == "linear.bias" or torch.equal(value, state_dict[key]), key


# Downloads


class ReleaseHandler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.content``; breaks the connection after ``server.break_after`` bytes, once."""

    def do_GET(self):
        server = self.server
        start, content = 0, server.content
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        time.sleep(server.pause)
        if asked and server.honours_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        body = content[start:]
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.break_after is not None:
            body, server.break_after = body[: server.break_after], None
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """A fresh cache of torch.hub; local addresses are reached without any proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "torch"


@pytest.fixture
def server(torch_home, tiny_config, release_file, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ReleaseHandler) as server:
        server.daemon_threads = True  # a client that fails half-way is not waited for
        server.handle_error = lambda *_: None  # nor reported
        server.content = release_file(tiny_config, name="served").read_bytes()
        server.requests, server.honours_ranges, server.break_after = [], True, None
        server.pause, server.says_length = 0, True
        monkeypatch.setattr(releases, "URL", f"http://127.0.0.1:{server.server_port}/latest/")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cached(torch_home):
    return torch_home / "hub" / "checkpoints" / "b2-vox2-ft_lm.pt"


def test_release_is_downloaded_once_into_torch_hub_s_cache(server, cached):
    model = load_pretrained_redimnet("b2")
    assert model.embed_dim == 32 and cached.read_bytes() == server.content
    load_pretrained_redimnet("b2")
    assert server.requests == [("/latest/b2-vox2-ft_lm.pt", None)]
    assert [path.name for path in cached.parent.glob("[!.]*")] == [cached.name]


def test_two_processes_that_want_one_release_download_it_once(server, cached):
    """Threads here: the lock is held by its open file, whoever has that."""
    server.pause = 0.3
    wanting = [threading.Thread(target=load_pretrained_redimnet) for _ in range(2)]
    for one in wanting:
        one.start()
    for one in wanting:
        one.join()
    assert server.requests == [("/latest/b2-vox2-ft_lm.pt", None)]
    assert cached.read_bytes() == server.content


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_broken_download_leaves_no_file_and_goes_on_where_it_stopped(
    server, cached, honours_ranges, capsys
):
    server.break_after, server.honours_ranges = 5000, honours_ranges
    with pytest.raises(ConnectionError, match=f"ended after 5000 of {len(server.content)} bytes"):
        load_pretrained_redimnet("b2")
    part = cached.with_name(cached.name + ".part")
    assert not cached.exists() and part.read_bytes() == server.content[:5000]
    load_pretrained_redimnet("b2")
    assert [asked for _, asked in server.requests] == [None, "bytes=5000-"]
    assert cached.read_bytes() == server.content and not part.exists()
    bar = capsys.readouterr().err.split("\r")[-1]
    size = f"{len(server.content) / 1000:.0f}k"
    assert re.match(f"{cached.name}: 100%.*{size}/{size} .*B/s", bar)


def test_a_file_of_unsaid_length_is_downloaded(server, cached):
    server.says_length = False
    load_pretrained_redimnet("b2")
    assert cached.read_bytes() == server.content


def test_a_server_that_falls_silent_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(releases, "PATIENCE", 0.1)
    server.pause = 0.5
    with pytest.raises(ConnectionError, match="timed out"):
        load_pretrained_redimnet("b2")


def test_part_that_cannot_be_continued_is_fetched_anew(server, cached):
    cached.parent.mkdir(parents=True)
    part = cached.with_name(cached.name + ".part")
    part.write_bytes(b"x" * (len(server.content) + 1))
    load_pretrained_redimnet("b2")
    assert [asked for _, asked in server.requests] == [f"bytes={len(server.content) + 1}-", None]
    assert cached.read_bytes() == server.content and not part.exists()


def test_no_network_is_one_sentence_that_says_which_file_to_put_where(
    torch_home, cached, monkeypatch
):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/latest/"
    monkeypatch.setattr(releases, "URL", url)
    with pytest.raises(ConnectionError) as error:
        load_pretrained_redimnet("b2")
    message = str(error.value)
    assert f"cannot download {url}b2-vox2-ft_lm.pt" in message
    assert f"put it at {cached}, or name it with source=" in message
    assert "\n" not in message and ". " not in message


def test_file_put_by_hand_into_the_cache_needs_no_network(
    cached, tiny_config, release_file, monkeypatch
):
    monkeypatch.setattr(releases, "URL", "http://127.0.0.1:9/nowhere/")
    cached.parent.mkdir(parents=True)
    release_file(tiny_config).rename(cached)
    assert load_pretrained_redimnet("b2").embed_dim == 32


def test_files_of_redimnet2_have_their_own_folder_in_the_cache(
    server, cached, tiny_config, tiny_config2, release_file, monkeypatch
):
    monkeypatch.setattr(releases, "URL2", releases.URL)
    server.content = release_file(tiny_config2, name="served2").read_bytes()
    with pytest.warns(UserWarning, match="VoxBlink2"):
        load_pretrained_redimnet2("b3", dataset="vb2+vox2+cnc2_v0")
    assert server.requests == [("/latest/b3-vb2%2Bvox2%2Bcnc2_v0-lm.pt", None)]
    assert (cached.parent / "redimnet2" / "b3-vb2+vox2+cnc2_v0-lm.pt").is_file()
    server.content = release_file(tiny_config, name="served1").read_bytes()
    for _ in range(2):
        assert type(load_pretrained_redimnet("b2", "ptn")) is ReDimNet
    assert len(server.requests) == 2


def test_release_of_a_known_hash_must_have_it(cached, tiny_config2, release_file, monkeypatch):
    monkeypatch.setattr(releases, "URL2", "http://127.0.0.1:9/nowhere/")
    folder = cached.parent / "redimnet2"
    folder.mkdir(parents=True)
    path = release_file(tiny_config2, name="b2-vox2-lm").rename(folder / "b2-vox2-lm.pt")
    with pytest.raises(ValueError, match="expected 0545a29679a87fe1"):
        load_pretrained_redimnet2()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_pretrained_redimnet2(sha256=digest).embed_dim == 32


# The student


def test_a_student_is_of_b2_before_large_margin_unless_said_otherwise(tiny_config, release_file):
    folder = release_file(tiny_config, name="b2-vox2-ptn").parent
    student = ReDimNetMRL.from_pretrained(source=folder, embed_dim=40, mrl_dims=(8, 40))
    assert (student.embed_dim, student.mrl_dims) == (40, (8, 40))


def test_student_from_a_release_has_every_tensor_of_it(parity, release_file):
    fixture = parity("b2")
    weights = fixture.weights()
    path = release_file(fixture["model_config"], weights, "b2-vox2-ptn")
    student = ReDimNetMRL.from_pretrained("b2", "ptn", source=path.parent)
    assert isinstance(student, ReDimNetMRL)
    assert (student.embed_dim, student.mrl_dims) == (256, (64, 128, 192, 256))
    state = student.state_dict()
    assert set(state) == set(weights) and len(state) == fixture["state_dict_entries"] == 556
    found = [
        torch.equal(state[key][:192] if key.startswith("linear.") else state[key], value)
        for key, value in weights.items()
    ]
    assert sum(found) == 556
    case = fixture["cases"][0]
    with torch.no_grad():
        embeddings = student.eval()(fill.waveform(case["seconds"]), target_dim=192)
    assert fill.max_abs_diff(embeddings, case["output"]) < 1e-5


def test_student_of_redimnet2_has_every_tensor_of_its_release(parity, release_file):
    fixture = parity("redimnet2_b2")
    weights = fixture.weights()
    path = release_file(fixture["model_config"], weights, "b2-vox2-ptn")
    student = ReDimNetMRL.from_pretrained("redimnet2_b2", "ptn", source=path.parent)
    assert isinstance(student, ReDimNetMRL) and isinstance(student, ReDimNet2)
    state = student.state_dict()
    assert set(state) == set(weights) and len(state) == fixture["state_dict_entries"] == 729
    for key, value in weights.items():
        assert torch.equal(state[key][:192] if key.startswith("linear.") else state[key], value)
    case = fixture["cases"][0]
    with torch.no_grad():
        embeddings = student.eval()(fill.waveform(case["seconds"]), target_dim=192)
    assert fill.max_abs_diff(embeddings, case["output"]) < 1e-5


def test_backbone_of_either_family_makes_a_student(tiny_config, tiny_config2):
    for backbone, network in ((tiny_config, ReDimNet), (tiny_config2, ReDimNet2)):
        student = ReDimNetMRL(embed_dim=40, mrl_dims=(8, 40), backbone=backbone)
        assert isinstance(student, ReDimNetMRL)
        assert isinstance(student, ReDimNet2) == (network is ReDimNet2)
        again = pickle.loads(pickle.dumps(student.eval()))
        wavs = torch.randn(1, 8000)
        assert type(again) is type(student) and torch.equal(again(wavs), student(wavs))
    assert isinstance(ReDimNetMRL(64, (64,), "redimnet2_b0"), ReDimNet2)
    with pytest.raises(ValueError, match="one of .'redimnet2_b0'.* got 'redimnet2_b9'"):
        ReDimNetMRL(backbone="redimnet2_b9")
