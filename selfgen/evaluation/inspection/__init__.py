"""A few rows looked at token by token: what training would show the model, and what it says by itself."""

from .records import InspectedRow, Place, first_slip, inspect_rows
from .token_texts import TokenText, TokenTexts

__all__ = ["InspectedRow", "Place", "TokenText", "TokenTexts", "first_slip", "inspect_rows"]
