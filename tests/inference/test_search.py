import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from speechbrain_mrl.inference.enrolment import enrol, score_speakers
from speechbrain_mrl.inference.search import MatryoshkaIndex

DIM, PREFIX = 32, 8


def voices(n, seed=0, dim=DIM):
    """Embeddings whose first dimensions carry the most, as a Matryoshka model's do."""
    rng = np.random.default_rng(seed)
    spread = (np.arange(1, dim + 1) + 2.0) ** -1.5
    return torch.from_numpy((rng.standard_normal((n, dim)) * spread).astype(np.float32))


def names(n):
    return [f"speaker {i}" for i in range(n)]


def brute_force(queries, embeddings, k):
    """Positions and cosines of the k nearest by full embeddings, in double precision."""
    queries, embeddings = queries.double().numpy(), embeddings.double().numpy()
    cosines = queries @ embeddings.T
    cosines /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(embeddings, axis=1)
    order = np.argsort(-cosines, axis=1)[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


def recall(ids, expected):
    hits = [len(set(row) & {f"speaker {i}" for i in right}) for row, right in zip(ids, expected)]
    return sum(hits) / expected.size


@pytest.fixture
def index():
    pytest.importorskip("faiss")
    return MatryoshkaIndex(DIM, PREFIX, storage="float32")


def filled(n, seed=0, **options):
    pytest.importorskip("faiss")
    index = MatryoshkaIndex(DIM, PREFIX, **options)
    index.add(names(n), voices(n, seed))
    return index


def state(index, queries):
    ids, scores = index.search(queries, k=5, shortlist=60)
    return ids, scores.tolist(), len(index)


def test_a_small_index_is_searched_exactly(index):
    embeddings, queries = voices(300), voices(20, seed=1)
    index.add(names(300), embeddings)
    ids, scores = index.search(queries, k=7, shortlist=7)
    order, cosines = brute_force(queries, embeddings, 7)
    assert ids == [[f"speaker {i}" for i in row] for row in order]
    np.testing.assert_allclose(scores, cosines, atol=1e-6)


def test_a_shortlist_of_everyone_is_exact():
    index, queries = filled(1500, storage="float32"), voices(5, seed=1)
    order, cosines = brute_force(queries, voices(1500), 10)
    ids, scores = index.search(queries, k=10, shortlist=1500)
    assert ids == [[f"speaker {i}" for i in row] for row in order]
    np.testing.assert_allclose(scores, cosines, atol=1e-6)


@pytest.mark.parametrize("codes", ["float32", "int8", "4bit", "ivf"])
def test_codes_of_the_prefix_find_what_exact_search_finds(codes):
    n, queries = 6000, voices(100, seed=1)
    order, cosines = brute_force(queries, voices(n), 10)
    ids, scores = filled(n, codes=codes).search(queries, k=10, shortlist=900)
    assert recall(ids, order) >= 0.97
    agree = [row == [f"speaker {i}" for i in right] for row, right in zip(ids, order)]
    same = np.array(agree)
    assert same.mean() > 0.5
    np.testing.assert_allclose(scores[same], cosines[same], atol=5e-4)  # float16


def test_the_shortlist_goes_by_the_prefix_cut_first_and_normalised_after():
    index = filled(1200, codes="float32")
    index.search(voices(1))  # codes are there before the addition
    prefix = torch.zeros(1, DIM)
    prefix[0, :PREFIX] = voices(1, seed=3)[0, :PREFIX]
    like = prefix.clone()
    like[0, PREFIX] = 100.0  # the same prefix, nearly orthogonal as a whole
    index.add(["like"], like)
    order, _ = brute_force(prefix[:, :PREFIX], voices(1200)[:, :PREFIX], 1)
    assert index.search(prefix, k=1, shortlist=1)[0] == [["like"]]
    assert index.search(prefix, k=1, shortlist=2)[0] == [[f"speaker {order[0, 0]}"]]


def test_scores_are_cosines_whatever_the_lengths(index):
    index.add(["far", "near"], torch.tensor([[300.0, 400.0], [0.0, 0.1]]).repeat(1, 16))
    ids, scores = index.search(torch.tensor([[0.0, 2.0]]).repeat(1, 16), k=2)
    assert ids == [["near", "far"]]
    np.testing.assert_allclose(scores, [[1.0, 0.8]], rtol=1e-6)  # 3-4-5 triangle


def test_an_all_zero_embedding_scores_zero(index):
    index.add(["silence"], torch.zeros(1, DIM))
    assert index.search(voices(1), k=1)[1].tolist() == [[0.0]]


def test_k_larger_than_the_index_gives_everyone(index):
    index.add(names(3), voices(3))
    ids, scores = index.search(voices(2, seed=1), k=10, shortlist=2)
    assert [sorted(row) for row in ids] == [names(3), names(3)]
    assert scores.shape == (2, 3)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_shortlist_is_never_shorter_than_k():
    ids, scores = filled(1500).search(voices(3, seed=1), k=50, shortlist=5)
    assert [len(set(row)) for row in ids] == [50, 50, 50]
    assert scores.shape == (3, 50)


def test_an_empty_index_and_no_queries_give_nothing(index):
    ids, scores = index.search(voices(2), k=4)
    assert (ids, scores.shape, len(index)) == ([[], []], (2, 0), 0)
    index.add(names(3), voices(3))
    ids, scores = index.search(voices(0), k=2)
    assert (ids, scores.shape) == ([], (0, 2))


@pytest.mark.parametrize("codes", ["float32", "int8", "4bit", "ivf"])
def test_removed_speakers_are_gone_and_the_others_stay(codes):
    index, embeddings = filled(1500, codes=codes), voices(1500)
    index.search(embeddings[:1])  # codes are there before the removal
    gone = [0, 3, 777, 1499]
    index.remove([f"speaker {i}" for i in gone])
    assert len(index) == 1496
    ids, _ = index.search(embeddings, k=1, shortlist=400)
    first = [int(row[0].split()[1]) for row in ids]
    stay = np.setdiff1d(np.arange(1500), gone)
    assert not set(first) & set(gone)
    assert np.mean(np.array(first)[stay] == stay) > 0.99
    index.add(["speaker 777"], embeddings[777:778])
    assert index.search(embeddings[777:778], k=1)[0] == [["speaker 777"]]
    assert len(index) == 1497


@pytest.mark.parametrize("codes", ["int8", "4bit", "ivf"])
def test_adding_an_id_again_replaces_its_embedding(codes):
    index, new = filled(1500, codes=codes), voices(2, seed=9)
    index.search(new)
    index.add(["speaker 5", "newcomer"], new)
    assert len(index) == 1501
    ids, scores = index.search(new, k=1501, shortlist=1501)
    assert [row[0] for row in ids] == ["speaker 5", "newcomer"]
    assert all(sorted(row) == sorted([*names(1500), "newcomer"]) for row in ids)
    np.testing.assert_allclose(scores[:, 0], 1.0, atol=1e-4)


def test_codes_are_fitted_again_when_the_index_outgrows_them():
    pytest.importorskip("faiss")
    index = MatryoshkaIndex(DIM, PREFIX, codes="int8")
    index.add([f"quiet {i}" for i in range(1001)], voices(1, seed=2) + 1e-4 * voices(1001))
    index.search(voices(1), shortlist=10)
    index.add(names(6000), voices(6000))  # outside all that int8 has seen
    order, _ = brute_force(voices(50, seed=1), voices(6000), 10)
    ids, _ = index.search(voices(50, seed=1), k=10, shortlist=900)
    assert recall(ids, order) >= 0.97


@pytest.mark.parametrize("codes", ["float32", "int8", "4bit", "ivf"])
def test_a_saved_index_comes_back_the_same_and_lives_on(codes, tmp_path):
    index, queries = filled(2000, codes=codes), voices(20, seed=1)
    index.remove(["speaker 17", "speaker 3"])
    index.save(tmp_path / "index")
    loaded = MatryoshkaIndex.load(tmp_path / "index")
    assert state(loaded, queries) == state(index, queries)
    if sys.platform == "linux":
        assert str(tmp_path) in Path("/proc/self/maps").read_text()  # searched from the disk
    for each in (index, loaded):
        each.add(["speaker 1", "new"], voices(2, seed=5))
        each.remove(["speaker 2"])
    assert state(loaded, queries) == state(index, queries)
    loaded.save(tmp_path / "index")
    assert state(MatryoshkaIndex.load(tmp_path / "index"), queries) == state(index, queries)
    assert state(loaded, queries) == state(index, queries)  # its old files are gone, its maps not
    assert len(list((tmp_path / "index").iterdir())) == 2


@pytest.mark.parametrize("n", [0, 3])
def test_an_index_without_codes_is_saved_too(n, tmp_path):
    filled(n).save(tmp_path)
    loaded = MatryoshkaIndex.load(tmp_path)
    assert len(loaded) == n
    assert [row[0] for row in loaded.search(voices(n), k=1)[0]] == names(n)


@pytest.mark.parametrize("file", [".faiss", "index.json"])
def test_a_save_that_dies_leaves_the_old_index(tmp_path, monkeypatch, file):
    queries, replace = voices(4, seed=1), os.replace
    filled(50).save(tmp_path)
    before, files = state(MatryoshkaIndex.load(tmp_path), queries), sorted(tmp_path.iterdir())

    def full_disk(source, target):
        if str(target).endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=rf"cannot write .*{tmp_path}.*{file}: .*No space left"):
        filled(60, seed=4).save(tmp_path)
    assert sorted(tmp_path.iterdir()) == files
    monkeypatch.undo()
    assert state(MatryoshkaIndex.load(tmp_path), queries) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
def test_a_disk_that_fills_up_is_one_error_that_names_the_file(tmp_path):
    """Wherever the room ends; the index takes 96,119 bytes, the rest is in a buffer till the end."""
    code = (
        "import resource, signal, sys, torch\n"
        "from speechbrain_mrl.inference.search import MatryoshkaIndex\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "index = MatryoshkaIndex(32, 8)\n"
        "index.add([str(i) for i in range(1500)], torch.randn(1500, 32))\n"
        "for n_bytes in (0, 5000, 96_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))\n"
        "    try: index.save(sys.argv[1])\n"
        "    except OSError as error: print(error)\n"
    )
    pytest.importorskip("faiss")
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.match(rf"cannot write {tmp_path}/\w+\.faiss: .*File too large", line)
    assert not list(tmp_path.iterdir())


def changed(manifest, **values):
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))


def test_a_folder_whose_files_disagree_is_refused(tmp_path):
    filled(5).save(tmp_path)
    changed(tmp_path / "index.json", ids=names(4))
    with pytest.raises(ValueError, match="has 4 ids, 5 embeddings of size 32"):
        MatryoshkaIndex.load(tmp_path)
    changed(tmp_path / "index.json", ids=["speaker 1", *names(4)])
    with pytest.raises(ValueError, match="one id of its own .*, has 5 ids, 5 embeddings"):
        MatryoshkaIndex.load(tmp_path)
    changed(tmp_path / "index.json", ids=names(5), dim=DIM + 1)
    with pytest.raises(ValueError, match="of size 33, has .* of size 32"):
        MatryoshkaIndex.load(tmp_path)


def test_a_file_that_is_cut_or_no_index_is_refused(tmp_path):
    filled(50).save(tmp_path)
    (file,) = tmp_path.glob("*.faiss")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{file} is damaged; save the index again"):
        MatryoshkaIndex.load(tmp_path)
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=rf"{file} is damaged; save the index again"):
        MatryoshkaIndex.load(tmp_path)


def test_a_flipped_bit_anywhere_is_found_before_a_search_is_answered(tmp_path):
    filled(50).save(tmp_path)
    (file,) = tmp_path.glob("*.faiss")
    whole = file.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        flipped = bytearray(whole)
        flipped[place] ^= 64
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"{file} is damaged; save the index again"):
            MatryoshkaIndex.load(tmp_path)
    file.write_bytes(whole)
    assert len(MatryoshkaIndex.load(tmp_path)) == 50


def test_other_ids_than_were_saved_are_refused(tmp_path):
    filled(5).save(tmp_path)
    changed(tmp_path / "index.json", ids=["somebody else", *names(4)])
    with pytest.raises(ValueError, match="index.json has other ids than were saved"):
        MatryoshkaIndex.load(tmp_path)


@pytest.mark.parametrize("codes", ["float32", "int8", "4bit", "ivf"])
def test_speakers_without_a_prefix_are_found_once_each_and_no_cosine_is_above_one(codes):
    embeddings = voices(1500)
    embeddings[:700, :PREFIX] = 0
    index = filled(1, codes=codes)
    index.add(names(1500), embeddings)
    ids, scores = index.search(embeddings[::50], k=5, shortlist=400)
    assert all(len(set(row)) == 5 for row in ids)
    assert np.abs(scores).max() <= 1


def test_wrong_input_is_refused_and_changes_nothing(index):
    index.add(names(3), voices(3))
    broken = voices(2)
    broken[1, 4] = float("nan")
    two = ["a", "b"]
    with pytest.raises(ValueError, match=r"embeddings must be \(2, 32\), got \(2, 31\)"):
        index.add(two, voices(2)[:, 1:])
    with pytest.raises(ValueError, match=r"embeddings must be \(2, 32\), got \(3, 32\)"):
        index.add(two, voices(3))
    with pytest.raises(ValueError, match=r"embeddings must be \(N, 32\), got \(32,\)"):
        index.search(voices(1)[0])
    with pytest.raises(ValueError, match="embeddings must be finite, row 1 is not"):
        index.add(two, broken)
    with pytest.raises(ValueError, match="embeddings must be finite, row 1 is not"):
        index.search(broken)
    with pytest.raises(ValueError, match="got 'a' 2 times"):
        index.add(["a", "a"], voices(2))
    with pytest.raises(TypeError, match="ids must be a list of str, got 'ab'"):
        index.add("ab", voices(2))
    with pytest.raises(TypeError, match=r"got \[1, 2\]"):
        index.add([1, 2], voices(2))
    with pytest.raises(ValueError, match="ids must be in the index, 'nobody' is not"):
        index.remove(["speaker 0", "nobody"])
    with pytest.raises(ValueError, match=r"k must lie in 1\.\., got 0"):
        index.search(voices(1), k=0)
    with pytest.raises(ValueError, match=r"shortlist must lie in 1\.\., got -1"):
        index.search(voices(1), shortlist=-1)
    with pytest.raises(ValueError, match=r"prefix_dim must lie in 1\.\.32, got 64"):
        MatryoshkaIndex(32, 64)
    with pytest.raises(ValueError, match="got 'int4', 'float16'"):
        MatryoshkaIndex(32, 8, codes="int4")
    assert len(index) == 3
    assert index.search(voices(3), k=1)[0] == [[name] for name in names(3)]


def test_without_faiss_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError) as error:
        MatryoshkaIndex()
    wanted = "a search index needs faiss, which is not installed: "
    wanted += "pip install faiss-cpu"
    assert str(error.value) == wanted


def test_an_enrolled_voice_is_the_mean_of_unit_clips():
    clips = torch.tensor([[8.0, 0.0, 1.0], [0.0, 0.5, 0.0], [0.0, 2.0, 9.0]])
    ids, two = enrol(["ann", "bob", "ann"], clips, target_dim=2)
    assert ids == ["ann", "bob"]
    half = 0.5**0.5  # (1, 0) and (0, 1) weigh the same, third dimension truncated
    torch.testing.assert_close(two, torch.tensor([[half, half], [0.0, 1.0]]))


def test_clips_are_scored_as_average_mean_or_best():
    clips = torch.tensor([[1.0, 0.0, 5.0], [0.0, 2.0, 5.0], [0.0, -3.0, 5.0]])
    query, speakers = torch.tensor([[3.0, 4.0, -7.0]]), ["ann", "ann", "bob"]  # cosines .6 .8 -.8
    expected = {"average": 1.4 / 2**0.5, "mean": 0.7, "max": 0.8}
    for how, score in expected.items():
        ids, scores = score_speakers(query, speakers, clips, target_dim=2, clips=how)
        assert ids == ["ann", "bob"]
        torch.testing.assert_close(scores, torch.tensor([[score, -0.8]]))


def test_thousands_of_queries_are_scored_against_voices_enrolled_once():
    speakers = [f"speaker {i % 40}" for i in range(200)]
    ids, enrolled = enrol(speakers, voices(200))
    queries = voices(5000, seed=1)
    again, scores = score_speakers(queries, ids, enrolled, target_dim=PREFIX)
    assert (again, scores.shape) == (names(40), (5000, 40))
    q, e = queries[:, :PREFIX].double(), enrolled[:, :PREFIX].double()
    expected = torch.nn.functional.cosine_similarity(q[:, None], e[None], dim=2)
    torch.testing.assert_close(scores, expected.float(), atol=1e-5, rtol=0)


def test_wrong_enrolment_is_refused():
    with pytest.raises(ValueError, match="clips must be 'average', 'mean' or 'max', got 'min'"):
        score_speakers(voices(1), names(2), voices(2), clips="min")
    with pytest.raises(ValueError, match=r"target_dim must lie in 1\.\.32, got 33"):
        enrol(names(2), voices(2), target_dim=33)
    with pytest.raises(ValueError, match=r"embeddings must be \(3, 32\), got \(2, 32\)"):
        enrol(names(3), voices(2))


def test_the_documentation_runs_as_written(tmp_path, monkeypatch):
    for module in ("faiss", "pymilvus", "milvus_lite"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


class TestMilvus:
    """On a file, through milvus-lite."""

    @pytest.fixture
    def uri(self, tmp_path):
        pytest.importorskip("pymilvus")
        pytest.importorskip("milvus_lite")
        return str(tmp_path / "speakers.db")

    @pytest.fixture
    def open_index(self, uri):
        from speechbrain_mrl.inference.milvus import MilvusIndex

        opened = []

        def open_index(dim=DIM, prefix_dim=PREFIX, **options):
            opened.append(MilvusIndex(uri, dim, prefix_dim, **options))
            return opened[-1]

        yield open_index
        for index in opened:
            index.close()

    def test_it_answers_as_brute_force_does(self, open_index):
        index, queries = open_index(), voices(10, seed=1)
        index.add(names(400), voices(400))
        order, cosines = brute_force(queries, voices(400), 5)
        ids, scores = index.search(queries, k=5, shortlist=200)
        assert recall(ids, order) >= 0.98
        np.testing.assert_allclose(scores[:, 0], cosines[:, 0], atol=1e-5)
        prefix_order, _ = brute_force(queries[:, :PREFIX], voices(400)[:, :PREFIX], 1)
        ids, _ = index.search(queries, k=1, shortlist=1)  # the prefix alone decides
        assert ids == [[f"speaker {row[0]}"] for row in prefix_order]

    def test_filter_upsert_and_removal(self, open_index):
        index, embeddings = open_index(), voices(6)
        languages = [{"language": "de" if i % 2 else "en"} for i in range(6)]
        index.add(names(6), embeddings, languages)
        ids, scores = index.search(embeddings, k=4, filter="language == 'de'")
        assert all(sorted(row) == names(6)[1::2] for row in ids)
        assert scores.shape == (6, 3)  # three pass the filter
        index.add(["speaker 1"], -embeddings[1:2], [{"language": "en"}])
        assert len(index) == 6
        assert index.search(-embeddings[1:2], k=1, filter="language == 'en'")[0] == [["speaker 1"]]
        with pytest.raises(ValueError, match="ids must be in the index, 'nobody' is not"):
            index.remove(["speaker 2", "nobody"])
        index.remove(["speaker 2", "speaker 4"])
        ids, _ = index.search(embeddings[:1], k=6)
        assert sorted(ids[0]) == ["speaker 0", "speaker 1", "speaker 3", "speaker 5"]
        assert index.search(embeddings[:1], k=2, filter="language == 'fr'")[0] == [[]]

    @pytest.mark.parametrize(
        "nasty",
        [
            "x'] or id not in ['",
            'x"] or id not in ["',
            "O'Brien",
            'a"b',
            "back\\",
            "\\'",
            "ö 漢",
            "",
        ],
    )
    def test_an_id_is_never_an_expression(self, open_index, nasty):
        index = open_index()
        index.add([*names(3), nasty], voices(4))
        index.remove([nasty])
        assert len(index) == 3
        assert sorted(index.search(voices(1), k=4)[0][0]) == names(3)
        with pytest.raises(ValueError, match="must be in the index"):
            index.remove([nasty])
        assert len(index) == 3

    def test_what_one_process_added_is_there_for_the_next(self, open_index, uri):
        code = (
            "import sys, torch; from speechbrain_mrl.inference.milvus import MilvusIndex\n"
            f"index = MilvusIndex(sys.argv[1], {DIM}, {PREFIX})\n"
            f"index.add(['ann', 'bob'], torch.eye(2, {DIM}), [{{'age': 31}}, {{'age': 64}}])\n"
            "import os; os._exit(0)"  # no farewell
        )
        subprocess.run([sys.executable, "-c", code, uri], check=True)
        index = open_index()
        assert len(index) == 2
        assert index.search(torch.eye(1, DIM), k=2)[0] == [["ann", "bob"]]
        assert index.search(torch.eye(1, DIM), k=2, filter="age > 60")[0] == [["bob"]]

    def test_wrong_input_is_refused(self, open_index):
        index = open_index()
        with pytest.raises(ValueError, match=r"embeddings must be \(1, 32\), got \(1, 31\)"):
            index.add(["a"], voices(1)[:, 1:])
        with pytest.raises(ValueError, match="without the keys"):
            index.add(["a"], voices(1), [{"prefix": 1}])
        with pytest.raises(ValueError, match="metadata must be 1 mappings.*got 2"):
            index.add(["a"], voices(1), [{}, {}])
        with pytest.raises(ValueError, match="has sizes .*32.*, not .*31"):
            open_index(dim=31)
        assert len(index) == 0

    def test_without_pymilvus_one_sentence_says_how_to_install_it(self, open_index, monkeypatch):
        monkeypatch.setitem(sys.modules, "pymilvus", None)
        with pytest.raises(ImportError, match=r"pip install pymilvus$"):
            open_index()


@pytest.mark.parametrize("name", ["../../secret.faiss", "/etc/passwd", "folder/full.faiss"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path, name):
    filled(50).save(tmp_path)
    changed(tmp_path / "index.json", file=name)
    with pytest.raises(ValueError, match=f"names .*{re.escape(name)}.* not in that folder"):
        MatryoshkaIndex.load(tmp_path)
