"""Which coordinates of arrays' axes have to be removed together: a union-find."""

from collections.abc import Sequence

import numpy as np

Axis = np.ndarray | str  # the identity of each coordinate, int [n]; or, for an axis that cannot shrink, why


class Identities:
    """Identities of coordinates, some of which have been found to be the same, or to stay for a reason.

    An identity may depend on others, its parts: where an axis of heads and one of their dimensions are merged, a
    coordinate goes with its head or with its dimension.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}  # of a root: it goes if one of these goes
        self._reasons: dict[int, str] = {}  # of a root: why it stays

    def fresh(self, n: int) -> np.ndarray:
        """n new identities."""
        first = len(self._parents)
        self._parents.extend(range(first, first + n))
        return np.arange(first, first + n)

    def combined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """New identities, each of which goes if one of its parts goes; `parts` are arrays [n] of identities."""
        new = self.fresh(len(parts[0]))
        self._parts.update(zip(new.tolist(), zip(*(part.tolist() for part in parts), strict=True), strict=True))
        return new

    def root(self, identity: int) -> int:
        """What all identities that are the same have in common."""
        parents = self._parents
        while parents[identity] != identity:
            parents[identity] = parents[parents[identity]]
            identity = parents[identity]
        return identity

    def roots(self, axis: np.ndarray) -> np.ndarray:
        return np.array([self.root(each) for each in axis.ravel().tolist()], int).reshape(axis.shape)

    def join(self, one: Axis, other: Axis) -> None:
        """Notes that the coordinates of two axes of equal length are the same, one by one."""
        if isinstance(one, str):
            self.freeze(other, one)
        elif isinstance(other, str):
            self.freeze(one, other)
        elif one is not other:
            self._unite(list(zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)))

    def freeze(self, axis: Axis, why: str) -> None:
        """Notes that no coordinate of an axis can be removed. The first reason counts."""
        if not isinstance(axis, str):
            self._freeze(axis.ravel().tolist(), why)

    def _unite(self, pairs: list[tuple[int, int]]) -> None:
        while pairs:
            low, high = sorted(map(self.root, pairs.pop()))
            if low == high:
                continue
            self._parents[high] = low
            old, new = self._parts.pop(high, None), self._parts.get(low)
            if old and new and len(old) == len(new):
                pairs.extend(zip(old, new, strict=True))
            elif old and new:
                self._freeze([*old, *new], "an axis that is split in two ways")
            elif old:
                self._parts[low] = old
            reason = self._reasons.get(low) or self._reasons.get(high)
            if reason:
                self._reasons.pop(low, None)
                self._freeze([low], reason)

    def _freeze(self, identities: list[int], why: str) -> None:
        while identities:
            root = self.root(identities.pop())
            if root not in self._reasons:
                self._reasons[root] = why
                identities.extend(self._parts.get(root, ()))

    def reason(self, identity: int) -> str | None:
        """Why an identity stays; None where it can go."""
        root = self.root(identity)
        if root in self._reasons or self.sources(root):
            return self._reasons.get(root)
        return next(
            filter(None, map(self._reasons.get, map(self.root, self._parts[root]))), "an axis merged with itself"
        )

    def sources(self, identity: int) -> frozenset[int]:
        """The roots, independent of each other, with any of which an identity goes; none if it stays."""
        return self._sources(self.root(identity), frozenset())

    def _sources(self, root: int, seen: frozenset[int]) -> frozenset[int]:
        if root in self._reasons or root in seen:
            return frozenset()
        parts = self._parts.get(root)
        if parts is None:
            return frozenset([root])
        return frozenset().union(*(self._sources(self.root(part), seen | {root}) for part in parts))
