"""The one error a user can cause, always in the same four parts."""

from __future__ import annotations


class FxrpgError(Exception):
    """Base of every error that a user of fxrpg can cause.

    Args:
        where: the weight, file, argument or option that is at fault.
        must: what has to hold there.
        found: what was there instead.
        fix: what to do about it.
    """

    def __init__(self, where: str, must: str, found: str, fix: str) -> None:
        super().__init__(where, must, found, fix)

    def __str__(self) -> str:
        where, must, found, fix = self.args
        return f"{where}: {must}, found {found}. {fix}"
