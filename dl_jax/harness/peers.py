"""What the processes of a run tell each other: whether they agree, when to end, and why one has ended.

It goes over the key-value store of jax.distributed, which needs no device and no compilation. JAX has no public
interface to this store; its own functions for several processes, and Orbax's, use it in the same way.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dl_jax.core import events
from dl_jax.core.errors import InputError, Unavailable, one_line

LONGEST = 10**6  # seconds that a process waits for the others; `alive` has shorter limits
SHOWN = 3  # differing facts in a message
GONE = ("Gloo", "NCCL", "Connection", "UNAVAILABLE", "coordination")  # in JAX's words where another process has ended
_ROUNDS = itertools.count()  # of this process, as a name is used once


class End(NamedTuple):
    """Why a process has ended, for the others."""

    process: int
    status: int  # exit status
    why: str  # one line; "" if there is nothing to say


class Peers:
    """The processes of this run; this one is `process` of `count`.

    Every process makes the same calls of `agree`, `meet`, `gather` and `told`.
    """

    def __init__(self) -> None:
        from jax._src import distributed

        self.process, self.count = jax.process_index(), jax.process_count()
        self._client: Any = distributed.global_state.client

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Waits for all processes, and raises InputError on each of them unless they give the same `facts`.

        `facts` are nested mappings of what JSON can represent. The message names what differs and on which process.
        """
        words = json.dumps(facts, sort_keys=True)
        with events.phase("waiting"):
            number = next(_ROUNDS)
            digests = self.exchange(f"digest-{number}", hashlib.sha256(words.encode()).hexdigest())
            self._client.key_value_delete(f"dl_jax/digest-{number - 1}/{self.process}")  # all have read it
            if len(set(digests)) > 1:
                found = [flat(json.loads(each)) for each in self.exchange(f"facts-{number}", words)]
                raise InputError(
                    f"processes differ: {differing(found)}; give all of them the same command, code and data"
                )

    def meet(self) -> None:
        """Waits until all processes are here."""
        with events.phase("waiting"):
            self.exchange(f"met-{next(_ROUNDS)}", "")

    def gather(self, words: str) -> list[str]:
        """The words of every process, in their order, on process 0; nothing on the others. All have to call it."""
        if self.count == 1:
            return [words]
        folder = f"dl_jax/gathered-{next(_ROUNDS)}"
        with events.phase("waiting"), self._met(LONGEST):
            self._client.key_value_set(f"{folder}/{self.process}", words)
            if self.process:
                return []
            found = [self._client.blocking_key_value_get(f"{folder}/{i}", 1000 * LONGEST) for i in range(self.count)]
            self._client.key_value_delete(folder)  # with all that is in it
            return found

    def told(self, words: str) -> str:
        """The words of process 0, on every process. All have to call it."""
        if self.count == 1:
            return words
        name = f"dl_jax/told-{next(_ROUNDS)}"
        with events.phase("waiting"), self._met(LONGEST):
            if self.process == 0:
                self._client.key_value_set(name, words)
            return self._client.blocking_key_value_get(name, 1000 * LONGEST)

    def exchange(self, name: str, words: str, seconds: float = LONGEST) -> list[str]:
        """The words of every process, in their order, once all have called it with this new `name`."""
        folder = f"dl_jax/{name}"
        with self._met(seconds):
            self._client.key_value_set(f"{folder}/{self.process}", words)
            self._client.wait_at_barrier(folder, int(1000 * seconds))
            found = dict(self._client.key_value_dir_get(f"{folder}/"))
        return [found[f"{folder}/{process}"] for process in range(self.count)]

    @contextlib.contextmanager
    def _met(self, seconds: float) -> Iterator[None]:
        """A context in which the client's errors say that the others did not come."""
        try:
            yield
        except RuntimeError as error:  # JaxRuntimeError
            raise Unavailable(
                f"process {self.process} did not meet the others within {seconds:g} s ({one_line(error)[:200]}); give "
                "all of them the same command again"
            ) from error

    def ask_to_end(self) -> None:
        """Tells all processes that this one was asked to end."""
        self._client.key_value_set("dl_jax/news/asked", str(self.process), allow_overwrite=True)

    def tell_end(self, status: int, why: str) -> None:
        """Tells all processes that this one ends with `status`, and why."""
        self._client.key_value_set(f"dl_jax/news/end/{self.process}", json.dumps([self.process, status, why]))

    def news(self) -> tuple[bool, End | None]:
        """Whether a process was asked to end, and the end of one of them. Raises RuntimeError without process 0."""
        found = dict(self._client.key_value_dir_get("dl_jax/news/"))
        ends = [End(*json.loads(words)) for key, words in sorted(found.items()) if "/end/" in key]
        return "dl_jax/news/asked" in found, ends[0] if ends else None


def says_gone(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, is in JAX's words for another process that has ended."""
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    return any(word in str(each) for each in causes for word in GONE)


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, {"config": {"steps": 3}} as {"config steps": 3}."""
    out: dict[str, Any] = {}
    for name, value in facts.items():
        out |= flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def differing(found: Sequence[Mapping[str, Any]]) -> str:
    """What differs between the facts of process 0, 1 ...: "config steps is 3 on process 0 and 4 on process 1"."""
    first, lines = found[0], []
    for name in sorted({name for facts in found for name in facts}):
        others = [p for p, facts in enumerate(found) if facts.get(name) != first.get(name)]
        if others:
            there, more = found[others[0]].get(name, "not set"), f" (and {len(others) - 1} more)" * (len(others) > 1)
            lines.append(
                f"{name} is {first.get(name, 'not set')} on process 0 and {there} on process {others[0]}{more}"
            )
    return "; ".join([*lines[:SHOWN], *(["..."] if len(lines) > SHOWN else [])])
