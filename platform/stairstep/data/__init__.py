"""Rows in: query–tile pairs, text pairs, question sets and the plan of batches. Knows files and rows, never pixels or models."""

from .packed import PackedFiles, or_unmatched
from .plan import BatchPlan, counts_of, fixed_sample, share
from .questions import Question, QuestionSet, TileFile, article_of, is_selection, list_tiles, read_question_set
from .roots import Roots, resolve_inside, roots_of
from .rows import PairRow, TextRow, missing_tiles, read_pairs, read_texts
from .settings import ArchiveSource, DataSettings, FetchSource, Order, PairSource, QuestionSetSource, TextSource, WorldSettings

__all__ = [
    "ArchiveSource",
    "BatchPlan",
    "DataSettings",
    "FetchSource",
    "Order",
    "PackedFiles",
    "PairRow",
    "PairSource",
    "Question",
    "QuestionSet",
    "QuestionSetSource",
    "Roots",
    "TextRow",
    "TextSource",
    "TileFile",
    "WorldSettings",
    "article_of",
    "counts_of",
    "fixed_sample",
    "is_selection",
    "list_tiles",
    "missing_tiles",
    "or_unmatched",
    "read_pairs",
    "read_question_set",
    "read_texts",
    "resolve_inside",
    "roots_of",
    "share",
]
