import functools

import pytest
import torch
from torch import nn

from speechbrain_mrl.models.ensemble import MultiModelEnsemble, RoutedEmbedding
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet, ReDimNet


class MeanEncoder(nn.Module):
    """(B, dim): the clip's mean times a weight; counts its constructions."""

    built = []

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, dim + 1))
        self.dropout = nn.Dropout(0.5)
        self.built.append(dim)

    def forward(self, wavs, wav_lens=None):
        scale = 1 if wav_lens is None else wav_lens[:, None]
        return self.dropout(wavs.mean(dim=1, keepdim=True) * scale * self.weight)


@pytest.fixture
def ensemble(monkeypatch):
    monkeypatch.setattr(MeanEncoder, "built", [])
    models = {"b0": 192, "b2": 160, "b6": 256}
    return MultiModelEnsemble(
        models={name: functools.partial(MeanEncoder, dim) for name, dim in models.items()},
        routes={256: "b6", 64: "b0", 128: "b2"},
    )


WAVS = torch.ones(2, 16000)


def test_members_load_once_and_only_when_a_route_needs_them(ensemble):
    assert ensemble.loaded == () and MeanEncoder.built == []
    assert sum(p.numel() for p in ensemble.parameters()) == 0
    ensemble(WAVS, target_dim=128)
    assert ensemble.loaded == ("b2",) and MeanEncoder.built == [160]
    assert sum(p.numel() for p in ensemble.parameters()) == 160
    ensemble(WAVS, target_dim=128)
    ensemble.extract(WAVS, mode="fast")
    assert ensemble.loaded == ("b2", "b0") and MeanEncoder.built == [160, 192]


@pytest.mark.parametrize("target_dim, member", [(64, "b0"), (128, "b2"), (256, "b6"), (None, "b6")])
def test_size_chooses_the_member_and_returns_its_whole_embedding(ensemble, target_dim, member):
    result = ensemble(WAVS, target_dim)
    size = {"b0": 192, "b2": 160, "b6": 256}[member]
    assert isinstance(result, RoutedEmbedding) and result.member == member
    assert torch.equal(result.embeddings, torch.arange(1.0, size + 1).expand(2, size))


@pytest.mark.parametrize("mode, member", [("fast", "b0"), ("balanced", "b2"), ("accurate", "b6")])
def test_mode_takes_the_smallest_middle_or_largest_route(ensemble, mode, member):
    assert ensemble.extract(WAVS, mode=mode).member == member


def test_balanced_of_an_even_number_of_routes_is_the_smaller_middle():
    models = {name: MeanEncoder(8) for name in ("b0", "b1", "b2", "b6")}
    routes = {64: "b0", 128: "b1", 192: "b2", 256: "b6"}
    assert MultiModelEnsemble(models, routes).extract(WAVS, "balanced").member == "b1"
    assert MultiModelEnsemble(models, {64: "b0", 256: "b6"}).extract(WAVS).member == "b0"


def test_wav_lens_reach_the_member(ensemble):
    result = ensemble(WAVS, target_dim=64, wav_lens=torch.tensor([1.0, 0.5]))
    assert result.embeddings[:, 1].tolist() == [2.0, 1.0]
    result = ensemble.extract(WAVS, "fast", wav_lens=torch.tensor([1.0, 0.5]))
    assert result.embeddings[:, 1].tolist() == [2.0, 1.0]


def test_members_stay_in_eval_mode_and_without_gradients(ensemble):
    ensemble.train()
    result = ensemble(WAVS, target_dim=64)  # the dropout would show
    assert not result.embeddings.requires_grad
    ensemble.train()
    assert not any(module.training for module in ensemble.modules())
    given = MeanEncoder(8).train()
    MultiModelEnsemble({"a": given}, {8: "a"})
    assert not given.training


def test_member_that_loads_after_to_is_moved_too(ensemble):
    ensemble.to("meta")
    assert ensemble(WAVS.to("meta"), target_dim=64).embeddings.device.type == "meta"
    assert all(p.device.type == "meta" for p in ensemble.parameters())


def test_score_is_the_cosine_of_results_of_one_member():
    a = RoutedEmbedding(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), "b0")
    b = RoutedEmbedding(torch.tensor([[4.0, 3.0], [0.0, 2.0]]), "b0")
    torch.testing.assert_close(MultiModelEnsemble.score(a, b), torch.tensor([0.96, 0.0]))
    one = RoutedEmbedding(torch.tensor([[0.0, 1.0]]), "b0")
    torch.testing.assert_close(MultiModelEnsemble.score(one, b), torch.tensor([0.6, 1.0]))


def test_scoring_results_of_different_members_is_refused_with_both_names(ensemble):
    fast, accurate = ensemble.extract(WAVS, "fast"), ensemble.extract(WAVS, "accurate")
    with pytest.raises(ValueError, match="embedding of 'b0' against one of 'b6'"):
        ensemble.score(fast, accurate)
    same_size = RoutedEmbedding(fast.embeddings, "b2")
    with pytest.raises(ValueError, match="embedding of 'b2' against one of 'b0'"):
        ensemble.score(same_size, fast)


def test_matryoshka_member_returns_the_prefix_that_it_was_trained_for(tiny_config, voices):
    model = MatryoshkaReDimNet(32, [8, 16, 32], tiny_config)
    ensemble = MultiModelEnsemble({"mrl": model}, {8: "mrl", 12: "mrl", 32: "mrl"})
    wavs = torch.stack([voices(0, 0.5), voices(1, 0.5)])
    whole = ensemble(wavs).embeddings
    assert whole.shape == (2, 32)
    assert torch.equal(ensemble(wavs, 8).embeddings, whole[:, :8])
    assert torch.equal(ensemble(wavs, 12).embeddings, whole)  # 12 was not trained
    with pytest.raises(ValueError, match="prefix of 8 dimensions against one of 32 of 'mrl'"):
        ensemble.score(ensemble(wavs, 8), ensemble(wavs, 32))


def test_members_come_from_release_files_paths_and_names(tiny_config, release_file, monkeypatch):
    path = release_file(tiny_config)
    asked = []

    def load(what):
        asked.append(what)
        return ReDimNet.from_config(tiny_config)

    for loader in ("load_checkpoint", "load_released"):
        monkeypatch.setattr(f"speechbrain_mrl.models.ensemble.{loader}", load)
    models = {"a": str(path), "b": path, "c": "b6", "d": "redimnet2_b6"}
    ensemble = MultiModelEnsemble(models, dict(zip((64, 128, 192, 256), models)))
    assert asked == []
    for size in (64, 128, 192, 256):
        ensemble(torch.randn(1, 8000), size)
    assert asked == [str(path), path, "b6", "redimnet2_b6"]


def test_release_file_gives_the_embedding_of_its_model(tiny_config, release_file, random_model):
    ensemble = MultiModelEnsemble({"demo": release_file(tiny_config)}, {64: "demo"})
    wavs = torch.randn(2, 8000)
    torch.testing.assert_close(ensemble(wavs).embeddings, random_model(tiny_config)(wavs))


def test_unknown_size_and_mode_are_refused(ensemble):
    with pytest.raises(ValueError, match=r"target_dim must be one of \[64, 128, 256\], got 192"):
        ensemble(WAVS, target_dim=192)
    with pytest.raises(ValueError, match="mode must be one of .*'balanced'.*, got 'quick'"):
        ensemble.extract(WAVS, mode="quick")
    assert MeanEncoder.built == []


@pytest.mark.parametrize(
    "models, routes, message",
    [
        ({"b0": "b0"}, {64: "b0", 128: "b2"}, r"routes \{128: 'b2'\} name no member; .*\['b0'\]"),
        ({"b0": "b0"}, {}, r"routes must map positive integers to members, got \{\}"),
        ({"b0": "b0"}, {"64": "b0"}, "routes must map positive integers"),
        ({"b0": "b0"}, {0: "b0"}, "routes must map positive integers"),
        ({"b.0": "b0"}, {64: "b.0"}, "models has the name 'b.0'"),
        ({"b0": "b9"}, {64: "b0"}, r"models\['b0'\] is 'b9', which is neither a file nor"),
        ({"b0": 3}, {64: "b0"}, r"models\['b0'\] must be an nn.Module, .* got int"),
    ],
)
def test_impossible_ensemble_is_refused_when_it_is_made(models, routes, message):
    with pytest.raises(ValueError, match=message):
        MultiModelEnsemble(models, routes)


def test_function_that_gives_no_module_is_refused():
    ensemble = MultiModelEnsemble({"a": lambda: "b0"}, {64: "a"})
    with pytest.raises(TypeError, match=r"models\['a'\] must give an nn.Module, got str"):
        ensemble(WAVS)
