"""The text of a plan."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dl_jax.harness.plan import bounds, hlo
from dl_jax.harness.plan.chips import GPUS, Slice

MB = 1e6
# Of the bounds, on TPUs and on GPUs.
NAMES = {"mxu": "MXU", "hbm": "HBM", "ici": "ICI", "host": "host loop", "input": "input"}
GPU_NAMES = {**NAMES, "mxu": "tensor cores", "ici": "NVLink"}


class Cost(NamedTuple):
    """What a call of a program takes on one chip."""

    memory: Mapping[str, int]  # bytes: arguments, results, temporaries, program
    flops: float
    bytes: float  # read and written in main memory
    collectives: Sequence[hlo.Collective]
    callbacks: int  # places where it calls the host


class Loop(NamedTuple):
    """What a fit does with a program."""

    steps: int  # of a call
    batch_size: int | None  # None where the stream does not say
    in_place: float  # share of the state's bytes that are updated where they lie
    bounds: bounds.Bounds
    worthwhile_batch: int | None


class Row(NamedTuple):
    """What is known of one program."""

    name: str
    mesh: tuple[int, int]  # seeds, rows
    uneven: bool  # whether hosts would have unequal parts of the batch
    compile_seconds: float
    refused: str | None = None  # why it could not be compiled, for example for lack of memory
    cost: Cost | None = None  # None where it was refused
    loop: Loop | None = None  # None for an evaluation


def lines(row: Row, where: Slice) -> Iterator[str]:
    """The text of a row, line by line."""
    used, steps = row.mesh[0] * row.mesh[1], row.loop.steps if row.loop else 1
    idle = f", {where.chips - used} stand idle" if used < where.chips else ""
    call = f", {steps} steps a call" if steps > 1 else ""
    split = f"{row.mesh[0]} x {row.mesh[1]} (seeds x rows) on {used} of {where.chips} chips{idle}"
    yield f"\n{row.name or 'fit'}: {split}{call}; compiled in {row.compile_seconds:.0f} s"
    if row.uneven:
        yield "  as a run    it is refused: the batch has no equal part for each host; change --batch-size or --seeds"
    if not row.cost:
        yield f"  refused     {row.refused}"
        return
    cost, whole, taken = row.cost, where.chip.hbm, sum(row.cost.memory.values())
    parts = ", ".join(f"{name} {size / MB:,.1f}" for name, size in cost.memory.items())
    yield f"  memory      {taken / MB:,.1f} of {whole / MB:,.0f} MB a chip ({taken / whole:.1%}): {parts}"
    work = f"{cost.flops / steps / MB:,.1f} MFLOP and {cost.bytes / steps / MB:,.2f} MB a chip"
    yield f"  {'a step' if row.loop else 'a batch':<10}  {work}; {sends(cost, steps)}"
    callbacks = f"{cost.callbacks or 'no'} callbacks of the host"
    if not row.loop:
        yield f"  otherwise   {callbacks}"
        return
    loop = row.loop
    yield f"  otherwise   {loop.in_place:.1%} of the state updated in place, {callbacks}"
    names = GPU_NAMES if where.kind in GPUS else NAMES
    shown = ", ".join(f"{names[name]} {1e6 * seconds:,.1f}" for name, seconds in loop.bounds._asdict().items())
    rate = f"{names[loop.bounds.binding]} binds, at most {loop.bounds.steps_per_second:,.0f} steps/s"
    yield f"  at least    {shown} us -> {rate}"
    if loop.batch_size:
        worth = f"from a batch of {loop.worthwhile_batch:,} rows" if loop.worthwhile_batch else "never: no products"
        yield f"  worth it    {worth} (here {loop.batch_size:,})"


def sends(cost: Cost, steps: int) -> str:
    """The collective operations of a step, by kind and by how many chips take part."""
    kinds: dict[tuple[str, int], list[hlo.Collective]] = {}
    for each in cost.collectives:
        kinds.setdefault((each.kind, each.devices), []).append(each)
    shown = []
    for (kind, chips), alike in kinds.items():
        times = sum(each.times for each in alike) / steps
        size = sum(each.times * each.bytes for each in alike) / steps
        shown.append(f"{times:.3g} {kind} of {size / MB:,.2f} MB over {chips} chips")
    return "; ".join(shown) or "nothing between chips"
