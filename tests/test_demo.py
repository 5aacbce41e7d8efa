"""The local page: real requests on a free port, and what it must refuse."""

import http.client
import io
import json
import threading
import time

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine

from r2kit import demo as module
from r2kit.cli import main
from r2kit.demo import Demo, is_loopback, make_server
from r2kit.errors import DataError

pytest.importorskip("captum", reason="captum (extra explain) is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Two halves: yellow sand on the left, blue water on the right; 120 x 200 pixels."""
    pixels = np.zeros((3, 120, 200), dtype=np.uint8)
    pixels[:, :, :100] = np.array([200, 170, 110])[:, None, None]
    pixels[:, :, 100:] = np.array([20, 40, 120])[:, None, None]
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    profile = {"driver": "GTiff", "height": 120, "width": 200, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", crs="EPSG:4326", transform=Affine(0.1, 0, 10, 0, -0.1, 50), **profile) as file:
        file.write(pixels)
    return path


@pytest.fixture(scope="module")
def served(finished_run, scene):
    """A running page: a function that sends a request and returns status, headers and body."""
    server = make_server(Demo(finished_run, scene))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    port = server.server_address[1]

    def send(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    send.port = port
    yield send
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_and_its_parts_load_nothing_from_elsewhere(served):
    status, headers, body = served("GET", "/")
    text = body.decode()
    assert status == 200
    assert "quick" in text
    assert "scene.tif" in text
    assert "://" not in text
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Access-Control-Allow-Origin"] is None
    for path, kind in (("/style.css", "text/css"), ("/demo.css", "text/css"), ("/demo.js", "text/javascript")):
        status, headers, body = served("GET", path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert b"://" not in body
    status, headers, body = served("GET", "/scene.png")
    assert Image.open(io.BytesIO(body)).size == (200, 120)


def test_an_image_gets_class_confidence_and_evidence(served, finished_run, image_folder):
    content = (image_folder / "water" / "000.png").read_bytes()
    status, _, body = served("POST", "/image", content)
    found = json.loads(body)
    assert status == 200
    assert found["rows"][0][0] == "water"
    assert sum(share for _, share in found["rows"]) == pytest.approx(1.0)
    assert found["what"] == "confidence"
    assert len(found["pictures"]) == 2
    assert found["pictures"][1][1].startswith("evidence for water")
    assert all(url.startswith("data:image/jpeg;base64,") for url, _ in found["pictures"])


def test_a_click_on_the_scene_asks_about_the_tile_there(served):
    for x, name in ((0.1, "sand"), (0.9, "water")):
        status, _, body = served("POST", "/place", json.dumps({"x": x, "y": 1.0}))
        found = json.loads(body)
        assert status == 200
        assert found["rows"][0][0] == name
        left, top, width, height = found["window"]
        assert (width * 200, height * 120) == pytest.approx((24, 24))
        assert left * 200 == pytest.approx(x * 200 - 12)
        assert (top + height) * 120 == pytest.approx(120)  # moved back into the scene


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1"]
)
def test_names_that_lead_here_are_refused(served, host):
    for method, path in (("GET", "/"), ("POST", "/image")):
        status, _, body = served(method, path, b"" if method == "POST" else None, Host=host)
        assert status in (400, 403)
        assert b"quick" not in body


def test_other_pages_may_not_ask(served, image_folder):
    content = (image_folder / "water" / "000.png").read_bytes()
    own = f"http://127.0.0.1:{served.port}"
    assert served("POST", "/image", content, Origin=own)[0] == 200
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{served.port + 1}"):
        assert served("POST", "/image", content, Origin=origin)[0] == 403


def test_what_is_no_image_or_too_large_is_refused_in_words(served, monkeypatch):
    status, _, body = served("POST", "/image", b"<html>no image</html>")
    assert status == 422
    assert json.loads(body)["error"] == "the image: is not a JPEG, PNG, WebP or TIFF image, whatever its name says"
    monkeypatch.setattr(module, "MAX_DECODED", 64 * 64 * 4 - 1)
    status, _, body = served("POST", "/image", png(np.zeros((64, 64, 3), dtype=np.uint8)))
    assert status == 422
    assert "more than the limit" in json.loads(body)["error"]
    monkeypatch.setattr(module, "MAX_UPLOAD", 100)
    status, headers, body = served("POST", "/image", bytes(101))
    assert status == 413
    assert headers["Connection"] == "close"


def test_lengths_are_needed_and_believed_only_so_far(served):
    for headers in ({"Content-Length": "-1"}, {"Content-Length": "9" * 30}, {"Transfer-Encoding": "chunked"}):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.putrequest("POST", "/image")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status in (411, 413)
        connection.close()


def test_other_paths_are_not_there(served):
    for path in ("/../r2kit/run.py", "/templates/style.css", "/etc/passwd", "/%2e%2e/run.json", "/report.html"):
        assert served("GET", path)[0] == 404
    assert served("POST", "/", b"")[0] == 404
    assert served("PUT", "/image", b"")[0] == 501
    for body in (b"", b"[]", b'{"x": 2, "y": 0}', b'{"x": NaN, "y": 0}', b'{"x": "a"}', b"[" * 100_000):
        assert served("POST", "/place", body)[0] == 400


def test_too_many_at_once_are_sent_away(finished_run):
    page = Demo(finished_run)
    begun, go = threading.Semaphore(0), threading.Event()

    def slow(content):
        begun.release()
        go.wait(30)
        return {}

    page.of_file = slow
    server = make_server(page)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    statuses = []

    def send():
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
        connection.request("POST", "/image", b"x")
        statuses.append(connection.getresponse().status)
        connection.close()

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert all(begun.acquire(timeout=30) for _ in threads)
    send()
    assert statuses == [503]
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 4 + [503]
    server.shutdown()
    server.server_close()


def test_a_fault_of_ours_ends_one_request_and_shows_nothing(finished_run, served, monkeypatch):
    def broken(self, content):
        raise ValueError("secret inside")

    monkeypatch.setattr(Demo, "of_file", broken)
    status, _, body = served("POST", "/image", b"x")
    assert status == 500
    assert b"secret" not in body
    assert served("GET", "/")[0] == 200


def test_a_silent_connection_is_not_kept(finished_run, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    page = Demo(finished_run)
    server = make_server(page)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest("POST", "/image")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    start = time.perf_counter()
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    assert time.perf_counter() - start < 15
    connection.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("fixture", "pictures"), [("pond_run", 3), ("detection_run", 3), ("several_run", 2)])
def test_other_tasks(request, monkeypatch, fixture, pictures):
    run = request.getfixturevalue(fixture)
    data = run.datamodule()
    data.setup()
    page = Demo(run)
    answers = [page.answer(data.source.read(int(row))) for row in data.split.test]
    found = next(answer for answer in answers if answer["rows"])
    assert len(found["pictures"]) == pictures
    if run.preprocess.resize == "tile":
        monkeypatch.setattr(module, "MAX_TILES", 3)
        with pytest.raises(DataError, match=r"the image has \d tiles, and this page looks at 3 at most"):
            page.answer(data.source.read(int(data.split.test[0])))
    assert 0 < found["rows"][0][1] <= 1


def test_addresses():
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("192.168.1.4")


def test_what_cannot_be_served_is_one_line(finished_run, served, tmp_path, capsys):
    with pytest.raises(DataError, match="no such file"):
        Demo(finished_run, tmp_path / "none.tif")
    with pytest.raises(SystemExit) as stop:
        main(["demo", str(finished_run.path), "--port", str(served.port)])
    assert stop.value.code == 2
    assert "cannot be bound" in capsys.readouterr().err
