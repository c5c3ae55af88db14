"""A reader behind an endpoint: the question first, then the tiles as images, and out comes an answer without the thought before it.

Invariants: a tile is sent as its own bytes unless a size is configured; its media type is told from its bytes and not from its name. An
answer depends on what `key` names and on nothing else. A thought is never graded: `<think>…</think>` is taken out, and one that never
ends is no answer but a named truncation.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stairstep.settings import SettingError, TileError, setting
from stairstep.tiles import TileReader, TileSettings, decode_image

from .chat import ChatClient, Message, Reply
from .endpoints import EndpointSettings

SYSTEM = (
    "Answer the question from the images that follow it. Give the answer alone, in as few words as it takes."
    " If the images do not show the answer, say that you do not know."
)
READER_KEY = "READER_API_KEY"
_FORMAT = 1  # of what is sent besides the settings; part of every key
_CACHE_BYTES = 256_000_000
_THOUGHT = re.compile(r"<(think|thinking)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_MEDIA_TYPES = (
    ("image/png", lambda head: head.startswith(b"\x89PNG\r\n\x1a\n")),
    ("image/jpeg", lambda head: head.startswith(b"\xff\xd8\xff")),
    ("image/webp", lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP"),
    ("image/gif", lambda head: head.startswith((b"GIF87a", b"GIF89a"))),
    ("image/bmp", lambda head: head.startswith(b"BM")),
)


@dataclass(frozen=True)
class RemoteReaderSettings(EndpointSettings):
    """A reader at an OpenAI-compatible endpoint: the platform's own Serve app, vLLM, or any other."""

    kind: Literal["endpoint"] = setting("endpoint", doc="The kind of reader.")
    model: str = setting("Qwen/Qwen3-VL-4B-Instruct", doc="The model's name at the endpoint.")
    base_url: str | None = setting(
        "http://127.0.0.1:8200/v1",
        doc="Address of the endpoint, mostly ending in /v1; null: the variable OPENAI_BASE_URL or OpenAI.",
    )
    key_env: str = setting(
        READER_KEY, doc="NAME of the variable that holds the key, or with _FILE behind it the path of a file that does; none: no key."
    )
    system: str = setting(SYSTEM, doc="System message of the reader; empty: none.")
    prompt: str = setting("{question}", doc="What stands before the tiles; {question} is where the question goes.")
    max_new_tokens: int = setting(200, doc="Most tokens of an answer, a thought before it included.", minimum=1)
    image_pixels: int | None = setting(
        None,
        doc="Most pixels of a tile as sent: larger ones are shrunk, and all are sent as PNG; null: the file's own bytes.",
        minimum=1024,
    )
    image_mb: float = setting(20.0, doc="Most MB of a tile as sent; of a larger one the question fails, and says so.", above=0)

    def check(self) -> None:
        """The question must have a place in the prompt."""
        super().check()
        if "{question}" not in self.prompt:
            raise SettingError("prompt", "{question} does not stand in it; put it where the question goes")


@dataclass(frozen=True)
class Answer:
    """What a reader answered, without its thought, and the reply that it was taken from."""

    text: str
    truncated_thinking: bool
    reply: Reply

    @property
    def failure(self) -> str | None:
        """Why there is no answer to grade, or None where there is one."""
        if not self.truncated_thinking:
            return None
        return (
            f"thinking was cut off after {self.reply.completion_tokens or 'the allowed'} tokens, before the answer; raise"
            " evaluation.reader.max_new_tokens, or use a model that does not think"
        )


class RemoteReader:
    """Asks a client's endpoint; safe from any number of threads."""

    def __init__(self, settings: RemoteReaderSettings, client: ChatClient, tiles: TileReader | None = None) -> None:
        self.settings, self.client = settings, client
        self._images = ImageUrls(settings.image_pixels, int(settings.image_mb * 1e6), tiles or TileReader(TileSettings()))

    def messages(self, question: str, tiles: Sequence[Path]) -> list[Message]:
        """The conversation that asks a question about tiles, best first; TileError where one cannot be sent."""
        images = [{"type": "image_url", "image_url": {"url": self._images.url(Path(tile))}} for tile in tiles]
        user: Message = {"role": "user", "content": [{"type": "text", "text": self._prompt(question)}, *images]}
        return [{"role": "system", "content": self.settings.system}, user] if self.settings.system else [user]

    def answer(self, question: str, tiles: Sequence[Path]) -> Answer:
        """The answer to a question from its tiles; AskFailed or TileError where there is none."""
        reply = self.client.ask(self.messages(question, tiles), self.settings.max_new_tokens, temperature=0.0)
        text, open_thought = without_thought(reply.text)
        cut = open_thought or (reply.finish_reason == "length" and not text)
        return Answer(text, cut, reply)

    def key(self, question: str, tile_ids: Sequence[str]) -> dict[str, Any]:
        """Everything that the answer depends on, as plain JSON."""
        return {
            "format": _FORMAT,
            "model": self.settings.model,
            "revision": self.settings.revision,
            "system": self.settings.system,
            "prompt": self._prompt(question),
            "tiles": list(tile_ids),
            "image_pixels": self.settings.image_pixels,
            "sampling": {"temperature": 0.0, "max_tokens": self.settings.max_new_tokens},
        }

    def _prompt(self, question: str) -> str:
        return self.settings.prompt.replace("{question}", question)


def without_thought(text: str) -> tuple[str, bool]:
    """The text without its thoughts, and whether a thought was left open.

    A template may have opened the first thought itself: then the text begins within it, and only its end is seen.
    """
    said = _THOUGHT.sub(" ", text)
    *_, said = _CLOSE.split(said)
    opened = _OPEN.search(said)
    return (said if opened is None else said[: opened.start()]).strip(), opened is not None


def media_type(data: bytes, where: str) -> str:
    """The media type of an image, from its first bytes."""
    for name, accepts in _MEDIA_TYPES:
        if accepts(data[:16]):
            return name
    raise TileError(f"{where}: expected a PNG, JPEG, WebP, GIF or BMP image, but the file begins with {data[:12]!r}")


class ImageUrls:
    """Tiles as data URLs, as their own bytes or as PNGs of bounded size; the last ones used are kept, within a bound in bytes."""

    def __init__(self, pixels: int | None, most_bytes: int, tiles: TileReader, cache_bytes: int = _CACHE_BYTES) -> None:
        self._pixels, self._most_bytes, self._tiles = pixels, most_bytes, tiles
        self._room = cache_bytes
        self._kept: OrderedDict[tuple[str, int, int], str] = OrderedDict()
        self._lock = threading.Lock()

    def url(self, path: Path) -> str:
        """The data URL of a tile in its present state."""
        key = (os.path.abspath(path), *self._tiles.stamp(path))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._made(self._tiles.source(path), str(path))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._room -= len(made)
            while self._room < 0:
                self._room += len(self._kept.popitem(last=False)[1])
        return made

    def _made(self, data: bytes, where: str) -> str:
        kind = media_type(data, where)
        if self._pixels is not None:
            data, kind = shrunk_png(data, where, self._pixels, self._tiles.settings.max_image_pixels), "image/png"
        if len(data) > self._most_bytes:
            raise TileError(
                f"{where}: {len(data) / 1e6:.1f} MB as sent, more than evaluation.reader.image_mb; set evaluation.reader.image_pixels to"
                " send it smaller, or raise that limit if the endpoint takes so much"
            )
        return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def shrunk_png(data: bytes, where: str, pixels: int, most_source_pixels: int) -> bytes:
    """An image as PNG with at most so many pixels, its shape kept; one whose header announces too many is refused undecoded."""
    from PIL import Image

    image = Image.fromarray(decode_image(data, where, most_source_pixels).permute(1, 2, 0).numpy())
    width, height = image.size
    if width * height > pixels:
        scale = math.sqrt(pixels / (width * height))
        size = (max(1, min(int(width * scale), pixels)), max(1, min(int(height * scale), pixels)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=1)
    return written.getvalue()
