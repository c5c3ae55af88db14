"""Hyperparameters for a recipe: from the model's size, the device's memory and the data, each with the rule behind it.

What is published, what lies between published values, what is a rule of our own and what was measured are told apart; nothing is
written into the recipe itself.
"""

from .advice import Advice, advise
from .fragment import check_new, fragment, write_fragment
from .memory import Memory, memory_of
from .rules import Proposal
from .show import show

__all__ = ["Advice", "Memory", "Proposal", "advise", "check_new", "fragment", "memory_of", "show", "write_fragment"]
