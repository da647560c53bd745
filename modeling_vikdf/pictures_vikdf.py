"""Pictures from any source, read one way: upright, 8-bit RGB, transparency on white, limited in size.

    bytes of a file, its path, its URL, a PIL image -> `read_picture` -> an RGB image

Knows files, URLs and Pillow; no processor, chat or model.
"""

import base64
import io
import os
import re
import stat
import time
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageChops, ImageOps


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none that runs other programs, as EPS does
MAX_PIXELS = 64_000_000  # larger pictures are treated as decompression bombs
MAX_PICTURE_BYTES = 2**28  # the size of MAX_PIXELS without compression
URL_TIMEOUT = 30.0  # seconds, between two reads and for the whole picture


def read_picture(picture: bytes | str | os.PathLike | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a picture the same way from any source: upright, 8-bit RGB, transparency on white.

    Args:
        picture: The bytes of a file, its path, its `http(s)://` or `data:` URL, or a PIL image, which is read as its
            file would be. Of an animation the first frame is read, of a PIL image the current one.
        max_pixels: Maximum of width times height, checked in the header before decoding.

    Returns:
        A new image of mode RGB.

    Raises:
        TypeError: If `picture` is none of these; convert an array by `PIL.Image.fromarray`.
        ValueError: If it does not exist, is damaged, truncated, empty, too large, in none of `PICTURE_FORMATS`, or has
            floating-point values, which have no agreed white.
    """
    if not isinstance(picture, Image.Image):
        picture = _open_picture(_read_content_of(picture), max_pixels)
    width, height = picture.size
    if width * height == 0:
        raise ValueError(f"the picture has no pixels, its size is {width} x {height}.")
    if width * height > max_pixels:
        raise ValueError(f"the picture has {width} x {height} pixels; at most {max_pixels} are read.")
    try:
        upright = ImageOps.exif_transpose(picture)  # which decodes it, and copies it
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise ValueError(f"cannot read the picture: it is not a complete {_formats()} ({error}).") from error
    try:
        return _to_rgb(upright)
    except ValueError as error:
        raise ValueError(f"cannot read the picture: {error}.") from error


def _open_picture(content: bytes, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the picture has too many pixels; at most {max_pixels} are read ({error}).") from error
    except Exception as error:  # its message would only name a BytesIO
        raise ValueError(f"cannot read the picture: it is not a complete {_formats()}.") from error


def _formats() -> str:
    return f"{', '.join(PICTURE_FORMATS[:-1])} or {PICTURE_FORMATS[-1]}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I;16N"):  # floating-point values have no agreed white, and Pillow converts I;16N wrongly
        raise ValueError(f"values of mode {image.mode} cannot be scaled; convert it to 8 bits, mode L or RGB")
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:  # transparent pixels may have any color, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy more would be as large as a picture


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales a 16-bit grey image to 8 bits, which Pillow would clip; its transparent value becomes alpha."""
    transparent, image = image.info.get("transparency"), image.convert("I")
    if image.getextrema()[0] < 0 or image.getextrema()[1] > 0xFFFF:
        raise ValueError(f"its values {image.getextrema()} exceed 16 bits, 0 to 65535")
    grey = image.point(lambda value: value / 256).convert("L")
    if transparent is not None:
        above, below = (image.point(lambda value, s=s: value * s - transparent * s).convert("L") for s in (1, -1))
        grey.putalpha(ImageChops.lighter(above, below).point(lambda distance: 255 if distance else 0))
    return grey


def _read_content_of(picture: Any) -> bytes:
    """The bytes of a picture's file, given, at a URL, or on the disk."""
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, (str, os.PathLike)):
        raise TypeError(
            "cannot read the picture: expected the bytes of a file, a path, an http(s):// or data: URL, or a PIL "
            f"image, not {type(picture).__name__}. PIL.Image.fromarray converts an array."
        )
    scheme = re.match(r"(data(?=:)|[a-z][a-z0-9+.-]*(?=://))?", str(picture), re.IGNORECASE)[0].lower()
    try:
        if scheme == "data":
            return _decode_data_url(picture)
        if scheme in ("http", "https"):
            return _fetch(picture)
        if scheme:
            raise ValueError(f"only http://, https:// and data: URLs are supported, not {scheme}://")
        return read_file(picture, MAX_PICTURE_BYTES)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"cannot read the picture: {error}.") from error


def read_file(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is larger than `max_bytes`, or a folder, a device or a pipe, which may never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{os.fspath(path)} is not a regular file")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{os.fspath(path)} has more than {max_bytes} bytes")
    return content


def _decode_data_url(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not re.fullmatch(r"data:image/[^,]*;base64", head, re.IGNORECASE):
        raise ValueError(f"its data: URL begins with {url[:40]!r} instead of data:image/...;base64,")
    try:
        return base64.b64decode(b"".join(unquote_to_bytes(data).split()), validate=True)
    except ValueError as error:
        raise ValueError(f"its data: URL is not valid base64 ({error})") from error


def _fetch(url: str) -> bytes:
    opener = urllib.request.OpenerDirector()  # the default one would follow a redirect to ftp://
    handlers = ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect")
    for handler in (*(f"{name}Handler" for name in handlers), "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, handler)())
    request = urllib.request.Request(url, headers={"User-Agent": "modeling_vikdf"})  # some servers refuse urllib's own
    deadline, content = time.monotonic() + URL_TIMEOUT, bytearray()
    with opener.open(request, timeout=URL_TIMEOUT) as response:
        while chunk := response.read1(2**16):
            content += chunk
            if len(content) > MAX_PICTURE_BYTES:
                raise ValueError(f"{url} has more than {MAX_PICTURE_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} took more than {URL_TIMEOUT:g} seconds")
        if response.length:
            raise ConnectionError(f"{url} ended {response.length} bytes early")
    return bytes(content)


def load_picture(picture: Any, row: int) -> Image.Image:
    """`read_picture` for row `row` of a batch; raises only ValueErrors, which name the row."""
    try:
        return read_picture(picture)
    except (TypeError, ValueError) as error:
        source = f" It was given as {str(picture)[:80]!r}." if isinstance(picture, (str, os.PathLike)) else ""
        raise ValueError(f"row {row}: {error}{source}") from error


__all__ = ["MAX_PICTURE_BYTES", "MAX_PIXELS", "PICTURE_FORMATS", "read_file", "read_picture"]
