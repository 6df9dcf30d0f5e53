"""Revisions as clients write them: `REVISION`, or `STORE:REVISION` with the store that it is of."""

from __future__ import annotations

from typing import Annotated, Final, NamedTuple

from msgspec import Meta

from portd.adapters.http.problems import InvalidQuery
from portd.core.errors import RevisionGone

REVISION_MAX: Final = 2**53
"""The largest integer that every JSON parser keeps whole."""

After = Annotated[
    str,
    Meta(
        max_length=64,
        pattern=r"^([0-9a-f]+:)?[0-9]{1,16}\Z",
        description="The last revision that is known: the X-Portd-Revision of a listing, or the id of an event. "
        "`STORE:REVISION`, with the X-Portd-Store of that answer, is refused with `revision_gone` by any other store.",
        examples=["42", "4f1d0b7aa3c2e961:42"],
    ),
]


class Revisions(NamedTuple):
    """Reads revisions for the store with this id."""

    store_id: str

    def parse(self, text: str, name: str) -> int:
        """Return the revision in a parameter or header of this name.

        Raises InvalidQuery for what is not a revision, RevisionGone for one of another store.
        """
        store, colon, number = text.rpartition(":")
        if not (number.isascii() and number.isdecimal()) or len(number) > 16 or int(number) > REVISION_MAX:
            raise InvalidQuery(f"{name} must be a revision or STORE:REVISION", pointer=f"/{name}")
        if colon and store != self.store_id:
            raise RevisionGone(
                f"revision {number} is of another store ({store[:64]}; this one is {self.store_id}): list again, then "
                "follow from the X-Portd-Revision of that answer"
            )
        return int(number)
