"""Runs Python commands one after the other in one process, which imports JAX once: `follow.py COMMAND...`.

Each is run as from a shell in this folder. Ends with the first status that is neither 0 nor that of a missed claim.
"""

import runpy
import shlex
import sys

import pytest

from dl_jax.harness.launch import CLAIM_MISSED


def run(command: str) -> int:
    """The exit status of `python SCRIPT ...`, `python -m MODULE ...` or `python -m pytest ...`."""
    _, *words = shlex.split(command)
    if words[:2] == ["-m", "pytest"]:
        return int(pytest.main([*words[2:], "-W", "ignore::pytest.PytestAssertRewriteWarning"]))  # of what is imported
    sys.argv = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, ".")
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


for command in sys.argv[1:]:
    print(f"$ {command}", flush=True)
    status = run(command)
    if status not in (0, CLAIM_MISSED):
        print(f"status {status}: {command}", file=sys.stderr)
        sys.exit(status)
