"""Chapter 26: packed folders, batches, a service under load and under attack, monitoring against its nulls, the gate, the page."""

import asyncio
import copy
import http.client
import importlib.util
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from ftbook import compress, deploy, models, vision
from ftbook.deploy import (
    Batcher,
    Limits,
    Model,
    Monitor,
    drift_test,
    field_calibration,
    load_test,
    pack,
    psi,
    refresh,
    to_onnx,
    verify,
)
from ftbook.ner import NERTagger
from ftbook.studies import deploy as study
from ftbook.tags import label_list
from ftbook.texts import TextClassifier, encode_texts

EXTRA = "onnx", "onnxscript", "onnxruntime", "fastapi", "uvicorn"
ABSENT = [name for name in EXTRA if importlib.util.find_spec(name) is None]
extra = pytest.mark.skipif(bool(ABSENT), reason=f"pip install 'ftbook[deploy]' for {', '.join(ABSENT)}")
TEXTS = ["A fine film.", "Dull, dull, dull.", "word " * 40, "Zürich 😀 is far"]


def picture(seed=0, size=(30, 40), kind="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def bert():
    return models.load("bert_mini_en")


@pytest.fixture(scope="module")
def classifier(bert):
    torch.manual_seed(0)
    return TextClassifier(copy.deepcopy(bert[0]), 2).eval()


@pytest.fixture(scope="module")
def tagger():
    torch.manual_seed(0)
    return NERTagger.from_pretrained("bert_mini_en", labels=label_list(["PER", "LOC"]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bert, classifier, tagger):
    """One packed folder of each kind."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    place = tmp_path_factory.mktemp("packed")
    about = {"labels": ["no", "yes"], "tokenizer": bert[1], "examples": TEXTS[:1], "reference": TEXTS * 8}
    return {
        "text": pack(classifier, place / "text", card="Says yes or no.", **about),
        "tagger": pack(tagger, place / "tagger", examples=["Anna lives in Paris."]),
        "image": pack(vision.load_bundled(), place / "image", size=32, examples=[picture()], version="2.1"),
    }


@pytest.fixture
def folder(folders, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folders["image"], tmp_path / "copy"))


# ---------------------------------------------------------------- the network as a file


def by_torch(classifier, tokenizer, text):
    inputs = encode_texts([text], tokenizer, 128)
    with torch.no_grad():
        return classifier(**inputs).softmax(1)[0].tolist()


@extra
def test_a_text_is_answered_alone_and_in_a_batch_as_by_the_network(folders, classifier, bert):
    model = Model(folders["text"])
    together = model(TEXTS)
    for text, answer in zip(TEXTS, together, strict=True):
        wanted = by_torch(classifier, bert[1], text)
        assert list(answer["probabilities"].values()) == pytest.approx(wanted, abs=1e-4)
        assert model([text])[0]["probability"] == pytest.approx(answer["probability"], abs=1e-4)


@extra
def test_a_picture_is_answered_as_by_the_network(folders):
    net, [answer] = vision.load_bundled(), Model(folders["image"])([picture(3)])
    x = deploy.decode_image(picture(3), size=32).float()[None] / 255
    with torch.no_grad():
        wanted = net(x).softmax(1)[0]
    assert answer["label"] == net.classes[int(wanted.argmax())]
    assert list(answer["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-4)


@extra
def test_entities_are_those_of_the_tagger_in_texts_of_any_length(folders, tagger):
    texts = ["Anna lives in Paris. " * 30, "Zürich 😀", "x"]
    for found, wanted in zip(Model(folders["tagger"])(texts), tagger.predict(texts), strict=True):
        keys = [(e.text, e.type, e.start, e.end) for e in wanted]
        assert [(e["text"], e["type"], e["start"], e["end"]) for e in found["entities"]] == keys


@extra
def test_eight_bits_are_smaller_and_their_weights_on_the_grid_of_chapter_20(classifier, tmp_path):
    import onnx
    from onnx import numpy_helper

    to_onnx(classifier, tmp_path / "whole.onnx")
    to_onnx(classifier, tmp_path / "small.onnx", bits=8)
    assert (tmp_path / "small.onnx").stat().st_size < 0.4 * (tmp_path / "whole.onnx").stat().st_size
    stored = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "small.onnx").graph.initializer]
    weight = classifier.body.encoder.layer[0].intermediate.dense.weight.detach()
    grid = compress.Grid()
    scale, _ = compress.scales(weight, grid)
    codes = (weight / scale).round().T.numpy()
    same = [v for v in stored if v.dtype == np.int8 and v.shape == codes.shape and (abs(v - codes) <= 1).all()]
    assert len(same) == 1 and (same[0] == codes).mean() > 0.99  # a tie may be rounded the other way


@extra
def test_a_network_that_looks_at_its_inputs_is_refused(tmp_path):
    calls = []

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(12, 2)

        def forward(self, x):
            calls.append(0)  # the file keeps the number of calls when it was traced
            return self.head(x.flatten(1) * len(calls))

    with pytest.raises(ValueError, match="which a file cannot"):
        to_onnx(Odd(), tmp_path / "x.onnx", size=2)
    assert not (tmp_path / "x.onnx").exists()


def test_without_the_extra_the_message_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ftbook\[deploy\]'"):
        deploy._need("onnxruntime")


# ---------------------------------------------------------------- the folder


@extra
def test_a_folder_explains_itself(folders):
    about = verify(folders["image"])
    assert about["kind"] == "image" and about["version"] == "2.1" and about["labels"][0] == "airplane"
    assert about["preprocessing"]["size"] == 32 and about["gap"] < 1e-3 and len(about["digest"]) == 64
    assert about["opset"] >= 18
    text = (folders["text"] / "README.md").read_text()
    assert "Says yes or no." in text and "| labels | no, yes |" in text
    names = {p.name for p in folders["text"].iterdir()}
    assert names == deploy._FILES | {"manifest.json"}


@extra
def test_a_folder_of_any_kind_answers_as_when_it_was_packed(folders):
    for folder in folders.values():
        model = Model(folder)
        assert len(model.examples) == 1
        model.try_examples()


@extra
@pytest.mark.parametrize("name", ["model.onnx", "model.json", "README.md", "example.json"])
def test_a_changed_byte_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not the file that was packed"):
        Model(folder)


@extra
def test_missing_and_foreign_files_and_links_are_refused(folder):
    whole = (folder / "model.onnx").read_bytes()
    for name in ("run.py", "weights.pkl", "model.onnx.data"):
        (folder / name).write_text("boo")
        with pytest.raises(ValueError, match=f"holds {re.escape(name)}; allowed are"):
            verify(folder)
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not listed"):
        verify(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"model\.onnx is missing"):
        verify(folder)
    (folder.parent / "elsewhere").write_bytes(whole)
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(ValueError, match="no regular file"):
        verify(folder)


@extra
@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"model.json": {}}}'])
def test_a_broken_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is no manifest"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"give a folder that ftbook\.deploy\.pack wrote"):
        verify(folder)


@extra
def test_a_manifest_cannot_name_files_outside(folder):
    told = json.loads((folder / "manifest.json").read_text())
    told["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"holds \.\./secret"):
        verify(folder)


@extra
def test_another_answer_than_when_it_was_packed_stops_the_service(folder):
    model = Model(folder)
    model.examples[0]["answer"]["label"] = "ship"
    with pytest.raises(RuntimeError, match="install the versions it was packed with"):
        model.try_examples()


@extra
def test_what_cannot_be_packed_leaves_nothing_behind(tmp_path, classifier, bert, folders):
    with pytest.raises(ValueError, match="give one name for each"):
        pack(vision.load_bundled(), tmp_path / "a", size=32, labels=["one"])
    with pytest.raises(ValueError, match="tokenizer is missing"):
        pack(classifier, tmp_path / "b", labels=["no", "yes"])
    with pytest.raises(FileExistsError, match="name of a new folder"):
        pack(classifier, folders["text"], tokenizer=bert[1])
    assert list(tmp_path.iterdir()) == []


@extra
@pytest.mark.parametrize("value", ["", "  ", 3, None])
def test_what_is_no_text_is_refused(folders, value):
    with pytest.raises((TypeError, ValueError), match="give a text"):
        Model(folders["text"]).prepare(value)


@extra
def test_pictures_are_refused_by_what_they_claim_before_they_are_decoded(folders):
    model = Model(folders["image"])
    model.about["preprocessing"]["max_pixels"] = 100
    with pytest.raises(ValueError, match=r"30 pixels, more than the 100 allowed"):
        model.prepare(picture(size=(30, 40)))
    with pytest.raises(ValueError, match="cannot be decoded"):
        model.prepare(b"no picture")
    with pytest.raises(TypeError, match="bytes of a picture file"):
        model.prepare("text")


# ---------------------------------------------------------------- batches


def test_every_input_gets_its_own_result_in_batches_of_bounded_size():
    sizes = []

    async def main():
        batcher = Batcher(lambda many: [v * v for v in many], 4, 0.01, lambda n, s: sizes.append(n))
        found = await asyncio.gather(*(batcher(v, 5.0) for v in range(30)))
        await batcher.close()
        return found

    assert asyncio.run(main()) == [v * v for v in range(30)]
    assert sum(sizes) == 30 and max(sizes) <= 4 and len(sizes) <= 10


def test_the_window_waits_for_others_and_no_longer():
    sizes = []

    async def main(window, gap):
        batcher = Batcher(list, 8, window, lambda n, s: sizes.append(n))

        async def later(v):
            await asyncio.sleep(gap * v)
            return await batcher(v, 5.0)

        await asyncio.gather(*map(later, range(3)))
        await batcher.close()

    asyncio.run(main(1.0, 0.02))
    assert sizes == [3]
    sizes.clear()
    asyncio.run(main(0.0, 0.2))
    assert sizes == [1, 1, 1]


def test_a_bad_input_harms_no_other():
    def answer(many):
        return [1 / v for v in many]

    async def main():
        batcher = Batcher(answer, 8, 0.05)
        found = await asyncio.gather(*(batcher(v, 5.0) for v in (1, 0, 2)), return_exceptions=True)
        await batcher.close()
        return found

    first, bad, last = asyncio.run(main())
    assert (first, last) == (1.0, 0.5) and isinstance(bad, ZeroDivisionError)


def test_who_gave_up_is_not_computed_and_the_rest_is():
    seen = []

    def slow(many):
        seen.extend(many)
        time.sleep(0.3)
        return many

    async def main():
        batcher = Batcher(slow, 1, 0.0)
        first = asyncio.create_task(batcher("first", 5.0))
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            await batcher("late", 0.05)
        last = await batcher("last", 5.0)
        await batcher.close()
        return await first, last

    assert asyncio.run(main()) == ("first", "last") and seen == ["first", "last"]


def test_closing_answers_what_waits():
    async def main():
        batcher = Batcher(list, 2, 10.0)
        waiting = [asyncio.create_task(batcher(v, 5.0)) for v in range(5)]
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            await batcher(9, 1.0)
        return [await w for w in waiting]

    begun = time.monotonic()
    assert asyncio.run(main()) == [0, 1, 2, 3, 4] and time.monotonic() - begun < 5


@given(st.integers(1, 5), st.integers(0, 25), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_nothing_is_lost_or_exchanged_whatever_the_sizes(size, n, wait):
    async def main():
        batcher = Batcher(lambda many: [(v, len(many)) for v in many], size, wait / 1000)
        found = await asyncio.gather(*(batcher(v, 20.0) for v in range(n)))
        await batcher.close()
        return found

    found = asyncio.run(main())
    assert [v for v, _ in found] == list(range(n)) and all(1 <= many <= size for _, many in found)


@pytest.mark.parametrize("about", [{"requests": 0}, {"seconds": 0}, {"window": -1}, {"batch": 1.5}])
def test_limits_that_are_none_are_refused(about):
    with pytest.raises(ValueError, match=next(iter(about))):
        Limits(**about)


# ---------------------------------------------------------------- the service


@contextmanager
def running(folder, limits=None, slow=None, **options):
    """The service on loopback, in a thread; `slow` seconds for every batch."""
    import uvicorn

    app = deploy.create_app(folder, limits, **options)
    if slow:
        model, whole = app.state.house.model, app.state.house.model.answer
        app.state.house.model.answer = lambda many: time.sleep(slow) or whole(many)
        model.try_examples = lambda: None
    place = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}", app.state.house
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def texts_service(folders):
    with running(folders["text"], Limits(body=20_000, texts=3, characters=500), window=16) as found:
        yield found


def ask(url, method="POST", path="/predict", body=b"", **headers):
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    line.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = line.getresponse()
    content = answer.read()
    line.close()
    plain = "json" in (answer.getheader("content-type") or "")
    return answer.status, json.loads(content) if plain else content.decode(), answer.headers


def ask_texts(url, *texts, **more):
    body = json.dumps({"inputs": list(texts), **more}).encode()
    return ask(url, body=body, content_type="application/json")


@extra
def test_the_service_answers_as_the_folder_does(texts_service, folders):
    url, _ = texts_service
    status, found, headers = ask_texts(url, *TEXTS[:3])
    wanted = Model(folders["text"])(TEXTS[:3])
    assert status == 200 and found["version"] == "1" and len(headers["X-Request-ID"]) == 16
    for a, b in zip(found["outputs"], wanted, strict=True):
        assert deploy._alike(a, b)


@extra
def test_health_info_and_metrics(texts_service):
    url, house = texts_service
    ask_texts(url, "A fine film.")
    assert ask(url, "GET", "/health")[:2] == (200, {"status": "ok", "digest": house.model.digest})
    info = ask(url, "GET", "/info")[1]
    assert info["labels"] == ["no", "yes"] and info["limits"]["texts"] == 3 and "Says yes" in info["card"]
    text = ask(url, "GET", "/metrics")[1]
    for line in text.splitlines():
        assert re.fullmatch(r'[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [0-9.e+-]+', line), line
    count = sum(int(n) for n in re.findall(r"requests_total\{.*\} (\d+)", text))
    assert f"ftbook_request_seconds_count {count}" in text and count >= 1


@extra
@pytest.mark.parametrize(
    "body, type_, status, code",
    [
        (b"{", "application/json", 422, "not_understood"),
        (b"[" * 10_000, "application/json", 422, "not_understood"),
        (b"\xff\xfe", "application/json", 422, "not_understood"),
        (b'{"inputs": []}', "application/json", 422, "not_understood"),
        (b'{"inputs": "text"}', "application/json", 422, "not_understood"),
        (b'{"inputs": ["a", 3]}', "application/json", 422, "not_understood"),
        (b'{"inputs": ["a"], "model": "/etc/passwd"}', "application/json", 422, "not_understood"),
        (b'{"inputs": ["a", " "]}', "application/json", 422, "bad_input"),
        (b'{"inputs": ["a", "b", "c", "d"]}', "application/json", 413, "too_large"),
        (json.dumps({"inputs": ["a" * 501]}).encode(), "application/json", 413, "too_large"),
        (b"x" * 20_001, "application/json", 413, "too_large"),
        (b'{"inputs": ["a"]}', "text/plain", 415, "wrong_type"),
        (b'{"inputs": ["a"]}', "", 415, "wrong_type"),
    ],
)
def test_what_the_service_does_not_take_gets_a_reason(texts_service, body, type_, status, code):
    found = ask(texts_service[0], body=body, content_type=type_)
    assert found[0] == status and found[1]["error"]["code"] == code and found[1]["error"]["message"]
    assert "Traceback" not in json.dumps(found[1])
    assert ask_texts(texts_service[0], "still there")[0] == 200


@extra
def test_a_body_without_a_stated_length_is_counted_too(texts_service):
    line = http.client.HTTPConnection(texts_service[0].removeprefix("http://"), timeout=30)
    parts = (b"x" * 5000 for _ in range(8))
    line.request("POST", "/predict", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert line.getresponse().status == 413
    line.close()


@extra
def test_halves_of_pairs_and_null_bytes_are_texts_like_others(texts_service):
    assert ask(texts_service[0], body=b'{"inputs": ["a \\ud800 b \\u0000"]}', content_type="application/json")[0] == 200


@extra
@pytest.mark.parametrize(
    "method, path, status", [("GET", "/predict", 405), ("GET", "/../model.json", 404), ("GET", "/docs", 404)]
)
def test_other_paths_get_a_reason_too(texts_service, method, path, status):
    found = ask(texts_service[0], method, path)
    assert found[0] == status and "see /info" in found[1]["error"]["message"]


@extra
def test_a_failure_inside_tells_the_client_nothing_but_a_number(folders, caplog):
    with running(folders["text"]) as (url, house):
        house.model.answer = lambda many: 1 / 0
        house.batcher.answer = house.model.answer
        status, found, headers = ask_texts(url, "a")
        assert status == 500 and found["error"]["code"] == "failed" and "Zero" not in json.dumps(found)
        assert headers["X-Request-ID"] in found["error"]["message"]
        assert ask(url, "GET", "/health")[0] == 200


@extra
def test_a_slow_client_is_let_go(folders):
    with running(folders["text"], Limits(seconds=0.3)) as (url, house):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{")
            assert b" 408 " in line.recv(200)
        assert house.metrics.busy == 0


@extra
def test_what_takes_too_long_is_told_so(folders):
    with running(folders["text"], Limits(seconds=0.2), slow=0.6) as (url, house):
        status, found, _ = ask_texts(url, "a")
        assert status == 504 and found["error"]["code"] == "late" and house.metrics.busy == 0


@extra
def test_under_overload_nothing_is_lost_and_no_answer_is_exchanged(folders):
    texts = [f"{'fine ' * (i % 7)} film number {i}" for i in range(80)]
    with running(folders["text"], Limits(requests=4, batch=4, seconds=20.0), slow=0.05) as (url, house):
        found = load_test(url, texts, clients=16)
        assert set(found.statuses) == {200, 429} and sum(found.statuses.values()) == 80 and found.lost == 0
        assert ask_texts(url, "a")[0] == 200 and house.metrics.busy == 0
        assert f'requests_total{{status="429"}} {found.statuses[429]}' in house.metrics.text(None)
    model = Model(folders["text"])
    answered = [i for i, v in enumerate(found.outputs) if v]
    for i, wanted in zip(answered, model([texts[i] for i in answered]), strict=True):
        assert deploy._alike(found.outputs[i], wanted)
    assert 0 < found.p50 <= found.p95 <= found.p99 and found.per_second > 0


@extra
def test_requests_that_are_under_way_are_answered_before_the_service_stops(folders):
    got = []
    with running(folders["text"], slow=0.5) as (url, _):
        thread = threading.Thread(target=lambda: got.append(ask_texts(url, "a")[0]))
        thread.start()
        time.sleep(0.2)
    thread.join(10)
    assert got == [200]


@extra
def test_a_service_of_pictures_and_one_of_entities(folders):
    with running(folders["image"]) as (url, _):
        found = ask(url, body=picture(kind="JPEG"), content_type="image/jpeg")
        assert found[0] == 200 and found[1]["outputs"][0]["label"] in vision.load_bundled().classes
        assert ask(url, body=b"GIF89a", content_type="image/gif")[1]["error"]["code"] == "bad_input"
        assert ask(url, body=b"{}", content_type="application/json")[0] == 415
    with running(folders["tagger"]) as (url, _):
        assert "entities" in ask_texts(url, "Anna lives in Paris.")[1]["outputs"][0]


@extra
def test_the_monitor_of_the_service_judges_full_windows(texts_service):
    url, house = texts_service
    for _ in range(6):
        ask_texts(url, "a", "b", "c")
    for _ in range(200):
        if house.monitor.windows:
            break
        time.sleep(0.05)
    assert house.monitor.windows >= 1 and "ftbook_drift_windows_total" in ask(url, "GET", "/metrics")[1]


@extra
def test_one_command_serves_a_folder_and_ends_cleanly(folders):
    command = [sys.executable, "-m", "ftbook.deploy", str(folders["image"]), "--port", "0", "--requests", "7"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        url = re.search(r"http://\S+", run.stdout.readline())[0]
        for _ in range(600):
            try:
                assert ask(url, "GET", "/info")[1]["limits"]["requests"] == 7
                break
            except OSError:
                time.sleep(0.1)
        assert ask(url, body=picture(), content_type="image/png")[0] == 200
    finally:
        run.terminate()
        assert run.wait(60) in (0, -15)


def test_the_container_runs_the_service_as_nobody_and_its_commands_stand_in_the_file():
    text = (deploy.asset("deploy") / "Dockerfile").read_text()
    assert "USER nobody" in text and '"ftbook.deploy", "/model"' in text
    commands = [line[2:].strip() for line in text.splitlines() if line.startswith("#   ")]
    assert [c.split()[:2] for c in commands] == [["docker", "build"], ["docker", "run"]]
    assert "--read-only" in commands[1] and ":/model:ro" in commands[1] and "127.0.0.1:8000" in commands[1]
    for line in text.splitlines():
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((Path(deploy.__file__).parents[1] / s).exists() for s in sources)


# ---------------------------------------------------------------- the page


@extra
@pytest.mark.parametrize("kind", ["text", "image", "tagger"])
def test_the_page_talks_to_the_service(folders, kind, tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    where = os.environ.get("FTBOOK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not where:
        pytest.skip("Chromium is not installed")
    with running(folders[kind]) as (url, _), api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=where, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        trouble = []
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on(
            "console", lambda m: m.type == "error" and "/favicon" not in m.location["url"] and trouble.append(m.text)
        )
        page.goto(url)
        page.get_by_text("version").wait_for()
        if kind == "image":
            (tmp_path / "a.png").write_bytes(picture())
            page.get_by_label("Picture").set_input_files(tmp_path / "a.png")
        else:
            page.get_by_label("Text", exact=True).fill("Anna lives in Paris 😀 <b>")
        page.get_by_role("button", name="Ask the model").click()
        answer = page.locator("#answer")
        if kind == "tagger":
            answer.get_by_text("Anna").first.wait_for()
            assert page.locator("#answer b").count() == 0, "the text stays a text"
        else:
            page.locator("#label").wait_for()
            labels = verify(folders[kind])["labels"]
            assert page.locator("#label").inner_text() in labels
        assert not trouble
        if kind == "text":
            page.get_by_label("Text", exact=True).fill(" ")
            page.get_by_role("button", name="Ask the model").click()
            page.locator(".error").wait_for()
            assert "give a text" in page.locator(".error").inner_text()
        boxes = [e.bounding_box() for e in page.locator("body *").all()]
        assert all(b["x"] + b["width"] <= 390 for b in boxes if b)
        browser.close()


@extra
def test_the_page_may_run_nothing_but_its_own_script(folders):
    with running(folders["text"]) as (url, _):
        (_, first, headers), (_, second, _) = (ask(url, "GET", "/") for _ in range(2))
    rules = headers["Content-Security-Policy"]
    key = re.search(r"script-src 'nonce-([\w-]+)'", rules)[1]
    assert "default-src 'none'" in rules and first.count(key) == 2 and key not in second
    assert "NONCE" not in first and "innerHTML" not in first and "http" not in first.split("<script")[1]


# ---------------------------------------------------------------- monitoring


def test_the_psi_is_its_definition():
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=300), draws.normal(0.5, 1, 200)
    edges = np.quantile(a, np.arange(1, 5) / 5)
    p, q = (np.bincount(np.searchsorted(edges, v), minlength=5) + 0.5 for v in (a, b))
    p, q = p / p.sum(), q / q.sum()
    wanted = sum((x - y) * math.log(x / y) for x, y in zip(q, p, strict=True))
    assert psi(a, b, bins=5) == pytest.approx(wanted) and psi(a, a, 5) == pytest.approx(0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_the_psi_of_classes_is_at_least_0_and_the_same_both_ways(a, b):
    assert psi(a, b) >= 0 and psi(a, b) == pytest.approx(psi(b, a))
    assert psi([f"c{v}" for v in a], [f"c{v}" for v in b]) == pytest.approx(psi(a, b))


def test_the_statistics_are_scipys_ks_and_the_psi():
    draws = np.random.default_rng(1)
    old = {
        "confidence": draws.integers(0, 20, 60) / 20,
        "guess": draws.integers(0, 3, 60),
        "vector": draws.normal(size=(60, 4)),
    }
    new = {
        "confidence": draws.integers(4, 20, 40) / 20,
        "guess": draws.integers(0, 3, 40),
        "vector": draws.normal(size=(40, 4)),
    }
    found = drift_test(old, new, rounds=99).values
    assert found["KS of the confidence"] == pytest.approx(
        stats.ks_2samp(old["confidence"], new["confidence"]).statistic, abs=1e-6
    )
    assert found["PSI of the answers"] == pytest.approx(psi(old["guess"], new["guess"]), abs=1e-5)
    both = np.concatenate([old["vector"], new["vector"]])
    gap = (new["vector"].mean(0) - old["vector"].mean(0)) / both.std(0)
    assert found["distance of the vectors"] == pytest.approx((gap**2).mean(), rel=1e-4)


def made(n, seed, move=0.0):
    draws = np.random.default_rng(seed)
    x = draws.normal(move, 1, (n, 3))
    return {"confidence": 1 / (1 + np.exp(-x[:, 0])), "guess": (x[:, 1] > 0).astype(int), "vector": x}


def test_the_false_alarm_rate_is_the_level_whatever_the_number_of_statistics():
    level, windows = 0.1, 300
    alarms = [drift_test(made(80, s), made(30, 10_000 + s), rounds=99, seed=s).p <= level for s in range(windows)]
    assert abs(np.mean(alarms) - level) < 3.3 * math.sqrt(level * (1 - level) / windows)


def test_drift_is_found_by_the_statistic_that_sees_it():
    moved = made(100, 1)
    moved["guess"] = np.ones(100, int)
    found = drift_test(made(300, 0), moved, rounds=399)  # three statistics: p is 3 / 400 at least
    assert found.p <= 0.01 and min(found.each, key=found.each.get) == "PSI of the answers"
    assert drift_test(made(300, 0), made(100, 2, 0.8)).p <= 0.01


def test_a_monitor_compares_each_full_window_once():
    monitor = Monitor(made(200, 0), window=50, level=0.05)
    found = []
    for seed, move in ((1, 0.0), (2, 2.0), (3, 0.0)):
        window = made(50, seed, move)
        for row in zip(*window.values(), strict=True):
            if (told := monitor.add(*row)) is not None:
                found.append(told.p <= 0.05)
    assert found[1] and monitor.windows == 3 and 1 in [k for k, _ in monitor.alarms]


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: psi([], [1]), "at least one value"),
        (lambda: drift_test({"x": [1]}, {"confidence": [1]}), "at least one of confidence, guess, vector"),
        (lambda: Monitor({}), "pack the model with reference="),
        (lambda: Monitor(made(9, 0), level=0), "between 0 and 1"),
        (lambda: Monitor(made(9, 0), window=0), "window"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_calibration_in_the_field_is_tested_at_its_level():
    draws, alarms = np.random.default_rng(0), []
    for seed in range(150):
        p = draws.dirichlet(np.ones(3), 40)
        y = [draws.choice(3, p=row) for row in p]
        alarms.append(field_calibration(p, y, rounds=99, seed=seed).p <= 0.1)
    assert abs(np.mean(alarms) - 0.1) < 3.3 * math.sqrt(0.09 / 150)
    sure = np.tile([0.95, 0.05], (60, 1))
    found = field_calibration(sure, [0] * 42 + [1] * 18)
    assert found.p < 0.01 and found.error == pytest.approx(0.25) and found.null < found.error


# ---------------------------------------------------------------- promote or keep


class Lookup:
    """A model that knows some answers."""

    kind, labels = "text", ["no", "yes"]

    def __init__(self, known, name):
        self.known, self.digest = known, name

    def __call__(self, inputs):
        return [{"label": self.known.get(v, "no")} for v in inputs]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A place with a model in use; folders are JSON files of known answers."""
    monkeypatch.setattr(deploy, "Model", lambda f: Lookup(json.loads(Path(f).read_text()), Path(f).name))
    (tmp_path / "0001").write_text("{}")
    (tmp_path / "current").write_text("0001\n")
    return tmp_path


FRESH = [(f"new {i}", "yes") for i in range(200)]
GUARD = [(f"old {i}", "no") for i in range(200)]


def learned(more):
    return lambda examples, folder: Path(folder).write_text(json.dumps(more))


def test_a_better_model_is_promoted_and_only_one_half_trained_it(shop):
    seen = []

    def retrain(examples, folder):
        seen.extend(examples)
        learned(dict(FRESH))(examples, folder)

    found = refresh(shop, retrain, FRESH, GUARD)
    assert found.promoted and (shop / "current").read_text() == "0002\n"
    judges = [e for e in FRESH if e not in seen]
    assert 60 < len(seen) < 140 and len(judges) == 200 - len(seen)
    again = []
    refresh(shop, lambda e, f: again.extend(e) or learned(dict(FRESH))(e, f), FRESH[::-1], GUARD)
    assert set(again) == set(seen), "an example stays on its side"


@pytest.mark.parametrize(
    "known, why",
    [
        ({}, "not shown to be better on fresh inputs"),
        (dict(FRESH) | {f"old {i}": "yes" for i in range(20)}, "may be lost on the guard set"),
    ],
)
def test_a_model_that_is_not_shown_to_be_better_is_kept_out(shop, known, why):
    found = refresh(shop, learned(known), FRESH, GUARD)
    assert not found.promoted and why in found.why and (shop / "current").read_text() == "0001\n"
    [line] = (shop / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["why"] == found.why and set(json.loads(line)["sets"]) == {"guard", "fresh"}


def test_a_refresh_that_fails_changes_nothing(shop, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        refresh(shop, lambda e, f: 1 / 0, FRESH, GUARD)
    with pytest.raises(ValueError, match="give at least 1, 2 and 2"):
        refresh(shop, learned({}), FRESH[:1], GUARD)

    def other(folder):
        found = Lookup({}, "x")
        found.labels = ["no", "yes"] if Path(folder).name == "0001" else ["maybe", "yes"]
        return found

    monkeypatch.setattr(deploy, "Model", other)
    with pytest.raises(ValueError, match="deploy it as another service"):
        refresh(shop, learned({}), FRESH, GUARD)
    assert (shop / "current").read_text() == "0001\n" and not (shop / "history.jsonl").exists()
    (shop / "current").unlink()
    with pytest.raises(FileNotFoundError, match="file `current`"):
        refresh(shop, learned({}), FRESH, GUARD)


def test_what_a_tagger_gets_right_is_a_whole_text():
    class Tags:
        def __call__(self, inputs):
            return [{"entities": [{"start": 0, "end": 4, "type": "PER", "score": 0.5}]} for _ in inputs]

    rows = [("Anna", [(0, 4, "PER")]), ("Anna", [[0, 4, "LOC"]]), ("x", [])]
    assert deploy._right(Tags(), rows).tolist() == [True, False, False]


# ---------------------------------------------------------------- the studies


def test_baselines_score_and_forms_are_named():
    ways = [study.MAJORITY, study.BAG, study.TORCH, study.WHOLE, study.SMALL, study.CUT]
    assert [r["way"] for r in study.rows()] == ways
    for about in ({"way": study.MAJORITY}, {"way": study.BAG, "C": 1.0}):
        assert set(study.run(0, "test", **about)["accuracy"]) <= {0.0, 1.0}


@extra
def test_a_file_says_what_the_network_says_in_the_study():
    found = study.run(0, "test", study.WHOLE)
    assert found["gap"] < 1e-4 and len(found["accuracy"]) == len(study.reviews()["test"])


@extra
@pytest.mark.parametrize("kind", study.KINDS)
def test_reference_and_window_share_no_sentence(kind):
    old, new = study._drawn(0, kind, 4, np.random.default_rng(0))
    assert {len(v) for v in old.values()} == {study.REFERENCE} and len(new["guess"]) == len(new["vector"]) <= 4


@extra
def test_the_studies_of_monitoring_are_stored(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main("alarms", "vectors", "calibration", "sizes")
    found = study.results.load_study(study.CHAPTER, "alarms").rows("alarms")
    cells = {(r["kind"], r["window"], r["rule"]) for r in found}
    assert len(cells) == len(found) == len(study.KINDS) * len(study.WINDOW) * len(study.RULES)
    assert len(study.results.load_study(study.CHAPTER, "vectors").rows("alarms")) == 4
    over = study.results.load_study(study.CHAPTER, "calibration")
    for r in over.rows("over"):
        where = {k: r[k] for k in ("way", "field")}
        gap = over.row("confidence", **where).mean - over.row("accuracy", **where).mean
        assert r.mean == pytest.approx(100 * gap, abs=0.1)
    assert [r["way"] for r in study.results.load(study.CHAPTER, "sizes")] == [study.TORCH, study.WHOLE, study.SMALL]


@extra
def test_the_same_model_again_is_not_promoted_and_answers_as_before():
    old, new = (study.run_refresh(0, "test", way) for way in (study.IN_USE, study.AGAIN))
    assert new["promoted"] == 0 and new["fresh"] < 0 and new["guard"] < 0  # equal answers show no gain
    assert all(np.array_equal(old[name], new[name]) for name in ("films", "products"))


@extra
def test_a_load_counts_batches_and_an_overload_refusals(folders):
    with study.serving(folders["text"], requests=2, batch=2) as url:
        found = study.measure(url, 2, 12)
        assert found["statuses"] == {200: 12} and found["lost"] == 0 and 1 <= found["batch"] <= 2
        crowd = study.measure(url, 8, 60)
        assert sum(crowd["statuses"].values()) == 60 and crowd["lost"] == 0


@extra
def test_what_judges_and_chooses_is_none_of_the_final_sentences():
    parts = study._products(0)
    fresh, valid = ({text for text, _ in parts[name]} for name in ("fresh", "valid"))
    assert len(fresh) == study.FRESH and not fresh & valid
    if not study.QUICK:
        assert not (fresh | valid) & {*study._field("CR").texts}


def test_an_unknown_part_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="no study 'words'; use files, sizes"):
        study.main("words")
