"""A thousand damaged checkpoints and configurations: each is refused, or is what it was.

Fixed seeds draw the damage. Only ValueError counts as a refusal: no crash, no other exception.
"""

import copy
import hashlib
import pickle
import random
import zipfile

import pytest
import torch
from check_hparams import TRAINING, check_training
from read_hparams import parse, read_yaml
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_mrl.models.pretrained import load_pretrained_redimnet, read_checkpoint
from speechbrain_mrl.models.redimnet import EmbeddingModel, ReDimNet, complete_config, read_tensors


def flip_a_bit(content, rng):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut_the_end(content, rng):
    del content[rng.randrange(len(content)) :]


def leave_a_hole(content, rng):
    start = rng.randrange(len(content))
    del content[start : start + rng.randrange(1, 5000)]


def write_zeros(content, rng):
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 5000))
    content[start:end] = bytes(end - start)


def repeat_a_part(content, rng):
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + rng.randrange(1, 5000)]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, cut_the_end, leave_a_hole, write_zeros, repeat_a_part]
)
def test_a_damaged_file_is_refused_or_what_it_was(release_file, tiny_config, damage):
    path = release_file(tiny_config)
    sound, checkpoint = path.read_bytes(), read_checkpoint(path)
    rng, refused = random.Random(damage.__name__), 0
    for _ in range(100):
        content = bytearray(sound)
        damage(content, rng)
        path.write_bytes(content)
        try:
            found = read_checkpoint(path)
        except ValueError:
            refused += 1
            continue
        assert found["model_config"] == checkpoint["model_config"]
        assert same_tensors(found["state_dict"], checkpoint["state_dict"])
    assert refused > 80  # the rest hit what no reader looks at


def without(state, key, rng):
    del state[key]


def renamed(state, key, rng):
    state[rng.choice([f"{key}.old", f"model.{key}", key.upper()])] = state.pop(key)


def with_more(state, key, rng):
    state[f"{key}_extra"] = state[key]


def transposed(state, key, rng):
    state[key] = state[key].flatten()[None]


def shortened(state, key, rng):
    state[key] = state[key].flatten()[:-1]


def as_integers(state, key, rng):
    state[key] = state[key].int() if state[key].is_floating_point() else state[key].float()


def as_complex(state, key, rng):
    state[key] = state[key] + 1j


def as_list(state, key, rng):
    state[key] = state[key].tolist()


def with_a_bad_number(state, key, rng):
    key = rng.choice([key for key, value in state.items() if value.is_floating_point()])
    values = state[key].double().flatten().clone()
    values[rng.randrange(len(values))] = rng.choice([float("nan"), float("inf"), -1e300])
    state[key] = values.reshape(state[key].shape)


def on_no_device(state, key, rng):
    state[key] = state[key].to("meta")


DAMAGE = [
    *(without, renamed, with_more, transposed, shortened),
    *(as_integers, as_complex, as_list, with_a_bad_number, on_no_device),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused_or_what_they_were(
    release_file, tiny_config, random_model, tmp_path, monkeypatch, damage
):
    """In a release's file, and in a published one; the network that they fill stays as it was."""
    sound = random_model(tiny_config).state_dict()
    model = ReDimNet.from_config(tiny_config).eval()
    monkeypatch.setattr(ReDimNet, "from_config", lambda config: model)  # building takes longest
    published = EmbeddingModel(complete_config(tiny_config), (8, 32))
    rng = random.Random(damage.__name__)
    for _ in range(10):
        state = dict(sound)
        damage(state, rng.choice(sorted(state)), rng)
        torch.save(state, tmp_path / "published.ckpt")
        path = release_file(tiny_config, state)
        for network, load in (
            (model, lambda path=path: load_pretrained_redimnet(source=path)),
            (published, lambda: published.load_published(tmp_path / "published.ckpt")),
        ):
            before = {key: value.clone() for key, value in network.state_dict().items()}
            with pytest.raises(ValueError):
                load()
            assert same_tensors(network.state_dict(), before)


def test_a_flipped_bit_of_the_format_without_checksums_is_seen_by_the_hash(
    release_file, tiny_config, random_model, tmp_path
):
    path = tmp_path / "old.pt"
    checkpoint = {"model_config": tiny_config, "state_dict": random_model(tiny_config).state_dict()}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    sha256 = hashlib.sha256(content).hexdigest()
    weights = checkpoint["state_dict"]["linear.weight"].numpy().tobytes()
    content[content.index(weights)] ^= 1  # what lies where in this format, memory addresses decide
    path.write_bytes(content)
    assert read_checkpoint(path)  # unseen
    with pytest.raises(ValueError, match="has SHA-256 .* expected"):
        read_checkpoint(path, sha256)


def test_archive_members_are_never_written_to_disk(tmp_path, release_file, tiny_config):
    path = release_file(tiny_config)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../evil", "x")
        archive.writestr("/evil", "x")
    before = sorted(tmp_path.parent.rglob("*"))
    try:
        read_tensors(path)
    except ValueError:
        pass
    assert sorted(tmp_path.parent.rglob("*")) == before


class Payload:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_training_checkpoint_does_not_run(tmp_path):
    """SpeechBrain's own loading, whose safety is torch's default."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", {"student": torch.nn.Linear(2, 2)})
    checkpoint = checkpointer.save_checkpoint()
    torch.save({"weight": Payload(tmp_path / "ran")}, checkpoint.path / "student.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        checkpointer.recover_if_possible()
    assert not (tmp_path / "ran").exists()


def test_code_in_a_published_checkpoint_does_not_run(tmp_path, tiny_config):
    torch.save({"linear.bias": Payload(tmp_path / "ran")}, tmp_path / "published.ckpt")
    model = EmbeddingModel(complete_config(tiny_config), (8, 32))
    with pytest.raises(ValueError, match="holds more than tensors and settings"):
        model.load_published(tmp_path / "published.ckpt")
    assert not (tmp_path / "ran").exists()


WRONG = [
    None,
    -1,
    0,
    1.5,
    "x",
    "",
    [],
    {},
    [None],
    {"a": 1},
    True,
    float("nan"),
    10**30,
    "__import__",
]
# What some keys may be: another network, whose tensors or front end say so themselves.
ALLOWED = {
    "feat_agg_dropout": [0],
    "global_context_att": [True, False],
    "group_divisor": [None],
    "out_channels": [None],
    "return_all_outputs": [None, 0],
    "tf_optimized_arch": [None, 0],
    "emb_bn": [True, False],
    "spec_params": [{}],
}


def test_a_damaged_model_config_is_refused_or_what_it_was(tiny_config):
    sound = complete_config(tiny_config)
    rng, refused = random.Random(0), 0
    for _ in range(200):
        config = copy.deepcopy(sound)
        place = rng.choice([config, config["spec_params"]])
        key = rng.choice(sorted(place))
        how = rng.randrange(3)
        if how == 0:
            place[f"{key}_"] = place.pop(key)
        elif how == 1:
            place[key] = rng.choice([value for value in WRONG if value != place[key]])
        else:
            place[key] = [place[key]]
        try:
            found = complete_config(config)
        except ValueError:
            refused += 1
            continue
        changed = {key for key in sound if found[key] != sound[key]}
        # The dropout is of the authors' training and the front end's settings say what they are.
        assert changed <= {"spec_params", "class_dropout"} or place[key] in ALLOWED[key]
    assert refused > 150


def test_a_damaged_yaml_is_refused_or_what_it_was():
    sound = parse(read_yaml("hparams/mrl_distill.yaml", "data_folder: hparams"))
    keys = [key for _, keys in TRAINING for key in keys.split()]
    rng, refused = random.Random(0), 0
    for _ in range(200):
        tree = copy.deepcopy(sound)
        key = rng.choice(keys)
        if rng.random() < 0.3:
            tree[f"{key}_"] = tree.pop(key)
        else:
            tree[key] = rng.choice([[[[]]], {"a": {"b": 1}}, float("inf"), "x y\n", -(10**9)])
        try:
            check_training(tree)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert isinstance(tree.get(key), str)  # a name or a path may be any text
    assert refused > 170
