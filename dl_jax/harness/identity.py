"""Whose a folder or a checkpoint is: the experiment, its config and seeds, the child run, and the data that it read."""

from collections.abc import Mapping
from typing import Any

Identity = Mapping[str, Any]  # nested, of what JSON can represent

FIELDS = ("experiment", "preset", "config", "seeds")  # of a run in its folder; a checkpoint's has more


def is_identity(content: Any) -> bool:
    """Whether `content`, from a JSON file, is that of a run."""
    kinds = {"experiment": str, "preset": str, "config": dict}
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(key), kind) for key, kind in kinds.items())
        and isinstance(content.get("seeds", []), list)
    )


def differing(found: Identity, wanted: Identity) -> list[tuple[str, Any, Any]]:
    """The key and both values of each field that differs, also of nested ones; "not set" is the value of none."""
    pairs = []
    for key in sorted({*found, *wanted}):
        one, other = found.get(key, "not set"), wanted.get(key, "not set")
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            pairs += differing(one, other)
        elif one != other:
            pairs.append((key, one, other))
    return pairs


def differences(found: Identity, wanted: Identity, there: str, here: str = "in this command") -> list[str]:
    """A phrase for each field that differs, such as "batch_size is 128 in the folder, 64 in this command"."""
    return [f"{key} is {one} {there}, {other} {here}" for key, one, other in differing(found, wanted)]


def read_by_both(found: Identity, wanted: Identity) -> tuple[Identity, Identity]:
    """The two without the data sets that only one of them has read, because a run may read a set later."""
    both = found.get("data", {}).keys() & wanted.get("data", {}).keys()
    trimmed = ({**each, "data": {name: each["data"][name] for name in both}} for each in (found, wanted))
    return next(trimmed), next(trimmed)
