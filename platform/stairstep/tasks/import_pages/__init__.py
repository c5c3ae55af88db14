"""Bringing one's own pages: pictures, PDFs and web pages cut into tiles, with skeletons of pairs and of a question set to fill in."""

from .cutting import TileSize
from .importing import Imported, import_pages, summary
from .sources import Failure

__all__ = ["Failure", "Imported", "TileSize", "import_pages", "summary"]
