"""Names of other hosts' instances where one flat name must stand for an instance of the whole cluster.

This module must not know which protocol shows them.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from msgspec.structs import replace

from portd.core.model import Lease

LABEL_MAX: Final = 63
"""Characters of a DNS label (RFC 1035 section 2.3.4)."""


def as_unique(lease: Lease) -> Lease:
    """Return another host's lease with an id and an instance name that no other host's lease has.

    `orders-1` of host `b` becomes `orders-1--b`; where that is too long, its end is replaced by a checksum.
    """
    instance = f"{lease.instance}--{lease.host}"
    if len(instance) > LABEL_MAX:
        checksum = f"{crc32(instance.encode()):08x}"
        instance = f"{instance[: LABEL_MAX - len(checksum) - 1].rstrip('-')}-{checksum}"
    return replace(lease, id=f"{lease.host}/{lease.id}", instance=instance)
