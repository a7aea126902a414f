import http.server
import json
import os
import shutil
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from speechbrain_mrl.dataio.audio import read_audio
from speechbrain_mrl.evaluation.calibration import Calibration, write_calibrations
from speechbrain_mrl.models.redimnet import MatryoshkaReDimNet
from speechbrain_mrl.publish.export import export_model

pytest.importorskip("av")
pytest.importorskip("gradio")

from speechbrain_mrl.publish import space, verdicts  # noqa: E402

SIZES = (8, 16, 32)
THRESHOLD = 0.4
REPORT = {
    "dims": {str(d): {"eer": 0.1, "min_dcf": 0.5, "threshold": THRESHOLD} for d in SIZES},
    "trials": {"target": 30, "impostor": 150},
    "corpus": "demo",
}


@pytest.fixture(scope="module")
def student(tiny_config, random_model, voices):
    """Random, its mean subtracted so that cosines of different voices have either sign."""
    model = MatryoshkaReDimNet.from_redimnet(random_model(tiny_config), 32, SIZES).eval()
    with torch.no_grad():
        clips = torch.stack([voices(speaker, 1.5) for speaker in range(6)])
        model.rotate_head(torch.eye(32), mean=model(clips).mean(dim=0))
    return model


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    from test_hub import PROVENANCE

    folder = tmp_path_factory.mktemp("space") / "tiny-model"
    return export_model(student, folder, PROVENANCE, report=REPORT)


@pytest.fixture(scope="module")
def model(exported):
    return verdicts.Model(str(exported))


@pytest.fixture
def recording(voices, tmp_path):
    """``recording(speaker, clip=0)``: a new file of 1.5 seconds."""

    def write(speaker, clip=0, seconds=1.5):
        path = tmp_path / f"voice {speaker}-{clip}.wav"
        soundfile.write(path, voices(speaker, seconds, clip).numpy(), 16000)
        return str(path)

    return write


def cosines(student, *paths):
    """Of two recordings, by size, from the package's own reader and model."""
    with torch.no_grad():
        one, two = (student(read_audio(path).unsqueeze(0))[0] for path in paths)
    return {d: torch.cosine_similarity(one[:d], two[:d], dim=0).item() for d in SIZES}


# Recordings


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_recording_of_any_rate_and_channels_is_read_as_the_package_reads_it(
    voices, tmp_path, suffix
):
    wav = voices(1, 1.5).numpy()
    path = tmp_path / f"voice.{suffix}"
    times = np.arange(66150) / 44100
    stereo = np.stack([np.interp(times, np.arange(24000) / 16000, wav)] * 2, axis=1)
    soundfile.write(path, stereo, 44100)
    found, expected = verdicts.read_voice(path), read_audio(path)
    n = min(len(found), len(expected))
    assert abs(len(found) - 24000) < 1600 and found.dtype == torch.float32
    shared = torch.cosine_similarity(found[:n], expected[:n], dim=0)
    assert shared > (0.99 if suffix in ("wav", "flac") else 0.9)


def test_no_more_than_a_minute_is_read(tmp_path):
    soundfile.write(tmp_path / "long.wav", 0.1 * np.ones(16000 * 65), 16000)
    assert len(verdicts.read_voice(tmp_path / "long.wav")) == 60 * 16000


def _write_text(path, other):
    path.write_text("not a voice")


def _write_nothing(path, other):
    path.touch()


def _write_short(path, other):
    soundfile.write(path, 0.1 * np.ones(4800), 16000)


def _write_silence(path, other):
    soundfile.write(path, np.zeros(32000), 16000)


def _write_playlist(path, other):
    path.write_text(f"ffconcat version 1.0\nfile {other.name}\n")


BAD = [
    (_write_text, "“bad.wav” cannot be read as audio; give a WAV, FLAC, Ogg, MP3 or M4A file."),
    (_write_nothing, "“bad.wav” cannot be read as audio; give a WAV, FLAC, Ogg, MP3 or M4A file."),
    (_write_short, "“bad.wav” lasts 0.3 s; at least 1 s is needed."),
    (_write_silence, "“bad.wav” is silent; check the microphone."),
    (_write_playlist, "“bad.wav” cannot be read as audio; give a WAV, FLAC, Ogg, MP3 or M4A file."),
]


@pytest.mark.parametrize(("write", "sentence"), BAD)
def test_a_bad_recording_is_one_sentence_and_is_deleted(model, tmp_path, write, sentence):
    other, path = tmp_path / "other.wav", tmp_path / "bad.wav"
    soundfile.write(other, 0.1 * np.ones(32000), 16000)
    write(path, other)
    with pytest.raises(verdicts.Refusal) as refusal:
        model.embed(str(path))
    assert refusal.value.message == sentence
    assert not path.exists() and other.exists()


# Verdicts


def test_verdicts_without_calibration_are_the_reports_thresholds(model, student, recording):
    pair = recording(1), recording(2)
    expected = cosines(student, *pair)
    rows = verdicts.compare(model, *pair).set_index("dimensions")
    assert list(rows.index) == list(SIZES) and "probability" not in rows
    for size, cosine in expected.items():
        row = rows.loc[size]
        assert (row["cosine"], row["threshold"]) == (f"{cosine:.2f}", "0.40")
        assert row["verdict"] == ("same person" if cosine >= THRESHOLD else "different people")
        assert row["memory"] == f"{100_000 * size * 4 / 1e6:.0f} MB"
        assert row["search of 100,000"].endswith(" ms")
    assert "Not calibrated" in model.basis() and "(demo)" in model.basis()


def test_calibrated_verdicts_are_the_calibrations_probabilities(
    exported, student, recording, tmp_path
):
    bounds = {SIZES[0]: ((0.5, 0.7), (0.0, 0.8))}  # the others go on as far as one likes
    fitted = {d: Calibration(-1.0 + d / 100, 3.0, (0.5, -0.25), bounds.get(d, ())) for d in SIZES}
    folder = shutil.copytree(exported, tmp_path / "calibrated")
    write_calibrations(fitted, folder / "calibration.json")
    pair = recording(1, seconds=2.5), recording(2, seconds=1.5)
    expected, model = cosines(student, *pair), verdicts.Model(str(folder))
    rows = verdicts.compare(model, *pair).set_index("dimensions")
    for size, cosine in expected.items():
        log_ratio = fitted[size](np.array([cosine]), np.log([[1.5, 2.5]])).item()
        percent = float(rows.loc[size, "probability"].removesuffix(" %"))
        assert percent == pytest.approx(100 / (1 + np.exp(-log_ratio)), abs=0.1)
        assert rows.loc[size, "verdict"] == ("same person" if log_ratio > 0 else "different people")
    assert "threshold" not in rows and model.basis().startswith("Calibrated")


def test_a_model_without_a_report_gives_cosines_and_no_verdict(student, recording, tmp_path):
    model = verdicts.Model(str(export_model(student, tmp_path / "bare")))
    rows = verdicts.compare(model, recording(1), recording(2))
    assert set(rows["verdict"]) == {"no verdict"} and "threshold" not in rows


def test_a_recording_is_compared_again_after_its_file_is_gone(model, recording):
    first = recording(1)
    verdicts.compare(model, first, recording(1, clip=1))
    assert not os.path.exists(first)
    assert len(verdicts.compare(model, first, recording(2))) == len(SIZES)


def test_the_enrolled_are_in_the_order_of_the_cosines_with_their_mean(model, student, recording):
    def unit(path, size):
        with torch.no_grad():
            return F.normalize(student(read_audio(path).unsqueeze(0))[0, :size], dim=0)

    people, clips, asked = {}, [(1, 0), (1, 1), (2, 0), (3, 0)], (2, 5)
    expected = {
        f"<Ann {speaker}>": {
            size: F.cosine_similarity(
                sum(unit(recording(*clip), size) for clip in clips if clip[0] == speaker),
                unit(recording(*asked), size),
                dim=0,
            ).item()
            for size in SIZES
        }
        for speaker in (1, 2, 3)
    }
    for speaker, clip in clips:
        verdicts.enrol(model, recording(speaker, clip), f"<Ann {speaker}>", people)
    verdict, columns = verdicts.find(model, recording(*asked), people)
    for size, column in zip(SIZES, columns, strict=True):
        ranked = sorted(expected, key=lambda name: expected[name][size], reverse=True)
        cells = [f"{name} {expected[name][size]:.2f}" for name in ranked]
        assert column == f"{size} dimensions"
        assert [cell.removesuffix(" ✓") for cell in columns[column]] == cells
        same = [expected[name][size] >= THRESHOLD for name in ranked]
        assert [cell.endswith(" ✓") for cell in columns[column]] == same
    assert verdict.startswith(f"Most like {ranked[0]}, ")


def test_a_recording_that_is_refused_enrols_nobody(model, tmp_path):
    path, people = tmp_path / "bad.wav", {}
    path.write_text("not a voice")
    with pytest.raises(verdicts.Refusal, match="cannot be read as audio"):
        verdicts.enrol(model, str(path), "Ann", people)
    assert people == {}


def test_a_search_takes_the_shortest_of_its_runs(monkeypatch):
    clock = iter([0, 5, 10, 13, 20, 29, 30, 37])
    monkeypatch.setattr(verdicts.time, "perf_counter", lambda: next(clock))
    assert verdicts.time_searches([64, 256], n=10, runs=2) == {64: 3, 256: 7}


@pytest.mark.parametrize(("n", "how"), [(4, "PCA"), (12, "t-SNE")])
def test_a_map_has_a_point_for_each_recording_and_a_colour_for_each_voice(model, n, how):
    rng = np.random.default_rng(0)
    centres = np.eye(32)[:2] + 0.5 * np.eye(32)[2:4]
    voices = [(f"v{i}", centres[i % 2] + 0.01 * rng.standard_normal(32)) for i in range(n)]
    points, about = verdicts.draw_map(model, 32, voices)
    assert points["voice"].value_counts().tolist() == [n // 2, n // 2]
    assert f"{n} recordings by {how} of 32" in about and "2 voices" in about
    assert points["recording"].tolist() == [name for name, _ in voices]
    one, other = (points[points["voice"] == f"voice {i}"][["x", "y"]].mean() for i in (1, 2))
    assert np.linalg.norm(one - other) > 0


def test_a_map_of_two_recordings_says_how_many_it_needs(model):
    points, about = verdicts.draw_map(model, 32, [("a", np.ones(32)), ("b", np.ones(32))])
    assert points is None and about == "A map needs at least 3 recordings; there are 2."


# What a request may name


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """Where Gradio puts what a visitor uploads."""
    folder = tmp_path_factory.mktemp("uploads")
    before, os.environ["GRADIO_TEMP_DIR"] = os.environ.get("GRADIO_TEMP_DIR"), str(folder)
    yield folder
    os.environ.pop("GRADIO_TEMP_DIR")
    if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before


class Request:
    """One call of the page's own functions over HTTP, as a program could make it."""

    def __init__(self, address, page):
        self.address, self.page = address.rstrip("/"), page

    def compare(self, one, two):
        button = next(fn for fn in self.page.fns.values() if fn.api_name == "compare")
        body = {"data": [one, two], "fn_index": button._id, "session_hash": "s"}
        self._ask("/gradio_api/queue/join", body)
        with urllib.request.urlopen(
            f"{self.address}/gradio_api/queue/data?session_hash=s", timeout=60
        ) as answer:
            for line in answer:
                event = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if event.get("msg") == "process_completed":
                    return json.dumps(event["output"])

    def _ask(self, path, body):
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, kind)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def request_(model, uploads):
    app, address, _ = space.launch(
        model, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1"
    )
    yield Request(address, app.get_blocks())
    app.get_blocks().close()


@pytest.fixture
def elsewhere():
    """A server that is not the page's; the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x.wav", asked
    server.shutdown()


def _stream(path):
    return {"path": str(path), "is_stream": True, "meta": {"_type": "gradio.FileData"}}


def test_an_address_that_a_visitor_names_is_not_fetched(request_, elsewhere):
    address, asked = elsewhere
    answer = request_.compare(_stream(address), _stream(address))
    assert "Only recordings that you upload here are read." in answer
    with pytest.raises(verdicts.Refusal, match="cannot be read as audio"):
        verdicts.read_voice(address)
    assert asked == []


def test_a_file_of_the_server_that_a_visitor_names_is_neither_read_nor_deleted(request_, recording):
    path = recording(1)
    answer = request_.compare(_stream(path), _stream(path))
    assert "cosine" not in answer and os.path.exists(path)


def test_a_file_that_takes_too_long_is_given_up(recording, monkeypatch):
    ticks = iter(range(0, 1000, 7))
    monkeypatch.setattr(verdicts.time, "monotonic", lambda: next(ticks))
    with pytest.raises(verdicts.Refusal, match="takes too long to read; give a shorter one"):
        verdicts.read_voice(recording(1))


def test_the_queue_has_an_end(request_):
    assert request_.page._queue.max_size == space.WAITING


def test_one_file_uploaded_twice_is_embedded_twice(model, recording, monkeypatch):
    path = recording(1)
    first, again = model.embed(path), model.embed(path)
    np.testing.assert_array_equal(first[0], again[0])
    assert not os.path.exists(path)
    monkeypatch.setattr(verdicts, "KEPT_SECONDS", 0)
    with pytest.raises(verdicts.Refusal):
        model.embed(path)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_samples_that_are_no_sound_are_refused(model, tmp_path, value):
    samples = 0.1 * np.ones(32000, np.float32)
    samples[9000] = value
    soundfile.write(tmp_path / "bad.wav", samples, 16000, "FLOAT")
    with pytest.raises(verdicts.Refusal, match="holds samples that are no audio"):
        model.embed(str(tmp_path / "bad.wav"))


# The page in a browser

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs the packages chromium and chromium-driver",
)
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync window-size=1100,900"
).split()


@pytest.fixture(scope="module")
def browser(model, uploads):
    webdriver = pytest.importorskip("selenium.webdriver")
    app, address, _ = space.launch(
        model, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"user-data-dir={profile}"]:
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=service)
        driver.implicitly_wait(20)
        driver.get(address)
        yield driver
        driver.quit()
    app.get_blocks().close()


class Visitor:
    """Uploads, clicks and reads as a person does."""

    def __init__(self, browser):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.by = browser, By
        self.until = WebDriverWait(browser, 20, 0.05).until

    def upload(self, place, *paths):
        files = self.browser.find_element(self.by.CSS_SELECTOR, f"#{place} input[type=file]")
        files.send_keys("\n".join(map(str, paths)))

    def replace(self, place, path):
        self.browser.find_element(
            self.by.CSS_SELECTOR, f"#{place} button[aria-label=Clear]"
        ).click()
        self.give(place, path)

    def give(self, place, path):
        """Upload a recording, and wait until its waveform can be played."""
        self.upload(place, path)
        self.browser.find_element(self.by.CSS_SELECTOR, f"#{place} button[aria-label=Clear]")

    def click(self, label):
        self.click_shown(f"//button[normalize-space()='{label}']")

    def open(self, tab):
        self.click_shown(f"//button[@role='tab'][normalize-space()='{tab}']")

    def click_shown(self, xpath):
        """Of the buttons at ``xpath`` that which is on screen, as soon as there is one."""

        def shown(browser):
            buttons = browser.find_elements(self.by.XPATH, xpath)
            return next((button for button in buttons if button.is_displayed()), None)

        self.until(shown, xpath).click()

    def wait_for(self, place, text):
        """What is on screen at ``place``, its text boxes included, once ``text`` is."""

        boxes = "[...page.querySelectorAll('textarea, input')].map(box => box.value)"

        def shown(browser):
            script = f"let page = arguments[0]; return [page.innerText, ...{boxes}].join('\\n')"
            element = browser.find_element(self.by.CSS_SELECTOR, place)
            found = browser.execute_script(script, element)
            return text in found and found

        return self.until(shown, text)


@pytest.fixture
def visitor(browser):
    return Visitor(browser)


def kept(uploads):
    """Files with content; Gradio leaves empty ones behind."""
    return [path for path in uploads.rglob("*") if path.is_file() and path.stat().st_size]


@needs_chromium
def test_two_uploads_and_a_click_give_a_verdict_and_leave_no_file(
    visitor, student, recording, uploads, tmp_path
):
    bad = tmp_path / "bad.wav"
    bad.write_text("not a voice")
    good, other = recording(1), recording(2)
    expected = cosines(student, good, other)

    visitor.open("Compare")
    visitor.click("Same or different?")
    visitor.wait_for("body", "Record or upload the first voice too.")
    visitor.upload("first", bad)
    visitor.give("second", other)
    visitor.click("Same or different?")
    visitor.wait_for("body", "“bad.wav” cannot be read as audio")
    visitor.replace("first", good)
    visitor.click("Same or different?")
    seen = " ".join(visitor.wait_for("#comparison", " MB").split())
    for size, cosine in expected.items():
        verdict = "same person" if cosine >= THRESHOLD else "different people"
        assert f"{size} {verdict} {cosine:.2f} 0.40 " in seen
    assert kept(uploads) == []


@needs_chromium
def test_an_enrolled_voice_is_found_and_forgotten(visitor, recording, uploads):
    visitor.open("Find")
    for speaker in (1, 2):
        visitor.give("new", recording(speaker))
        name = visitor.browser.find_element(visitor.by.CSS_SELECTOR, "#name textarea, #name input")
        name.send_keys(f"Speaker {speaker}")
        visitor.click("Enrol")
        visitor.wait_for("#enrolled", f"Speaker {speaker} (1)")
    visitor.give("asked", recording(2, clip=4))
    visitor.click("Find the nearest")
    visitor.wait_for("#nearest", "Most like Speaker 2")
    assert kept(uploads) == []
    visitor.click("Forget all")
    visitor.wait_for("#enrolled", "nobody yet")


@needs_chromium
def test_dropped_files_become_a_map_and_leave_no_file(visitor, recording, uploads, tmp_path):
    bad = tmp_path / "notes.txt"
    bad.write_text("not a voice")
    visitor.open("Map")
    visitor.upload("files", *[recording(speaker) for speaker in range(4)], bad)
    visitor.wait_for("#map", "4 recordings by PCA of 8 dimensions")
    visitor.wait_for("body", "“notes.txt” cannot be read as audio")
    drawn = visitor.browser.find_element(visitor.by.CSS_SELECTOR, "#plot canvas, #plot svg.marks")
    assert drawn.size["width"] > 300
    assert kept(uploads) == []


@needs_chromium
def test_the_page_fits_a_phone_and_asks_nobody_else(visitor):
    log = visitor.browser.get_log("performance")
    messages = [json.loads(entry["message"])["message"] for entry in log]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if url.startswith("http") and "//127.0.0.1" not in url} == set()
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    visitor.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for tab in ("Map", "Find", "Compare"):
        visitor.open(tab)
        assert visitor.browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_the_command_line_serves_the_model_that_it_names(exported, monkeypatch):
    served = []
    monkeypatch.setattr(space, "launch", served.append)
    space.main(["--model", str(exported)])
    assert served[0].name == "tiny-model" and served[0].sizes == list(SIZES)
    assert Path(space.__file__).with_name("model.json").exists() is False
    with pytest.raises(SystemExit):
        space.main([])
