import pickle

import pytest
from speechbrain.dataio.dataset import DynamicItemDataset

from speechbrain_mrl.dataio.dataset import ClipDataset

ROWS = ['a/0/1.wav,1.5,"/x, y/é ""1"".wav",0,24000', "b/0/1.wav,2.25,/x/2.wav,16,36016"]
KEYS = ["id", "duration", "wav", "start", "stop"]


@pytest.mark.parametrize("ending", ["\n", "", "\r\n"])
def test_rows_are_what_speechbrain_reads(tmp_path, ending):
    path = tmp_path / "clips.csv"
    lines = ["ID,duration,wav,start,stop", *ROWS]
    text = ("\r\n" if ending == "\r\n" else "\n").join(lines) + ending
    path.write_bytes(text.encode())
    found, expected = ClipDataset(path, [], KEYS), DynamicItemDataset.from_csv(path, {}, [], KEYS)
    assert list(found) == list(expected)
    assert list(pickle.loads(pickle.dumps(found))) == list(expected)


def test_dynamic_items_take_columns_and_the_id(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("ID,duration,wav,start,stop\n" + "\n".join(ROWS) + "\n")
    item = {"func": lambda i, start: f"{i}@{start}", "takes": ["id", "start"], "provides": "at"}
    assert ClipDataset(path, [item], ["at"])[1] == {"at": "b/0/1.wav@16"}


@pytest.mark.parametrize(
    ("text", "message"), [("name,wav\na,b\n", "column ID"), ("ID,wav\n", "no row")]
)
def test_a_list_without_ids_or_rows_is_refused(tmp_path, text, message):
    path = tmp_path / "clips.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ClipDataset(path)
