"""What serving a file over HTTP costs, and what it withstands.

    python benchmarks/serve.py --write           on a quiet machine, some ten minutes on 2 cores; into docs/serve.txt
    python benchmarks/serve.py --quick           to see that it runs
    python benchmarks/serve.py --files FOLDER    with teacher.onnx and int8.onnx of the pipeline, and their records

Caffe's LeNet-5 learns the bundled digits for some steps, and is exported in floats and in 8-bit integers as
`experiments/compression/pipeline.py` does it. Each file is served by a process of its own, with the defaults (batching
on) and with `--batch 1 --wait 0` (off), and asked for one PNG image a request.

- **Rates.** Clients in one other process each send the next request when the last one is answered, over connections
  that stay open. Their number is doubled up to `--concurrency`. The largest rate at which 95 % of the requests are
  answered within 50 ms counts. One client alone is compared with a loop that calls ONNX Runtime with one thread and an
  array. "Server" and "client" are the CPU time of each process for a request: both share the machine.
- **Memory.** The server's resident memory after every thousand requests, and how much it grows in their second half,
  by the line of least squares.
- **Restarts.** While clients ask, another file takes the place of the served one; then SIGTERM ends the server, and as
  soon as it has ended another one is started at the same port. A client that gets no answer waits for two seconds, and
  asks once more. An answer is lost if this fails too, or if its status is not 200.
- **Malformed requests.** Hypothesis draws methods, addresses, headers and bodies, among them damaged images, and bytes
  that are no HTTP. None may get a status of 500 or above, or leave a traceback in the server's output, and afterwards a
  good request is answered.
"""

import argparse
import asyncio
import contextlib
import functools
import importlib.metadata
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.serve_clients import Load, client, closed, load, messages, repeated
from benchmarks.serve_malformed import drawn, malformed
from benchmarks.serve_process import PATIENCE, Server, complaints, end, serving, started

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serve.txt"
FILES = {"float": "teacher.onnx", "int8": "int8.onnx"}  # as the pipeline calls them
BATCHING: Mapping[str, tuple[str, ...]] = {"on": (), "off": ("--batch", "1", "--wait", "0")}
CLIENTS = (1, 2, 4, 8, 16, 32, 64)  # the last: --concurrency of the server
WITHIN = 50.0  # ms in which 95 % of the requests have to be answered
OVERHEAD, GROWTH = 2.0, 1.0  # goals: ms at the median, MiB in the second half of the requests
PAUSE = 2.0  # seconds before a client asks once more
SENDERS = 8  # clients where the rate is not measured


class Sizes(NamedTuple):
    """How much is done."""

    steps: int  # train steps of the network
    clients: tuple[int, ...]
    requests: int  # for each number of clients, and calls of the bare loop
    remembered: int  # requests between the first and the last look at the memory
    every: int  # requests between two looks
    seconds: float  # for which clients ask before and after a restart
    malformed: int


FULL = Sizes(300, CLIENTS, 4000, 100_000, 1000, 3.0, 5000)
QUICK = Sizes(5, (1, 8), 100, 400, 50, 0.5, 100)


class Rate(NamedTuple):
    """A number of clients."""

    clients: int
    rate: float  # requests a second
    p50: float  # ms
    p95: float
    server: float  # µs of CPU time for a request
    client: float


async def rates(server: Server, some: Sequence[bytes], sizes: Sizes) -> list[Rate]:
    """For each number of clients, up to the first that has to wait for too long."""
    await load(server.port, repeated(some, sizes.requests // 10), 1)
    found: list[Rate] = []
    for clients in sizes.clients:
        before, own, began = server.cpu(), time.process_time(), time.perf_counter()
        seen = await load(server.port, repeated(some, sizes.requests), clients)
        seconds, used = time.perf_counter() - began, (server.cpu() - before, time.process_time() - own)
        if seen.wrong:
            raise RuntimeError(f"{seen.wrong} of {sizes.requests} requests of {clients} clients were not answered")
        cost = [1e6 * each / sizes.requests for each in used]
        found.append(Rate(clients, sizes.requests / seconds, seen.milliseconds(50), seen.milliseconds(95), *cost))
        if found[-1].p95 > WITHIN:
            break
    return found


def best(found: Sequence[Rate]) -> Rate | None:
    """The largest rate at which 95 % of the requests are answered in time."""
    return max((each for each in found if each.p95 <= WITHIN), key=lambda each: each.rate, default=None)


def bare(file: Path, calls: int) -> Rate:
    """A loop that calls ONNX Runtime with one image."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    taken = session.get_inputs()[0]
    feed = {taken.name: np.random.default_rng(0).random((1, *taken.shape[1:]), np.float32)}
    seconds, used = np.zeros(calls), time.process_time()
    for i in range(-calls // 10, calls):
        began = time.perf_counter()
        session.run(None, feed)
        seconds[max(i, 0)] = time.perf_counter() - began
    p50, p95 = 1000 * np.percentile(seconds, [50, 95])
    return Rate(1, calls / seconds.sum(), p50, p95, 1e6 * (time.process_time() - used) / (1.1 * calls), 0)


async def memory(server: Server, some: Sequence[bytes], requests: int, every: int) -> list[float]:
    """MiB of the server after each `every` requests."""
    found = []
    for _ in range(requests // every):
        seen = await load(server.port, repeated(some, every), SENDERS)
        if seen.wrong:
            raise RuntimeError(f"{seen.wrong} of {every} requests were not answered")
        found.append(server.mebibytes())
    return found


def growth(held: Sequence[float]) -> float:
    """By how much the second half grows, by the line of least squares."""
    half = np.array(held[len(held) // 2 :])
    return float(np.polyfit(np.arange(len(half)), half, 1)[0] * (len(half) - 1))


@contextlib.asynccontextmanager
async def asking(port: int, some: Sequence[bytes], seconds: float) -> AsyncIterator[Load]:
    """A context within which clients ask, also for `seconds` before it begins and after it has ended."""
    found, over = Load(), asyncio.Event()
    shared = itertools.takewhile(lambda _: not over.is_set(), itertools.cycle(some))
    tasks = [asyncio.create_task(client(port, shared, found, PAUSE)) for _ in range(SENDERS)]
    try:
        await asyncio.sleep(seconds)
        yield found
        await asyncio.sleep(seconds)
    finally:
        over.set()
        await asyncio.gather(*tasks)


def put(file: Path, place: Path) -> None:
    """Replaces `place` and its record by `file` and its own, the record last."""
    for ending in ("", ".json"):
        shutil.copy(f"{file}{ending}", f"{place}{ending}.new")
        os.replace(f"{place}{ending}.new", f"{place}{ending}")


async def takeover(server: Server, some: Sequence[bytes], new: Path, place: Path, seconds: float) -> Load:
    """What clients saw while `new` took the place of the file."""
    async with asking(server.port, some, seconds) as found:
        put(new, place)
        until = time.monotonic() + PATIENCE
        while len(found.versions) < 2:
            if time.monotonic() > until:
                raise RuntimeError(f"the new file was not taken over: {server.log.read_text()}")
            await asyncio.sleep(0.05)
    return found


async def restart(server: Server, some: Sequence[bytes], file: Path, seconds: float) -> tuple[Load, float]:
    """What clients saw while another process took the place of the server.

    Also the seconds from the signal until the new process takes connections. It is started once the old one has ended.
    """
    async with asking(server.port, some, seconds) as found:
        began = time.monotonic()
        await asyncio.to_thread(end, server)
        log = server.log.with_suffix(".second")
        starting = asyncio.create_task(asyncio.to_thread(started, file, log, (), server.port))
        gap = await _connected(server.port) - began
        later = await starting
    end(later)
    return found, gap


async def _connected(port: int) -> float:
    """When a connection was made. Raises TimeoutError where none can be."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(OSError):
                closed(await asyncio.open_connection("127.0.0.1", port))
                return time.monotonic()
            await asyncio.sleep(0.01)


class Goal(NamedTuple):
    """A line of the second table."""

    what: str
    measured: float
    most: float


class Found(NamedTuple):
    """What was measured."""

    rows: list[tuple[str, ...]]  # of the table of rates
    notes: list[str]
    goals: list[Goal]


def speed(files: Mapping[str, Path], folder: Path, sizes: Sizes) -> Found:
    """The rates of each file, with batching and without."""
    note = f"Of a server: one client, and the largest rate at which 95 % of the answers take at most {WITHIN:g} ms."
    found = Found([], [note], [])
    for name, file in files.items():
        alone = bare(file, sizes.requests)
        found.rows.append((name, "bare loop", *cells(alone)))
        for batching, flags in BATCHING.items():
            with serving(file, folder / "log", flags) as server:
                seen = asyncio.run(rates(server, messages(file), sizes))
            one, most = seen[0], best(seen)
            found.rows.extend(
                (name, f"batching {batching}", *cells(each)) for each in dict.fromkeys((one, most)) if each
            )
            what = f"{name}, batching {batching}: median of one client less that of the bare loop, ms"
            found.goals.append(Goal(what, one.p50 - alone.p50, OVERHEAD))
    return found


def strange(file: Path, folder: Path, sizes: Sizes) -> Found:
    """What malformed requests do."""
    some = messages(file)
    with serving(file, folder / "log") as server:
        statuses = asyncio.run(malformed(server.port, drawn(sizes.malformed, some), PATIENCE))
        after = asyncio.run(load(server.port, some, 1))
    told = ", ".join(f"{n:,} with {status}" for status, n in sorted(statuses.items()))
    failed = sum(n for status, n in statuses.items() if status.startswith("5"))
    goals = [
        Goal("malformed requests: statuses of 500 and above", failed, 0),
        Goal("malformed requests: tracebacks and errors in the output", complaints(server), 0),
        Goal("good requests after them: lost answers", after.wrong, 0),
    ]
    return Found([], [f"{statuses.total():,} malformed requests: {told}"], goals)


def lasting(files: Mapping[str, Path], folder: Path, sizes: Sizes) -> Found:
    """Memory over many requests, and restarts."""
    place, some = folder / "served.onnx", messages(files["float"])
    put(files["float"], place)
    with serving(place, folder / "log") as server:
        held = asyncio.run(memory(server, some, sizes.remembered, sizes.every))
        swapped = asyncio.run(takeover(server, some, files["int8"], place, sizes.seconds))
        restarted, gap = asyncio.run(restart(server, some, place, sizes.seconds))
    goals = [
        Goal(f"memory: growth in the second half of {sizes.remembered:,} requests, MiB", growth(held), GROWTH),
        Goal(f"a new file: lost of {swapped.requests:,} answers", swapped.wrong, 0),
        Goal(f"SIGTERM and a new process: lost of {restarted.requests:,} answers", restarted.wrong, 0),
    ]
    again = restarted.again
    notes = [
        f"Memory of the server: {held[0]:.1f} MiB after {sizes.every:,} requests, {held[-1]:.1f} MiB after the last.",
        f"A new file: {swapped.again} requests were sent once more.",
        f"SIGTERM and a new process: {again} requests were sent once more; {gap:.2f} s from one to the other.",
    ]
    return Found([], notes, goals)


def made(folder: Path, steps: int) -> None:
    """Trains a network for some steps, and writes its files and their records as the pipeline does."""
    import jax

    from benchmarks import compressed
    from dl_jax import data
    from dl_jax.compress import fold, quantize
    from dl_jax.export import onnx, record

    model, train = compressed.NETWORKS["LeNet-Caffe"], data.grey_images("digits", "train")
    calibration = compressed.scaled(train, compressed.CALIBRATION)
    variables = jax.jit(lambda key: model.init(key, calibration[:1], train=False))(jax.random.key(0))
    variables = compressed.trained(model.apply, variables, data.shuffled(train, 100, 0), compressed.RATE, steps)
    apply, tree = fold.folded(model.apply, variables, calibration[:1], train=False)
    predict = functools.partial(apply, train=False)
    rounded, integers = quantize.after_training(predict, tree, [(calibration,)], compressed.WEIGHT_BITS)
    for name, function, parameters, tolerance in (("float", predict, tree, 1e-4), ("int8", rounded, integers, 0.2)):
        path = folder / FILES[name]
        onnx.export(function, parameters, [calibration[:8]], path, tolerance=tolerance)
        digits = [str(i) for i in range(10)]
        record.write(path, onnx.load(path, 1), [(calibration,)], request=record.Image(), classes=digits)


HEADER = ("file", "served by", "clients", "requests/s", "p50, ms", "p95, ms", "server, µs", "client, µs")


def cells(found: Rate) -> tuple[str, ...]:
    return (
        *(str(found.clients), f"{found.rate:,.0f}", f"{found.p50:.2f}", f"{found.p95:.2f}"),
        *(f"{found.server:,.0f}", f"{found.client:,.0f}"),
    )


def aligned(rows: Sequence[Sequence[str]], texts: int) -> Iterator[str]:
    """The lines of a table; the first `texts` columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for each in rows:
        cells = (f"{cell:{'<' if i < texts else '>'}{widths[i]}}" for i, cell in enumerate(each))
        yield "  ".join(cells).rstrip()


def report(of: str, parts: Sequence[Found], heading: Sequence[str]) -> str:
    rates = [row for part in parts for row in part.rows]
    goals = [goal for part in parts for goal in part.goals]
    compared = [("", "measured", "goal"), *((each.what, f"{each.measured:.2f}", f"<= {each.most:g}") for each in goals)]
    notes = [note for part in parts for note in part.notes]
    lines = [*heading, of, "", *aligned([HEADER, *rates], 2), "", *notes, "", *aligned(compared, 1)]
    return "\n".join(lines) + "\n"


def main() -> None:
    from dl_jax.harness.machine import git_state, processor, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests")
    parser.add_argument("--files", type=Path, help=f"a folder with {' and '.join(FILES.values())}, and their records")
    parser.add_argument("--write", action="store_true", help=f"put the output into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    sizes, code, before = QUICK if given.quick else FULL, git_state(ROOT), os.getloadavg()[0]
    used = {name: importlib.metadata.version(name) for name in ("onnxruntime", "fastapi", "uvicorn", "hypothesis")}
    heading = [
        f"{len(os.sched_getaffinity(0))} cores of {processor()}, load average {before:.1f} before the start",
        f"commit {code['commit']}{'' if code['clean'] else ' with uncommitted changes'}",
        ", ".join(f"{name} {version}" for name, version in {**versions(), **used}.items()),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not given.files:
            made(folder, sizes.steps)
        files = {name: (given.files or folder) / file for name, file in FILES.items()}
        of = ", ".join(f"{name}: {path.stat().st_size / 1000:,.1f} kB" for name, path in files.items())
        parts = [
            speed(files, folder, sizes),
            strange(files["float"], folder, sizes),
            lasting(files, folder, sizes),
        ]
    text = report(of, parts, heading)
    print(text, end="")
    if given.write:
        PAGE.write_text(text)
    sys.exit(any(goal.measured > goal.most for part in parts for goal in part.goals))


if __name__ == "__main__":
    main()
