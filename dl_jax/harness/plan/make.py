"""`--plan SLICE`: compiles the programs of an experiment for a slice that is not there, and prints what they cost."""

import collections
import concurrent.futures
import hashlib
import importlib.util
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dl_jax.core.errors import InputError, one_line, reason
from dl_jax.core.files import absolute
from dl_jax.core.flops import flops
from dl_jax.core.target import Program, Target, planning
from dl_jax.harness.plan import bounds, hlo
from dl_jax.harness.plan.chips import GPUS, Slice
from dl_jax.harness.plan.show import MB, Cost, Loop, Row, lines
from dl_jax.harness.workdir import require_writable, write_json

STACK = 2**29  # bytes, of which only what is used takes memory


def devices_of(where: Slice) -> list[Any]:
    """The devices of the slice, for which this machine can compile.

    Raises InputError where the compiler is not installed, or does not know the slice.
    """
    jax.config.update("jax_platforms", "cpu")
    of = _gpus if where.kind in GPUS else _tpus
    try:
        devices = list(of(where).devices)
    except InputError:
        raise
    except Exception as error:  # JAX's own types, of which the documentation says nothing
        raise InputError(f"--plan {where.name} is refused by the compiler ({reason(error)}); choose another") from error
    assert len(devices) == where.chips
    return devices


def _tpus(where: Slice) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--plan {where.name} needs libtpu, which is not installed; pip install -e '.[tpu]'")
    # There is no TPU to ask: libtpu would wait for the metadata server of a virtual machine, and complain.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    levels = {"TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in {**quiet, **levels}.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    whole = where.shape == (2, 4)  # the one slice whose host has eight chips
    host = where.shape if whole else [min(extent, 2) for extent in where.shape[:2]]
    more: dict[str, Any] = {"chips_per_host_bounds": [*host, 1]}
    if where.kind == "v4":
        more["chip_config_name"] = "megacore"  # JAX sees both cores of a chip as one device
    return topologies.get_topology_desc(platform="tpu", topology_name=where.name, **more)


def _gpus(where: Slice) -> Any:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise InputError(
            f"--plan {where.name} needs JAX's CUDA plugin, which is not installed; pip install -e '.[cuda]'"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it asks the driver, which need not be there
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    shape = f"1x1x{where.chips}"  # slices, hosts, devices of a host
    return topologies.get_topology_desc(
        platform="cuda", topology_name=where.name, topology=shape, target_config=GPUS[where.kind]
    )


def make(main: Callable[[], Any], where: Slice, workdir: str | None, facts: Mapping[str, Any]) -> bool:
    """Plans what `main` would run, prints it, and writes plan.json to the work folder if there is one.

    `facts` are written beside the rows. The result is whether all of `main` was planned, and no program refused.
    """
    if workdir:
        require_writable(epath.Path(absolute(workdir)), workdir)  # before minutes of compilation
    devices, rows = devices_of(where), {}
    times: collections.Counter[str] = collections.Counter()
    hosts = len({device.process_index for device in devices})
    print(f"{where.name}: {where.chips} chips of {where.chip.hbm / MB:,.0f} MB; rates are peaks, times are least times")

    def take(program: Program) -> None:
        lowered = program.traced.lower(lowering_platforms=("cuda" if where.kind in GPUS else "tpu",))
        key = hashlib.sha256(f"{program.mesh}{lowered.as_text()}".encode()).hexdigest()
        if key not in rows:
            rows[key] = row_of(program, lowered, where, hosts)
            print("\n".join(lines(rows[key], where)), flush=True)
        times[key] += 1

    problem = None
    with planning(Target(devices, where.chip.hbm, take)), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of numbers that are made up
        try:
            main()
        except InputError:
            raise
        except Exception as error:  # of what an experiment does with made-up numbers
            problem = one_line(f"{type(error).__name__}: {error}")
    repeated = ", ".join(f"{rows[key].name} {n} times" for key, n in times.items() if n > 1)
    if repeated:
        print(f"equal programs are shown once: {repeated}")
    if problem:
        last = [row.name for row in rows.values()][-1:] or ["the start"]
        print(f"what comes after {last[0]} was not planned: {problem}")
    if workdir:
        folder = epath.Path(absolute(workdir))
        found = [{**_plain(row), "times": times[key]} for key, row in rows.items()]
        write_json(folder / "plan.json", {**facts, "slice": where.name, "chips": where.chips, "programs": found})
    return problem is None and not any(row.refused for row in rows.values())


def _plain(value: Any) -> Any:
    """Named tuples as dicts, for JSON."""
    if hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def row_of(program: Program, lowered: Any, where: Slice, hosts: int) -> Row:
    """Compiles a program and reads what it does."""
    mesh, feed = program.mesh, program.feed
    chips = mesh.devices.size
    began, compiled, refused = time.perf_counter(), None, None
    try:
        compiled = _on_a_large_stack(lowered.compile)
    except jax.errors.JaxRuntimeError as error:
        refused = reason(error)
    shape = mesh.devices.shape[0], mesh.devices.shape[1]
    row = Row(program.name, shape, chips % hosts != 0, time.perf_counter() - began, refused)
    if compiled is None:
        return row
    found, size = hlo.read(compiled.as_text(), chips), compiled.memory_analysis()
    memory = {
        "arguments": size.argument_size_in_bytes,
        "results": size.output_size_in_bytes - size.alias_size_in_bytes,  # what is updated in place counts once
        "temporaries": size.temp_size_in_bytes,
        "program": size.generated_code_size_in_bytes,
    }
    shared = chips if not feed or feed.batch_size else 1  # every chip computes all of a batch that is not a stream's
    cost = Cost(memory, flops(program.traced.jaxpr) / shared, found.bytes, found.collectives, found.callbacks)
    if not feed:
        return row._replace(cost=cost)
    least = bounds.bounds(
        where,
        flops=cost.flops,
        moved=cost.bytes,
        sent=cost.collectives,
        steps=feed.steps,
        reading=feed.seconds / min(hosts, chips),
    )
    worth = feed.batch_size and bounds.worthwhile_batch(least, feed.batch_size, mesh.devices.shape[1])
    in_place = found.in_place / state_bytes(feed.state)
    return row._replace(cost=cost, loop=Loop(feed.steps, feed.batch_size, in_place, least, worth))


def _on_a_large_stack(call: Callable[[], Any]) -> Any:
    """What `call` returns, in a thread of its own: libtpu's recursion over large programs ended at the usual 8 MB."""
    usual = threading.stack_size(STACK)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()
    finally:
        threading.stack_size(usual)


def state_bytes(state: Any) -> int:
    """The bytes of a state's numbers on one chip, without the padding of their layout."""
    share = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(share, jax.tree.leaves(state)))
