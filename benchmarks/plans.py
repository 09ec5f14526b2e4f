"""Plans every experiment for TPU slices that need not be there, and prints the table of docs/scale.md.

    python benchmarks/plans.py                          an hour and a half on one core, mostly for the ResNets; needs
                                                        pip install -e '.[tpu]' and the prepared sets
    python benchmarks/plans.py --write                  also puts each into the table of docs/scale.md
    python benchmarks/plans.py --write vision/depth.py  plans this experiment alone and keeps the other rows

A row is a program that a fit compiles, below the command and the commit. Equal programs of an experiment are one row.
ImageNet need not be prepared: a few generated images of its size stand for it.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.input import prepare

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
MARKS = ("<!-- plans: begin -->\n", "<!-- plans: end -->\n")
SMALL, LARGE, LARGEST = "v5e:4x4", "v6e:16x16", "v5p:8x8x8"
IMAGENET = "vision/imagenet_resnet.py"
MORE = {  # a set of the same shape in place of one that is not prepared; one seed of what fills a slice
    "vision/cifar_resnet.py": " --dataset cifar10_jpeg",
    IMAGENET: " --seeds 1",
}
ON_LARGE = (
    "generative/vae_mnist.py --batch-size 20480",
    "compression/prune_lenet.py --batch-size 20480",
    "vision/lenet.py --batch-size 20480",
)


def commands() -> list[str]:
    """What follows `python experiments/`, for each plan."""
    every = sorted(str(path.relative_to(ROOT / "experiments")) for path in (ROOT / "experiments").rglob("*.py"))
    small = [f"{script} --preset paper{MORE.get(script, '')} --plan {SMALL}" for script in every]
    script = lambda line: line.split()[0]
    large = [f"{script(line)} --preset paper{line.removeprefix(script(line))} --plan {LARGE}" for line in ON_LARGE]
    return small + large + [f"{IMAGENET} --preset large --seeds 1 --plan {slice}" for slice in (LARGE, LARGEST)]


def planned(command: str, folder: Path) -> list[dict[str, Any]]:
    """The programs of a plan. Raises CalledProcessError, after its output, where it fails."""
    data = ""
    if command.startswith(IMAGENET):
        prepare(str(folder / "data"), 100)
        data = f"--dataset smooth --test-split train --data-dir {folder / 'data'} --cache-dir {folder / 'cache'}"
    words = [sys.executable, *f"experiments/{command} --workdir {folder / 'plan'} {data}".split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()
    return json.loads((folder / "plan" / "plan.json").read_text())["programs"]


def rows(programs: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table."""
    for each in programs:
        if each["loop"]:
            yield row(each)


def row(each: Mapping[str, Any]) -> str:
    cost, loop = each["cost"], each["loop"]
    if cost is None:
        return f"| {each['name']} | refused: {each['refused']} ||||||||\n"
    steps, least = loop["steps"], loop["bounds"]
    sent = sum(c["bytes"] * c["times"] for c in cost["collectives"]) / steps
    longest = sorted(least, key=least.__getitem__, reverse=True)
    binding = longest[: 2 if longest[0] == "input" else 1]  # the input depends on the machine that plans
    worth = f"{loop['worthwhile_batch']:,}" if loop["worthwhile_batch"] else ""
    cells = (
        each["name"] or "fit",
        f"{each['mesh'][0]} × {each['mesh'][1]}",
        f"{steps}",
        f"{sum(cost['memory'].values()) / 1e6:,.0f}",
        f"{cost['flops'] / steps / 1e6:,.0f}",
        f"{cost['bytes'] / steps / 1e6:,.2f}",
        f"{sent / 1e6:,.2f}",
        "; ".join(f"{rate(1 / least[name])}, {name}" for name in binding),
        f"{loop['batch_size']:,} / {worth}",
    )
    return f"| {' | '.join(cells)} |\n"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


HEADER = """| fit | seeds × rows | steps/call | MB | MFLOP | MB moved | MB sent | steps/s, by | batch / worth it from |
|---|---|---|---|---|---|---|---|---|
"""


def made_by() -> str:
    """The commit and the versions on which the numbers depend."""
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    return f"{commit.stdout.strip()}{' with changes' * bool(changed.stdout)}, {packages}"


def parts(page: str) -> dict[str, str]:
    """The table in the page, as {command: its lines, with the heading}."""
    found: dict[str, str] = {}
    for line in page.split(MARKS[0])[1].split(MARKS[1])[0].splitlines(keepends=True):
        if heading := re.match(r"\| `([^`]*)`", line):
            found[heading[1]] = ""
        if found:
            found[[*found][-1]] += line
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help="files below experiments/; default: all")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    asked = parser.parse_args()
    known, by = commands(), made_by()
    if unknown := {*asked.experiments} - {command.split()[0] for command in known}:
        parser.error(f"{', '.join(sorted(unknown))}: expected files below experiments/, such as vision/lenet.py")
    wanted = [each for each in known if not asked.experiments or each.split()[0] in asked.experiments]
    for number, command in enumerate(wanted, 1):
        print(f"{number}/{len(wanted)} {command}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = "".join(rows(planned(command, Path(folder))))
        lines = f"| `{command}`, {by} |||||||||\n{found}"
        print(lines, flush=True)
        if asked.write:
            renew(command, lines, known)


def renew(command: str, lines: str, known: Sequence[str]) -> None:
    """Puts the lines of a command into the page. Lines of commands that are no longer known are left out."""
    page = PAGE.read_text()
    table = {**parts(page), command: lines}
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    ordered = "".join(table[each] for each in known if each in table)
    PAGE.write_text(f"{before}{MARKS[0]}{HEADER}{ordered}{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
