"""Pictures of requests: data URLs to uint8 [side, side, 3] at the model's size.

What a picture costs is checked before it is spent: the length of the base64 before it is decoded,
the size in the header before the pixels are. Base64 is read strictly, as RFC 4648 has it: its
standard alphabet, padded, without whitespace or line breaks.

Messages name the field and the limit, never what was sent nor a word of a decoder, which may hold
addresses in memory.
"""

from __future__ import annotations

import binascii
import io
from collections.abc import Callable

from PIL import Image

from mmi_deploy.documents.images import Rgb, as_rgb, resize, without_long_texts
from mmi_deploy.errors import DocumentError
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.settings import RequestLimits

# Formats that may come from outside; others of Pillow's are rare in the web and old in their code.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# Reads a picture's file from an address that an operator allowed. Raises `ApiError`.
Fetch = Callable[[str], bytes]

_MOST_HEAD = 256


class PictureReader:
    """Reader of the pictures of one request, which decodes equal ones once.

    side: to which pictures are resized, in pixels. fetch: reads what is no data URL; None for a
    server that fetches nothing.
    """

    def __init__(self, side: int, limits: RequestLimits, fetch: Fetch | None = None) -> None:
        self._side, self._limits, self._fetch = side, limits, fetch
        self._known: dict[str, Rgb] = {}
        self._pixels = 0  # of all pictures so far

    def of_url(self, url: str, param: str) -> Rgb:
        """Read the picture of an `image_url`. Raises `ApiError`."""
        found = self._known.get(url)
        if found is None:
            found = self._known[url] = self._decoded(self._file_of(url, param), param)
        return found

    def of_base64(self, text: str, param: str) -> Rgb:
        """Read the picture whose file is `text`. Raises `ApiError`."""
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = self._decoded(self._bytes_of(text, param), param)
        return found

    def _file_of(self, url: str, param: str) -> bytes:
        if url[:5].lower() != "data:":
            if self._fetch is None:
                raise ApiError(
                    400,
                    "remote_images_off",
                    f"`{param}` is no data URL, and this server fetches nothing: send the picture "
                    "itself, as data:image/png;base64,...",
                    param=param,
                )
            try:
                data = self._fetch(url)
            except ApiError as error:  # which knows nothing of the request's fields
                error.param = param
                raise
            self._check_bytes(len(data), param)
            return data
        comma = url.find(",", 0, _MOST_HEAD)
        kind, *settings = url[5 : max(comma, 5)].lower().split(";")
        if comma < 0 or not kind.startswith("image/") or settings[-1:] != ["base64"]:
            raise ApiError(
                400,
                "invalid_image_url",
                f"`{param}` must be a data URL of a picture: data:image/png;base64,...",
                param=param,
            )
        return self._bytes_of(url, param, comma + 1)

    def _bytes_of(self, text: str, param: str, start: int = 0) -> bytes:
        """Decode the base64 of `text` from `start` on."""
        self._check_bytes((len(text) - start) // 4 * 3 - text.count("=", len(text) - 2), param)
        try:
            return binascii.a2b_base64(text[start:].encode("ascii"), strict_mode=True)
        except ValueError:  # binascii.Error and UnicodeEncodeError are both
            raise ApiError(
                400,
                "invalid_base64",
                f"`{param}` is not base64: standard alphabet, padded, without whitespace",
                param=param,
            ) from None

    def _check_bytes(self, size: int, param: str) -> None:
        most = self._limits.image_bytes
        if size > most:
            raise ApiError(
                400,
                "image_too_large",
                f"the picture `{param}` has {size} bytes; at most {most}",
                param=param,
            )

    def _decoded(self, data: bytes, param: str) -> Rgb:
        """Decode a file, upright, transparent parts white, and resize it."""
        try:
            with Image.open(without_long_texts(io.BytesIO(data)), formats=FORMATS) as image:
                self._check_size(
                    f"{image.width} x {image.height}", image.width * image.height, param
                )
                return resize(as_rgb(image), self._side)
        except (ApiError, MemoryError):
            raise
        except Image.DecompressionBombError:  # of Pillow, before the size can be read
            raise self._too_many_pixels("far more", param) from None
        except DocumentError as error:
            numbers = "32 bits" in str(error)
            fault = "stores numbers of 32 bits, not colours" if numbers else "is damaged"
        except Exception:  # decoders raise many types
            fault = "cannot be read"
        raise ApiError(
            400,
            "invalid_image",
            f"the picture `{param}` {fault}; send {', '.join(FORMATS)}",
            param=param,
        )

    def _check_size(self, size: str, pixels: int, param: str) -> None:
        if pixels > self._limits.image_pixels:
            raise self._too_many_pixels(size, param)
        self._pixels += pixels
        if self._pixels > self._limits.all_pixels:
            raise ApiError(
                400,
                "images_too_many_pixels",
                f"the pictures of the request have more than {self._limits.all_pixels} pixels "
                "together; scale them down",
                param=param,
            )

    def _too_many_pixels(self, size: str, param: str) -> ApiError:
        return ApiError(
            400,
            "image_too_many_pixels",
            f"the picture `{param}` has {size} pixels; at most {self._limits.image_pixels} in all",
            param=param,
        )
