"""Names of articles, made from a file's path or a page's address: safe on every file system, unique, and the ones that tiles give back.

Invariant: `article_of` of every tile's name is the article that the name was made from, whatever the path or the address held.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping

# A file name may have 255 bytes, and while it is written it carries a temporary ending of up to 70.
_MAX_BYTES = 100


def tile_name(article: str, number: int) -> str:
    """The file name of an article's tile."""
    return f"{article}_chunk_{number:03d}.png"


def tile_number(name: str) -> int:
    """The number in a tile's file name."""
    return int(name.removesuffix(".png").rpartition("_chunk_")[2])


def article_name(text: str) -> str:
    """A path or an address as the name of an article: letters, digits, '.', '_' and '-'; the marks of tile names do not occur in it."""
    text = unicodedata.normalize("NFC", text)
    plain = "".join(letter if letter.isalnum() or letter in ".-_" or unicodedata.category(letter)[0] == "M" else "_" for letter in text)
    plain = re.sub(r"\.\.+", ".", re.sub("__+", "_", plain))
    plain = plain.replace("_chunk", "-chunk")
    plain = plain.strip("._-") or "page"
    plain = re.sub("^dist_", "dist-", plain)
    cut = plain.encode()[:_MAX_BYTES].decode(errors="ignore")
    return plain if cut == plain else f"{cut.rstrip('._-')}-{_digest(text)[:8]}"


def name_articles(wanted: Iterable[tuple[str, str]], known: Mapping[str, str]) -> dict[str, str]:
    """The article of each source, given the text that each is named by: a `known` one keeps its own, a name that is taken gets a digest.

    Names that differ in upper and lower case alone are the same, as they are on some file systems.
    """
    taken = {article.casefold() for article in known.values()}
    named = dict(known)
    for source, text in wanted:
        if source in named:
            continue
        plain, digest = article_name(text), _digest(source)
        choices = (plain, *(f"{plain}-{digest[:length]}" for length in (8, 16, 64)))
        named[source] = next(one for one in choices if one.casefold() not in taken)
        taken.add(named[source].casefold())
    return named


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
