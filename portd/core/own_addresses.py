"""Loopback addresses of instances' own: one each, the same again whenever it can be.

An address costs nothing (anybody can bind any of 127/8 on Linux), so a fresh one is given while there is one, and only
then the longest idle. Memory is bounded by the block.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address, IPv4Network

from portd.core.errors import PoolExhausted

User = int | str | None
"""Whose a lease is: a uid, `token:NAME`, or None where neither is known."""
Instance = tuple[str, str, User]
"""(service, instance, user): what one user had is given back to that user alone."""


class OwnAddresses:
    """The block of loopback addresses that instances get one of (`own_addresses` in the configuration)."""

    def __init__(self, block: IPv4Network) -> None:
        self.block = block
        self._next = 1  # the first address of a block is its network's name, the last its broadcast: both stay unused
        self._leases: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._instance: dict[str, Instance] = {}
        self._address: dict[Instance, str] = {}

    def pick(self, instance: Instance) -> str:
        """Return the address that the instance has or had, else a fresh one, else the longest idle.

        Raises PoolExhausted when every address of the block is in use.
        """
        mine = self._address.get(instance)
        if mine is not None and (mine in self._leases or self.contains(mine)):
            return mine
        while self._next < self.block.num_addresses - 1:
            address = str(self.block[self._next])
            if address not in self._instance:
                return address
            self._next += 1
        for address in self._idle:
            if self.contains(address):
                return address
        raise PoolExhausted(f"every address of own_addresses ({self.block}) is in use: widen it in the configuration")

    def contains(self, address: str) -> bool:
        """Return whether the configured block has the address; one that a live lease keeps may lie outside it."""
        return IPv4Address(address) in self.block

    def use(self, address: str, instance: Instance) -> None:
        """Count one more lease of the instance on the address, which becomes its own."""
        self.remember(address, instance)
        self._leases[address] = self._leases.get(address, 0) + 1
        self._idle.pop(address, None)

    def release(self, address: str) -> None:
        """Count one lease less; an address without any becomes the newest idle one, and stays its instance's."""
        left = self._leases.get(address, 0) - 1
        if left > 0:
            self._leases[address] = left
        else:
            self._leases.pop(address, None)
            self._idle[address] = None
            self._idle.move_to_end(address)

    def remember(self, address: str, instance: Instance) -> None:
        """Record whose address it is or was."""
        before = self._instance.get(address)
        if before is not None and before != instance and self._address.get(before) == address:
            del self._address[before]
        self._instance[address] = instance
        self._address[instance] = address
        if address not in self._leases:
            self._idle[address] = None
