"""Image bytes to pixels, with limits that are checked before anything large is allocated. Runs in a thread."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from shared.errors import InvalidRequest

MAX_IMAGE_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Pillow's own guard warns where ours refuses; `decode_image` looks at the size before any pixel is read.
Image.MAX_IMAGE_PIXELS = None


def decode_image(data: bytes, param: str) -> Image.Image:
    """An RGB image, turned as its EXIF data say.

    Raises:
        InvalidRequest: empty, damaged, animated or too large, or in a format that is not supported.
    """
    if not data:
        raise InvalidRequest(f"{param}: the image has no bytes", param=param)
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # parsers of many formats raise many things at damaged headers
        text = f"{param}: not an image in a supported format ({', '.join(FORMATS)}), or its head is damaged"
        raise InvalidRequest(text, param=param) from error
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        size = f"{picture.width} x {picture.height} pixels"
        raise InvalidRequest(f"{param}: the image has {size}; {MAX_IMAGE_PIXELS} are allowed", param=param)
    try:
        if getattr(picture, "is_animated", False):
            raise InvalidRequest(f"{param}: animated images are not supported; send one frame", param=param)
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # as above, of the pixels
        raise InvalidRequest(f"{param}: the image is cut short or damaged", param=param) from error
