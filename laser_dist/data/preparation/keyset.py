"""A set of 64-bit keys in 16 to 32 bytes each: a Python set of as many takes about 70."""

from array import array


class KeySet:
    """Open addressing with linear probing in a flat array; keys are in 1 .. 2**64 - 1 and already well mixed."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        return self._slots.itemsize * len(self._slots)

    def add(self, key: int) -> bool:
        """Add a key; whether it is new."""
        if not self._insert(key):
            return False
        self._count += 1
        if 2 * self._count > len(self._slots):
            old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for known in old:
                if known:
                    self._insert(known)
        return True

    def _insert(self, key: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        slot = key & mask
        while (known := slots[slot]) and known != key:
            slot = (slot + 1) & mask
        slots[slot] = key
        return not known
