import io
import logging
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from r2kit.data import reader
from r2kit.data.reader import examine_image, find_images, open_raster, read_image
from r2kit.errors import DataError

WriteTiff = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quiet_gdal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="rasterio")


def noise(*shape: int, dtype=np.uint8, high: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_lossless_colours_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    pixels = noise(9, 7, 3)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), pixels)


def test_jpeg_equals_pillow(tmp_path: Path) -> None:
    Image.fromarray(noise(40, 30, 3)).save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg")))


@pytest.mark.parametrize(("side", "shape"), [(255, (400, 520)), (100, (200, 260)), (25, (50, 65)), (1, (50, 65))])
def test_a_large_jpeg_comes_smaller_and_looks_the_same(tmp_path: Path, side: int, shape: tuple[int, int]) -> None:
    y, x = np.mgrid[:400, :520]
    waves = np.stack([128 + 90 * np.sin(x / 23 + y / 41 + band) for band in range(3)], axis=-1).astype(np.uint8)
    Image.fromarray(waves).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(waves).save(tmp_path / "a.png")
    small = read_image(tmp_path / "a.jpg", network=(side, side // 2 + 1))
    assert small.shape[:2] == shape
    assert min(shape) >= 2 * side or shape == (400, 520)  # only while both sides stay twice as long
    assert read_image(tmp_path / "a.png", network=(side, side)).shape == (400, 520, 3)
    expected = np.asarray(Image.fromarray(waves).resize(shape[::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(small - expected).max() < 25
    assert np.abs(small - expected).mean() < 2.0


def test_a_large_grey_and_a_turned_jpeg_come_smaller_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.full((400, 520), 90, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.jpg", exif=exif)
    small = read_image(tmp_path / "a.jpg", network=(64, 64))
    assert small.shape == (260, 200, 3)
    assert np.abs(small.astype(int) - 90).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_mode_of_png_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(noise(8, 8, 3)).convert("RGB").convert(mode)
    picture.save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png")
    assert result.shape == (8, 8, 3)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.asarray(picture.convert("RGBA"))[..., :3])


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(8, 8, 3)).quantize(16)
    picture.save(tmp_path / "a.png", transparency=bytes([0, 128] + [255] * 14))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    colour = np.full((16, 16, 3), (200, 60, 20), dtype=np.uint8)
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - colour).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    # Quadrants of four brightnesses show every flip and turn; what Pillow itself makes of the tag is the reference.
    quadrants = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], dtype=np.uint8), 16, 0), 24, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quadrants).save(tmp_path / "a.jpg", exif=exif, quality=100)
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), expected)
    assert expected.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow says so and goes on
def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(tmp_path / "a.jpg").shape == (8, 8, 3)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a sample, which Pillow cannot write in colour."""
    height, width, bands = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[bands], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_png_keeps_its_sixteen_bits(tmp_path: Path, bands: int) -> None:
    pixels = noise(6, 5, bands, dtype=np.uint16, high=65536)
    (tmp_path / "a.png").write_bytes(png16(pixels))
    result = read_image(tmp_path / "a.png")
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, pixels[..., :3] if bands > 1 else np.repeat(pixels, 3, axis=2))
    info = examine_image(tmp_path / "a.png")[0]
    assert (info.bands, info.scale) == (("red", "green", "blue"), 65535.0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_tiff_with_thirteen_bands(tmp_path: Path, dtype: str, write_tiff: WriteTiff) -> None:
    pixels = noise(12, 10, 13, dtype=dtype, high=250)
    path = write_tiff(tmp_path / "a.tif", pixels, nodata=0)
    np.testing.assert_array_equal(read_image(path), pixels)
    assert read_image(path).flags.c_contiguous
    info = examine_image(path)[0]
    assert info.bands == tuple(f"band{i}" for i in range(1, 14))
    assert (info.dtype, info.nodata, info.scale) == (dtype, 0.0, 255.0 if dtype == "uint8" else 1.0)


def test_tiff_band_names_choose_bands(tmp_path: Path, write_tiff: WriteTiff) -> None:
    pixels = noise(4, 4, 3)
    path = write_tiff(tmp_path / "a.tif", pixels, descriptions=("B02", "B03", "B08"))
    np.testing.assert_array_equal(read_image(path, bands=("B08", "B02")), pixels[..., [2, 0]])
    with pytest.raises(DataError, match=r"a\.tif: no band 'B8'; there are B02, B03, B08; did you mean 'B08'\?"):
        read_image(path, bands=("B8",))


def test_tiff_drops_transparency_and_expands_a_palette(tmp_path: Path, write_tiff: WriteTiff) -> None:
    pixels = noise(4, 4, 4)
    roles = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    path = write_tiff(tmp_path / "a.tif", pixels, photometric="RGB", roles=roles)
    np.testing.assert_array_equal(read_image(path), pixels[..., :3])
    assert examine_image(path)[0].bands == ("red", "green", "blue")

    index = noise(4, 4, 1, high=3)
    colours = {0: (1, 2, 3, 255), 1: (4, 5, 6, 255), 2: (250, 251, 252, 255)}
    path = write_tiff(tmp_path / "p.tif", index, photometric="palette", colours=colours)
    expected = np.array([colours[i][:3] for i in range(3)], dtype=np.uint8)[index[..., 0]]
    np.testing.assert_array_equal(read_image(path), expected)


def test_georeferenced_centre(tmp_path: Path, write_tiff: WriteTiff) -> None:
    # UTM zone 33 north: easting 500000 is the meridian 15 E.
    path = write_tiff(tmp_path / "a.tif", noise(10, 20, 1), transform=Affine(10, 0, 499_900, 0, -10, 4_600_050))
    info = examine_image(path)[0]
    assert info.lon == pytest.approx(15.0, abs=1e-9)
    assert info.lat == pytest.approx(41.55, abs=0.01)
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "plain.tif")
    assert np.isnan(examine_image(tmp_path / "plain.tif")[0].lon)


def test_content_decides_not_the_name(tmp_path: Path, write_tiff: WriteTiff) -> None:
    pixels = noise(5, 5, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    write_tiff(tmp_path / "b.tif", pixels).rename(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), pixels)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, I am no image", "is not a JPEG, PNG, WebP or TIFF image"),
        (b"GIF89a" + bytes(50), "is not a JPEG, PNG, WebP or TIFF image"),
        (b"\xff\xd8\xff\xe0", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        (b"II*\0", "cannot be decoded"),
        (b"RIFF\0\0\0\0WEBP", "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for call in (read_image, examine_image):
        with pytest.raises(DataError, match=rf"bad\.png: {message}") as caught:
            call(path)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


def absurd_headers() -> dict[str, bytes]:
    """Small files whose headers promise more pixels than any memory has."""
    png = png16(noise(4, 4, 1, dtype=np.uint16))
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    jpeg = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(jpeg, "JPEG")
    jpeg_bytes = bytearray(jpeg.getvalue())
    start = jpeg_bytes.index(b"\xff\xc0")
    jpeg_bytes[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    canvas = (2**24 - 1).to_bytes(3, "little")
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas
    tiff_entries = [(256, 4, 2**31 - 1), (257, 4, 2**31 - 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tiff_entries += [(277, 3, 1), (278, 4, 2**31 - 1), (279, 4, 100)]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tiff_entries))
    tiff += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tiff_entries) + bytes(4)
    wide = ihdr[:12] + b"\x10\x02\0\0\0"
    return {
        "png": png[:8] + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + png[33:],
        "png16": png[:8] + struct.pack(">I", 13) + wide + struct.pack(">I", zlib.crc32(wide)),
        "jpeg": bytes(jpeg_bytes),
        "webp": b"RIFF" + struct.pack("<I", len(webp)) + webp,
        "tiff": tiff,
    }


@pytest.mark.parametrize("kind", ["png", "png16", "jpeg", "webp", "tiff"])
def test_absurd_sizes_are_refused_without_eating_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"bomb.{kind}"
    path.write_bytes(absurd_headers()[kind])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(DataError, match=rf"bomb\.{kind}: "):
        read_image(path)
    assert time.perf_counter() - start < 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / (2**10 if sys.platform == "linux" else 2**20) < 200  # MiB


def test_the_limit_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tiff: WriteTiff) -> None:
    monkeypatch.setattr(reader, "MAX_IMAGE_BYTES", 2**20)
    Image.fromarray(np.zeros((600, 500, 3), dtype=np.uint8)).save(tmp_path / "large.png")
    write_tiff(tmp_path / "large.tif", np.zeros((600, 500, 4), dtype=np.uint8))
    for name in ("large.png", "large.tif"):
        with pytest.raises(DataError, match=rf"{name}: 600 x 500 pixels .* more than the limit .* cut it into tiles"):
            examine_image(tmp_path / name)[0]


def test_pixel_types_that_are_no_numbers_are_refused(tmp_path: Path, write_tiff: WriteTiff) -> None:
    path = write_tiff(tmp_path / "c.tif", noise(4, 4, 1).astype(np.complex64))
    with pytest.raises(DataError, match=r"c\.tif: pixels of type complex64; one real number type is needed"):
        read_image(path)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, write_tiff: WriteTiff) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    smooth = np.add.outer(np.arange(48), np.arange(40)).astype(np.uint8)[..., None] * np.array([1, 2, 3], np.uint8)
    smooth = smooth + noise(48, 40, 3, high=32)
    picture = Image.fromarray(smooth)
    picture.save(folder / "a.jpg")
    picture.save(folder / "a.png")
    picture.save(folder / "a.webp")
    (folder / "b.png").write_bytes(png16(smooth.astype(np.uint16) * 200))
    write_tiff(folder / "a.tif", smooth)
    write_tiff(folder / "b.tif", smooth, compress="deflate")
    picture.save(folder / "c.jpg", progressive=True, exif=b"Exif\0\0MM\0*" + bytes(30))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about damaged metadata before it goes on
@pytest.mark.parametrize("name", ["a.jpg", "c.jpg", "a.png", "b.png", "a.webp", "a.tif", "b.tif"])
def test_damaged_files_decode_or_are_refused_by_name(tmp_path: Path, samples: dict[str, bytes], name: str) -> None:
    whole, rng = samples[name], np.random.default_rng(1)
    damaged = [whole[: int(cut)] for cut in np.linspace(1, len(whole) - 1, 25)]
    for _ in range(60):
        content = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 8)):
            content[position] ^= 1 << int(rng.integers(0, 8))
        damaged.append(bytes(content))
    path, refused = tmp_path / name, 0
    for content in damaged:
        path.write_bytes(content)
        try:
            pixels = read_image(path)
        except DataError as error:
            message = str(error)
            refused += 1
        else:
            message = f"{path}: "
            assert pixels.ndim == 3
            assert pixels.nbytes <= reader.MAX_IMAGE_BYTES
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
    assert refused >= 20  # nearly every cut, at least


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "b.png", "a.webp", "a.tif", "b.tif"])
def test_a_truncated_file_is_always_found(tmp_path: Path, samples: dict[str, bytes], name: str) -> None:
    for kept in (0.3, 0.6, 0.9):
        (tmp_path / name).write_bytes(samples[name][: int(len(samples[name]) * kept)])
        with pytest.raises(DataError, match=name):
            examine_image(tmp_path / name)


# Listing -------------------------------------------------------------------------------------------------------------


def test_find_images(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpeg", "a.tif", "notes.txt", ".hidden.png", ".cache/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_images([tmp_path / "b" / "2.PNG", tmp_path])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["b/2.PNG", "a.tif", "b/1.jpeg"]


def test_find_images_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "scene.tif").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"scen\.tif: no such file or folder; did you mean 'scene\.tif'\?"):
        find_images([tmp_path / "scen.tif"])
    with pytest.raises(DataError, match=r"notes\.txt: not an image; known suffixes are \.jpg"):
        find_images([tmp_path / "notes.txt"])
    with pytest.raises(DataError, match="empty: no image in this folder"):
        find_images([tmp_path / "empty"])


def test_open_raster_closes_and_does_not_warn(tmp_path: Path) -> None:
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "plain.tif")  # rasterio warns about the missing georeference
    with open_raster(tmp_path / "plain.tif") as dataset:
        assert dataset.count == 3
    assert dataset.closed


def test_absurdly_many_bands_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "many.tif"
    shape = {"width": 2, "height": 2, "count": 5000, "dtype": "uint8", "interleave": "pixel"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no place on Earth
        with rasterio.open(path, "w", driver="GTiff", **shape) as file:
            file.write(np.zeros((5000, 2, 2), np.uint8))
        with pytest.raises(DataError, match=r"many\.tif: has 5000 bands, more than 4096"):
            read_image(path)
