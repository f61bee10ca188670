"""The one error that is the user's to fix: it says what is wrong, where, and how to fix it."""

from __future__ import annotations


class InputError(ValueError):
    """Bad data, recipe, checkpoint or machine set-up; the command ends with exit status 2."""
