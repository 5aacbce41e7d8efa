"""A small local page on which a person drops an image, or clicks on a scene, and sees what a run says about it.

The plain standard library serves it. It answers the machine it runs on alone unless told otherwise, takes no more than
it can decode safely, and loads nothing from elsewhere.
"""

from __future__ import annotations

import io
import ipaddress
import json
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from r2kit import plots
from r2kit.data.given import ReadGiven
from r2kit.draw import GIVEN, draw_boxes
from r2kit.errors import DataError, R2kitError, RunError
from r2kit.explain import Explainer, Look
from r2kit.explain.question import windows
from r2kit.maps.network import tile_of
from r2kit.maps.scene import Scene, Window2d
from r2kit.page import template, thumbnail_of
from r2kit.plots import Tile
from r2kit.run import Run

MAX_UPLOAD = 32 * 2**20
"""Bytes of an uploaded file at most."""
MAX_DECODED = 256 * 2**20
"""Bytes of its pixels at most: 64 million of them in four bytes each."""
MAX_TILES = 64
"""Tiles of an uploaded image at most, where the network sees tiles: a person waits for the answer."""
_WAITING = 4  # requests that are computed or wait for it; more are sent away
_PATIENCE = 30.0  # seconds for which a silent connection is kept
_OVERVIEW = 1600  # pixels of the longer side of the scene on the page
_PICTURE = 448  # of an answer
_ROWS = 5
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Demo:
    """What the page shows, without the way to it.

    Args:
        run: A finished run of any task.
        scene: A GeoTIFF to click on.
        device: See `inference.choose_device`.

    Raises:
        MissingExtraError: If captum is not installed.
        DataError: If the scene cannot be read with the run's bands.
        RunError: If the run does not say how large its images were, or says what cannot be, and there is a scene.
    """

    def __init__(self, run: Run, scene: str | Path | None = None, *, device: str = "auto") -> None:
        self.run = run
        self.explainer = Explainer(run, device=device)
        self.scene = None if scene is None else Scene(Path(scene), run.preprocess)
        self._busy = threading.Lock()
        self.overview: bytes | None = None
        if self.scene is not None:
            self.tile = tile_of(run)
            self.overview = self._overview(self.scene)

    def page(self) -> str:
        """Return the page."""
        return template("demo.html.j2").render(
            run=self.run,
            scene=None if self.scene is None else self.scene.path.name,
            megabytes=MAX_UPLOAD // 2**20,
        )

    def of_file(self, content: bytes) -> dict[str, Any]:
        """Return the answer to an image file: what `answer` gives.

        Raises:
            DataError: If it is no image of the run's bands, or too large.
        """
        with tempfile.TemporaryDirectory(prefix="r2kit-demo-") as folder:
            file = Path(folder) / "image"  # the content decides how it is read, not a name from outside
            file.write_bytes(content)
            try:
                raw = ReadGiven(self.run.preprocess, whole=True, max_bytes=MAX_DECODED)(file)
            except R2kitError as error:
                raise type(error)(str(error).replace(str(file), "the image")) from None
        return self.answer(raw)

    def of_place(self, x: float, y: float) -> dict[str, Any]:
        """Return the answer to the tile around a place of the scene.

        Args:
            x: Share of the scene's width from the left, in [0, 1].
            y: Share of its height from the top.

        Returns:
            What `answer` gives, and `window`: left, top, width, height of the tile in shares of the scene.

        Raises:
            DataError: If the scene is damaged there.
        """
        assert self.scene is not None
        height, width = self.scene.size
        tile = (min(self.tile[0], height), min(self.tile[1], width))
        top = round(min(max(y * height - tile[0] / 2, 0), height - tile[0]))
        left = round(min(max(x * width - tile[1] / 2, 0), width - tile[1]))
        raw, _ = self.scene.read(Window2d(top, left, *tile))
        return {**self.answer(raw), "window": [left / width, top / height, tile[1] / width, tile[0] / height]}

    def answer(self, raw: NDArray[Any]) -> dict[str, Any]:
        """Return what the run says about raw pixels (H, W, C).

        Returns:
            `rows`: [name, share] of the most likely classes, the largest classes of pixels, or the surest boxes;
            `what`: what the shares are; `pictures`: [URL, caption]; `note`: why there is no evidence, or None.

        Raises:
            DataError: If the network sees the image in more tiles than a person would wait for.
        """
        count = len(windows(self.run.preprocess, (raw.shape[0], raw.shape[1])))
        if count > MAX_TILES:
            raise DataError(
                f"the image has {count} tiles, and this page looks at {MAX_TILES} at most: start it with --scene and "
                "click on a place, or use r2kit predict"
            )
        with self._busy:
            look = self.explainer.look(raw)
            if look is None:
                return {"rows": [], "what": "", "pictures": [], "note": "nothing is found in this image"}
            what, rows, drawn = self._rows(look)
        pictures = [Tile(look.picture, "as the network sees it")]
        if drawn is not None:
            pictures.append(Tile(drawn, "what it finds"))
        pictures.append(Tile(look.overlay, f"evidence for {look.question.words} ({self.explainer.method})"))
        shown = [thumbnail_of(tile, _PICTURE) for tile in pictures]
        return {"rows": rows, "what": what, "pictures": [[one.url, one.caption] for one in shown], "note": None}

    @torch.no_grad()
    def _rows(self, look: Look) -> tuple[str, list[tuple[str, float]], NDArray[np.uint8] | None]:
        """What the numbers are, the numbers, and a picture of the answer where it has places."""
        image, classes, kind = look.image, self.explainer.classes, self.run.recipe.task.kind
        found = self.explainer.model(image)
        if kind in ("detection", "instance"):
            boxes, scores = found[0]["boxes"].cpu().numpy(), found[0]["scores"].tolist()
            names = [classes[int(label) - 1] for label in found[0]["labels"]]
            sure = [i for i, score in enumerate(scores) if score >= 0.5] or [0]
            drawn = draw_boxes(look.picture, boxes[sure], [GIVEN] * len(sure))
            return "score of each box", list(zip(names, scores, strict=True))[:_ROWS], drawn
        if found.ndim == 4:
            predicted = found[0].argmax(0).cpu().numpy()
            share = np.bincount(predicted.ravel(), minlength=len(classes)) / predicted.size
            order = [int(i) for i in np.argsort(-share, kind="stable")[:_ROWS] if share[i] > 0]
            rows = [(classes[i], float(share[i])) for i in order]
            return "share of the pixels", rows, plots.paint(look.picture, predicted)
        several = kind == "multilabel"
        probs = (found[0].double().sigmoid() if several else found[0].double().softmax(0)).cpu().numpy()
        order = [int(i) for i in np.argsort(-probs, kind="stable")[:_ROWS]]
        what = "probability of each label" if several else "confidence"
        return what, [(classes[i], float(probs[i])) for i in order], None

    def _overview(self, scene: Scene) -> bytes:
        """The scene as a small PNG."""
        whole = replace(self.run.preprocess, resize="tile")  # as large as it comes
        image = whole.apply(scene.overview(_OVERVIEW))
        picture = self.explainer.picture(image)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        return buffer.getvalue()


class _RefusedError(Exception):
    """A request that is not answered, with its status."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _ServerOfSix(ThreadingHTTPServer):
    """A server at an address of IPv6."""

    address_family = socket.AF_INET6


def make_server(demo: Demo, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the page that is bound and does not serve yet.

    Requests are answered only where the Host header names an address, this machine, or `host`: a page elsewhere that
    has its own name resolved to this address (DNS rebinding) comes with that name, and is refused.

    Args:
        demo: What is shown.
        host: Address to bind to; anything but a loopback address lets other machines in.
        port: 0 takes a free one.

    Raises:
        RunError: If the address cannot be bound.
    """
    waiting = threading.BoundedSemaphore(_WAITING)
    named = {"localhost", host.lower(), socket.gethostname().lower()}

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "r2kit", ""
        protocol_version = "HTTP/1.1"
        timeout = _PATIENCE

        def do_GET(self) -> None:
            self._answer(self._get)

        def do_POST(self) -> None:
            self._answer(self._post)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: names from outside do not belong into a terminal."""

        def _answer(self, respond: Callable[[], tuple[str, bytes]]) -> None:
            status = HTTPStatus.OK
            try:
                self._check_origin()
                kind, body = respond()
            except _RefusedError as error:
                status, (kind, body) = error.status, _json({"error": str(error)})
            except R2kitError as error:
                status, (kind, body) = HTTPStatus.UNPROCESSABLE_ENTITY, _json({"error": str(error)})
            except (TimeoutError, ConnectionError):
                self.close_connection = True
                return
            except Exception as error:  # a fault of ours; the server stays, and its inside is not shown
                text = f"this failed inside r2kit ({type(error).__name__})"
                status, (kind, body) = HTTPStatus.INTERNAL_SERVER_ERROR, _json({"error": text})
            if status is not HTTPStatus.OK:
                self.close_connection = True  # a body that was not read must not be taken for the next request
            self.send_response(status)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def _check_origin(self) -> None:
            """Refuse requests under a name that is not this machine's, and those that another page makes."""
            given = self.headers.get_all("Host") or []
            if len(given) != 1 or not _is_ours(given[0], named):
                raise _RefusedError(
                    HTTPStatus.FORBIDDEN, "this name is not served here; use the address that r2kit printed"
                )
            origin = self.headers.get("Origin")
            if origin is not None and urlsplit(origin).netloc != given[0]:
                raise _RefusedError(HTTPStatus.FORBIDDEN, "another page may not ask")

        def _get(self) -> tuple[str, bytes]:
            if self.path == "/":
                return "text/html; charset=utf-8", demo.page().encode()
            if self.path in ("/style.css", "/demo.css", "/demo.js"):
                file = resources.files("r2kit") / "templates" / self.path[1:]
                kind = "text/css" if self.path.endswith(".css") else "text/javascript"
                return f"{kind}; charset=utf-8", file.read_bytes()
            if self.path == "/scene.png" and demo.overview is not None:
                return "image/png", demo.overview
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")

        def _post(self) -> tuple[str, bytes]:
            if self.path not in ("/image", "/place") or (self.path == "/place" and demo.scene is None):
                raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
            body = self._body()
            if not waiting.acquire(blocking=False):
                raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "busy; try again in a moment")
            try:
                return _json(demo.of_file(body) if self.path == "/image" else demo.of_place(*_place(body)))
            finally:
                waiting.release()

        def _body(self) -> bytes:
            """What was sent: of a stated length that is not too long."""
            if self.headers.get("Transfer-Encoding") is not None:
                raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "a length is needed")
            stated = self.headers.get("Content-Length", "")
            if not (stated.isascii() and stated.isdigit()):
                raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "a length is needed")
            if len(stated) > 12 or int(stated) > MAX_UPLOAD:
                text = f"the file is larger than {MAX_UPLOAD // 2**20} MB"
                raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
            body = self.rfile.read(int(stated))
            if len(body) != int(stated):
                raise ConnectionError("cut off")
            return body

    try:
        server = (_ServerOfSix if ":" in host else ThreadingHTTPServer)((host, port), Handler)
    except OSError as error:
        raise RunError(f"{host}:{port}: cannot be bound: {error.strerror or error}; give another --port") from None
    server.daemon_threads = True
    return server


def is_loopback(host: str) -> bool:
    """Return whether an address reaches this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ours(host: str, named: set[str]) -> bool:
    """Whether a Host header names an address or this machine, rather than a domain that leads here."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name.lower() in named:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _place(body: bytes) -> tuple[float, float]:
    """The place that was clicked on, from JSON."""
    try:
        given = json.loads(body)
        x, y = float(given["x"]), float(given["y"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, 'a place is {"x": 0..1, "y": 0..1}') from None
    if not (0.0 <= x <= 1.0 and 0.0 <= y <= 1.0):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, 'a place is {"x": 0..1, "y": 0..1}')
    return x, y


def _json(content: dict[str, Any]) -> tuple[str, bytes]:
    """A type and a body."""
    return "application/json", json.dumps(content).encode()
