"""Damaged, disguised and absurd image files, by a seed: each is read, or refused in one line that names it.

The readers run in processes of their own with a limit on memory, so that a crash, a hang and an appetite show.
"""

import io
import multiprocessing
import resource
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from r2kit.data.reader import MAX_IMAGE_BYTES, examine_image, read_image
from r2kit.errors import DataError

MUTATIONS = 320
MEMORY = 3 * MAX_IMAGE_BYTES  # beyond what the process has when it starts
SECONDS = 240  # for all mutations of a test; one takes milliseconds

WriteTiff = Callable[..., Path]


def pictures(folder: Path, write_tiff: WriteTiff) -> dict[str, bytes]:
    """One small file of every format, and of the TIFF layouts whose headers differ."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(40), np.arange(32)).astype(np.uint8)[..., None] * np.array([1, 2, 3], np.uint8)
    pixels = smooth + rng.integers(0, 32, (40, 32, 3)).astype(np.uint8)
    picture, made = Image.fromarray(pixels), {}
    for name, kind, options in (
        ("a.jpg", "JPEG", {}),
        ("p.jpg", "JPEG", {"progressive": True, "exif": b"Exif\0\0MM\0*" + bytes(30)}),
        ("a.png", "PNG", {}),
        ("a.webp", "WEBP", {}),
        ("l.webp", "WEBP", {"lossless": True}),
    ):
        out = io.BytesIO()
        picture.save(out, kind, **options)
        made[name] = out.getvalue()
    for name, mode in (("c.jpg", "CMYK"), ("p.png", "P"), ("g.jpg", "L")):
        out = io.BytesIO()
        picture.convert(mode).save(out, "JPEG" if name.endswith("jpg") else "PNG")
        made[name] = out.getvalue()
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.astype(np.uint16) * 200)
    made["s.png"] = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", struct.pack(">IIBBBBB", 32, 40, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )
    many = rng.integers(0, 4000, (40, 32, 13)).astype(np.uint16)
    layouts: dict[str, dict] = {
        "plain.tif": {},
        "deflate.tif": {"compress": "deflate", "nodata": 0},
        "lzw.tif": {"compress": "lzw", "tiled": True, "blockxsize": 16, "blockysize": 16},
        "planes.tif": {"interleave": "band"},
        "big.tif": {"BIGTIFF": "YES"},
    }
    for name, options in layouts.items():
        made[name] = write_tiff(folder / name, many, **options).read_bytes()
    made["float.tif"] = write_tiff(folder / "float.tif", many.astype(np.float32), nodata=np.nan).read_bytes()
    return made


def mutate(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Damage a file in one of the ways in which files get damaged, or attacked."""
    data, size = bytearray(content), len(content)
    kind = int(rng.integers(0, 8))
    if kind == 0:  # cut off
        return bytes(data[: int(rng.integers(0, size))])
    if kind == 1:  # bits turned over anywhere
        for place in rng.integers(0, size, int(rng.integers(1, 20))):
            data[place] ^= 1 << int(rng.integers(0, 8))
    elif kind == 2:  # bytes of the header replaced
        for place in rng.integers(0, min(size, 200), int(rng.integers(1, 6))):
            data[place] = int(rng.integers(0, 256))
    elif kind == 3:  # a large number where a size or an offset may stand
        place = int(rng.integers(2, min(size - 4, 300)))
        word = [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\1\0"]
        data[place : place + 4] = word[int(rng.integers(0, len(word)))]
    elif kind == 4:  # a hole, as a disk or a transfer leaves it
        start = int(rng.integers(0, size))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    elif kind == 5:  # a piece twice
        start = int(rng.integers(0, size))
        data[start:start] = data[start : start + int(rng.integers(1, 100))]
    elif kind == 6:  # the head of one file on the body of another
        other = others[int(rng.integers(0, len(others)))]
        data = bytearray(content[: int(rng.integers(1, 64))] + other[int(rng.integers(0, 64)) :])
    else:  # noise behind a good head
        data = bytearray(content[: int(rng.integers(1, 40))] + rng.bytes(int(rng.integers(0, 500))))
    return bytes(data)


def read_all(folder: Path, samples: dict[str, bytes], seed: int, count: int, queue) -> None:
    """Read mutations in this process, and put on the queue how many were read and refused, or what went wrong."""
    import logging

    from rasterio.env import Env

    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    warnings.simplefilter("ignore")  # Pillow warns about damaged metadata before it goes on
    rng, names, contents = np.random.default_rng(seed), list(samples), list(samples.values())
    read = refused = 0
    with Env():
        for number in range(count):
            name = names[number % len(names)]
            suffixes = [Path(name).suffix, ".png", ".tif", ".jpg", ".webp"]
            path = folder / f"m{seed}{suffixes[int(rng.integers(0, 5))]}"  # often another than the content's
            content = mutate(samples[name], contents, rng)
            path.write_bytes(content)
            queue.put(("trying", name, number))
            for call in (examine_image, read_image):
                try:
                    result = call(path)
                except DataError as error:
                    refused += 1
                    if not str(error).startswith(f"{path}: ") or "\n" in str(error):
                        queue.put(("wrong", f"{name} {number}: {error!r}", content))
                        return
                except BaseException as error:
                    queue.put(("wrong", f"{name} {number}: {error!r}", content))
                    return
                else:
                    read += 1
                    if isinstance(result, np.ndarray) and (result.ndim != 3 or result.nbytes > MAX_IMAGE_BYTES):
                        queue.put(("wrong", f"{name} {number}: shape {result.shape}", content))
                        return
    # Not ru_maxrss: that of a new program begins with the peak of the one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    queue.put(("done", read, refused, peak))


def fuzz(folder: Path, samples: dict[str, bytes], seed: int, count: int) -> tuple[int, int, int]:
    """Numbers of good reads and refusals, and the peak memory in KiB, of a process that reads mutations."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=read_all, args=(folder, samples, seed, count, queue))
    process.start()
    last: tuple = ("nothing",)
    while True:
        try:
            last = queue.get(timeout=SECONDS if last[0] == "nothing" else 30)
        except Exception:  # queue.Empty: the process has died, or one file keeps it for half a minute
            process.kill()
            process.join()
            pytest.fail(f"seed {seed}: stopped at {last}, exit code {process.exitcode}")
        if last[0] == "wrong":
            process.join()
            pytest.fail(f"seed {seed}: {last[1]}")
        if last[0] == "done":
            process.join()
            return last[1], last[2], last[3]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, write_tiff: WriteTiff, seed: int) -> None:
    samples = pictures(tmp_path, write_tiff)
    assert len(samples) == 15
    count = MUTATIONS if seed == 0 else 10 * MUTATIONS
    read, refused, peak = fuzz(tmp_path, samples, seed, count)
    assert read + refused == 2 * count
    assert read > 0.05 * count  # many damages leave an image
    assert refused > 0.3 * count
    assert peak < (MEMORY + 2**30) // 1024
