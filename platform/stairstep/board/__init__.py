"""What a person sees of runs and sweeps: one HTML file, text and CSV, made from run folders alone. Ray is not needed here."""

from .page import MOST_BYTES, Content, content, html_page
from .read import Board, Folders, Run, check_place
from .tables import as_csv
from .text import board_text
from .watch import BoardServer, Live

__all__ = [
    "MOST_BYTES",
    "Board",
    "BoardServer",
    "Content",
    "Folders",
    "Live",
    "Run",
    "as_csv",
    "board_text",
    "check_place",
    "content",
    "html_page",
]
