"""What the tiny reader says when no tile holds the answer, and what asks it for a tile's whole text."""

UNKNOWN = "I don't know."
TRANSCRIBE = "Read the tile."
