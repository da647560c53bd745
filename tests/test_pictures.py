"""One reader for every way in: equal pixels, or the same error, whatever a picture is and wherever it comes from."""

import base64
import http.server
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizers import bert_tokenizer, image_processor, qwen_tokenizer

from modeling_vikdf import VikdfProcessor, pictures_vikdf
from modeling_vikdf.data import SkipReport, load_image_text_pairs
from modeling_vikdf.picture_index import load_pictures
from modeling_vikdf.processing_vikdf import read_picture
from modeling_vikdf.server.schema import ImagePart


def content(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of headers that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    transparency = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + transparency + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    if transparent:
        image.info["transparency"] = 0
    return image


def row(mode: str, *colours) -> Image.Image:
    """A picture one pixel high."""
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


def lying() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return exif


def animation() -> bytes:
    frames = [Image.new("RGB", (1, 1), colour) for colour in ("red", "blue")]
    return content(frames[0], "GIF", save_all=True, append_images=frames[1:])


WHITE, GREY = (255,) * 3, (78,) * 3  # 20000 of 65536 is 78 of 256
# kind of picture -> its file, its size and its pixels, row by row
READ = {
    "RGB": (content(row("RGB", (1, 2, 3), (4, 5, 6))), (2, 1), [(1, 2, 3), (4, 5, 6)]),
    "grey": (content(row("L", 7, 9)), (2, 1), [(7,) * 3, (9,) * 3]),
    "one bit": (content(row("1", 0, 1)), (2, 1), [(0,) * 3, WHITE]),
    "RGBA": (content(row("RGBA", (0, 0, 0, 0), (9, 9, 9, 255), (0, 0, 0, 51))), (3, 1), [WHITE, (9,) * 3, (204,) * 3]),
    "LA": (content(row("LA", (0, 0), (9, 255))), (2, 1), [WHITE, (9,) * 3]),
    "palette": (content(palette(False)), (2, 1), [(10, 20, 30), (40, 50, 60)]),
    "palette with tRNS": (content(palette(True), transparency=0), (2, 1), [WHITE, (40, 50, 60)]),
    "RGB with tRNS": (
        png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), struct.pack(">HHH", 1, 2, 3)),
        (2, 1),
        [WHITE, (4, 5, 6)],
    ),
    "grey with tRNS": (png(2, 1, 8, 0, bytes([0, 20, 30]), struct.pack(">H", 20)), (2, 1), [WHITE, (30,) * 3]),
    "16-bit grey": (png(2, 1, 16, 0, struct.pack(">BHH", 0, 20000, 65535)), (2, 1), [GREY, WHITE]),
    "16-bit grey with tRNS": (
        png(3, 1, 16, 0, struct.pack(">BHHH", 0, 20000, 20001, 19999), struct.pack(">H", 20000)),
        (3, 1),
        [WHITE, GREY, GREY],
    ),
    "16-bit RGB": (png(1, 1, 16, 2, struct.pack(">BHHH", 0, 20000, 65535, 0)), (1, 1), [(78, 255, 0)]),
    "16-bit LA": (png(1, 1, 16, 4, struct.pack(">BHH", 0, 20000, 0)), (1, 1), [WHITE]),
    "16-bit TIFF": (content(row("I;16", 20000, 0), "TIFF"), (2, 1), [GREY, (0,) * 3]),
    "16 of 32 bits": (content(row("I", 20000, 0), "TIFF"), (2, 1), [GREY, (0,) * 3]),
    "CMYK": (content(row("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "TIFF"), (2, 1), [WHITE, (0,) * 3]),
    "EXIF": (content(row("RGB", (1, 2, 3), (4, 5, 6)), exif=lying()), (1, 2), [(1, 2, 3), (4, 5, 6)]),
    "animation": (animation(), (1, 1), [(255, 0, 0)]),
    "WebP": (content(row("RGBA", (0, 0, 0, 0)), "WEBP", lossless=True), (1, 1), [WHITE]),
    "BMP": (content(row("RGB", (1, 2, 3)), "BMP"), (1, 1), [(1, 2, 3)]),
}
NOISE = content(Image.effect_noise((64, 64), 90))
REFUSED = {
    "empty": (b"", "not a complete PNG, JPEG, WEBP, GIF, BMP or TIFF"),
    "no picture": (b"\xff\xd8 no JPEG", "not a complete PNG"),
    "truncated PNG": (NOISE[:-30], "not a complete PNG"),
    "truncated JPEG": (content(Image.effect_noise((64, 64), 90), "JPEG")[:-40], "not a complete PNG"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a complete PNG"),
    "0 x 0": (png(0, 0, 8, 0, b""), "not a complete PNG"),  # which the format does not allow
    "50000 x 50000": (png(50_000, 50_000, 8, 0, b"\0"), "too many pixels"),
    "floating point": (
        content(Image.new("F", (2, 2), 0.5), "TIFF"),
        "cannot read the picture: values of mode F cannot be scaled",
    ),
    "32 bits": (content(Image.new("I", (2, 2), 70_000), "TIFF"), r"\(70000, 70000\) exceed 16 bits"),
}


@pytest.fixture(scope="module")
def processor() -> VikdfProcessor:
    return VikdfProcessor.from_backbones(qwen_tokenizer(), bert_tokenizer(), image_processor(), vocab_size=512)


@pytest.fixture(scope="module")
def server():
    """Serves `server.files`, name -> content, and redirects what is in `server.redirections`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            if name in running.redirections:
                self.send_response(302)
                self.send_header("Location", running.redirections[name])
                return self.end_headers()
            self.send_response(200)
            self.send_header("Content-Length", str(len(running.files[name]) + running.missing))
            self.end_headers()
            self.wfile.write(running.files[name])

        def log_message(self, *args):
            pass

    with pytest.MonkeyPatch.context() as patch, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        running.files, running.redirections, running.missing = {}, {}, 0
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ways_in(data: bytes, folder: Path, server) -> dict:
    """The same file as everything that `read_picture` takes."""
    path = folder / "picture"
    path.write_bytes(data)
    server.files["picture"] = data
    return {
        "bytes": data,
        "path": path,
        "string": str(path),
        "URL": f"{server.url}/picture",
        "data: URL": data_url(data),
        "broken data: URL": data_url(data).replace("data", "DATA").replace("=", "%3D") + "\n",
    }


def pixels(image: Image.Image) -> list[tuple]:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


@pytest.mark.parametrize("kind", READ)
def test_every_way_in_gives_the_same_pixels(kind, tmp_path, server, processor):
    data, size, expected = READ[kind]
    ways = ways_in(data, tmp_path, server)
    opened, loaded = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    loaded.load()
    for way, picture in {**ways, "opened": opened, "loaded": loaded, "copied": loaded.copy()}.items():
        image = read_picture(picture)
        assert (image.mode, image.size, pixels(image)) == ("RGB", size, expected), way
        again = read_picture(image)
        assert (again.size, pixels(again)) == (size, expected)  # what was read once is not turned once more

    chat = [{"role": "user", "content": "Look!"}]
    expected = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    for way, picture in ways.items():
        assert torch.equal(processor(chat, images=picture)["pixel_values"], expected), way
        assert torch.equal(processor.pixel_values([picture, image])[:1], expected), way
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "picture", "text": "x"}')
    in_training = [pair["image"] for pair in load_image_text_pairs(tmp_path)]
    (tmp_path / "metadata.jsonl").unlink()
    in_index = [image for _, image in load_pictures(tmp_path, SkipReport(tmp_path.parent / "report"))[0]]
    part = ImagePart(type="image_url", image_url={"url": ways["data: URL"]})
    for (other,) in (in_training, in_index, [part.for_processor()["image"]]):
        assert (other.size, pixels(other)) == (image.size, pixels(image))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_every_way_in_gives_the_same_error(kind, tmp_path, server, processor):
    data, message = REFUSED[kind]
    errors = set()
    for picture in ways_in(data, tmp_path, server).values():
        with pytest.raises(ValueError, match=message) as error:
            read_picture(picture)
        errors.add(str(error.value))
        with pytest.raises(ValueError, match=f"row 0: .*{message}"):
            processor([{"role": "user", "content": "Look!"}], images=picture)
    part = ImagePart(type="image_url", image_url={"url": data_url(data)})
    with pytest.raises(ValueError, match=message) as error:
        part.for_processor()
    errors.add(str(error.value).replace("at most 25000000 ", "at most 64000000 "))  # a server reads fewer pixels
    assert len(errors) == 1 and "0x" not in errors.pop()  # the same each time: no address of an object in it


def test_a_picture_is_copied_once():
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    before = Image.core.get_stats()["new_count"]
    assert pixels(read_picture(image)) == pixels(image)
    assert Image.core.get_stats()["new_count"] == before + 1  # images that were made


def test_images_of_the_caller_are_read_as_their_files_and_left_alone():
    for image, expected in (
        (row("I;16B", 20000, 0), [GREY, (0,) * 3]),
        (row("PA", (0, 0)), [WHITE]),
        (row("RGBa", (0, 0, 0, 0)), [WHITE]),
        (palette(True), [WHITE, (40, 50, 60)]),
    ):
        before = image.tobytes()
        assert pixels(read_picture(image)) == expected, image.mode
        assert image.tobytes() == before
    sequence = Image.open(io.BytesIO(animation()))
    sequence.seek(1)
    assert pixels(read_picture(sequence)) == [(0, 0, 255)]  # the frame that it is at
    assert sequence.tell() == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (2, 2)), "mode F cannot be scaled"),
        (Image.frombytes("I;16N", (1, 1), b"ab"), "mode I;16N cannot be scaled"),
        (Image.new("I", (2, 2), -1), "exceed 16 bits"),
        (Image.new("RGB", (0, 5)), "no pixels, its size is 0 x 5"),
        (Image.open(io.BytesIO(NOISE[:-30])), "not a complete PNG"),
    ],
)
def test_images_of_the_caller_that_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_picture(image)


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3).numpy(), 7, None, [NOISE], io.BytesIO(NOISE)]
)
def test_what_is_no_picture_says_what_is(picture, processor):
    with pytest.raises(TypeError, match="bytes of a file, a path, .*Image.fromarray"):
        read_picture(picture)
    with pytest.raises(TypeError, match=type(picture).__name__):
        processor.pixel_values([picture])


def test_the_number_of_pixels_is_checked_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(pictures_vikdf, "_to_rgb", lambda image: pytest.fail("decoded"))
    for picture in (NOISE, Image.open(io.BytesIO(NOISE))):
        with pytest.raises(ValueError, match="has 64 x 64 pixels; at most 4095 are read"):
            read_picture(picture, max_pixels=4095)
    monkeypatch.undo()
    assert read_picture(NOISE, max_pixels=4096).size == (64, 64)


@given(st.binary(max_size=60), st.sampled_from([data for data, *_ in READ.values()]), st.integers(0, 10**6))
def test_damaged_files_are_read_or_refused(damage, data, place):
    place %= len(data)
    try:
        image = read_picture(data[:place] + damage + data[place + len(damage) :])
    except ValueError:
        return
    assert image.mode == "RGB"


# ---- paths and URLs ----


def test_paths_that_lead_to_no_regular_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.jpg").mkdir()
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "folder.jpg"):
        with pytest.raises(ValueError, match=f"cannot read the picture: {path} is not a regular file"):
            read_picture(path)
    with pytest.raises(ValueError, match="cannot read the picture: .*gone.png"):
        read_picture(tmp_path / "gone.png")
    monkeypatch.setattr(pictures_vikdf, "MAX_PICTURE_BYTES", 1000)
    (tmp_path / "large.png").write_bytes(NOISE)
    with pytest.raises(ValueError, match="large.png has more than 1000 bytes"):
        read_picture(tmp_path / "large.png")


@pytest.mark.parametrize(
    "url, message",
    [
        ("file:///etc/passwd", "not file://"),
        ("FILE:///etc/passwd", "not file://"),
        ("ftp://127.0.0.1/a.png", "not ftp://"),
        ("s3://bucket/a.png", "not s3://"),
        ("http://127.0.0.1:1/a.png", "refused"),
        ("http://127.0.0.1:1/ .png", "URL can't contain control characters"),
        ("data:image/png,AAAA", "its data: URL begins with 'data:image/png"),
        ("data:text/html;base64,AAAA", "its data: URL begins with"),
        ("data:", "its data: URL begins with"),
        ("data:image/png;base64,A", "is not valid base64"),
        ("data:image/png;base64,AA!A", "is not valid base64"),
    ],
)
def test_urls_that_are_refused(url, message):
    with pytest.raises(ValueError, match=f"cannot read the picture: .*{message}"):
        read_picture(url)


def test_redirections_stay_on_the_web(server, tmp_path):
    (tmp_path / "a.png").write_bytes(NOISE)
    server.files["a"] = NOISE
    server.redirections.update(web=f"{server.url}/a", disk=f"file://{tmp_path}/a.png", ftp="ftp://127.0.0.1:1/a.png")
    assert read_picture(f"{server.url}/web").size == (64, 64)
    for name in ("disk", "ftp"):
        with pytest.raises(ValueError, match="cannot read the picture: .*(file|ftp)"):
            read_picture(f"{server.url}/{name}")


def test_urls_that_bring_too_much_too_little_or_too_slowly(server, monkeypatch):
    server.files["a"] = NOISE
    with monkeypatch.context() as patch:
        patch.setattr(pictures_vikdf, "MAX_PICTURE_BYTES", 1000)
        with pytest.raises(ValueError, match="/a has more than 1000 bytes"):
            read_picture(f"{server.url}/a")
    with monkeypatch.context() as patch:
        patch.setattr(server, "missing", 5)
        with pytest.raises(ValueError, match="ended 5 bytes early"):
            read_picture(f"{server.url}/a")
    with monkeypatch.context() as patch:  # a second passes with every look at the clock
        clock = iter(range(1000))
        patch.setattr(pictures_vikdf.time, "monotonic", lambda: 40 * next(clock))
        with pytest.raises(ValueError, match="took more than 30 seconds"):
            read_picture(f"{server.url}/a")
