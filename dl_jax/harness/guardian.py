"""A process of its own that kills the one that started it when this has fallen silent.

    python -I -S guardian.py SECONDS

A process that is frozen, or hangs while it holds Python's lock, can run none of its own threads. It writes a byte to
this one's stdin several times a second; after SECONDS without one it is killed, so that the other processes of its run,
which have stopped hearing from it, are not all that ends. It ends when stdin is closed.
"""

import os
import select
import signal
import sys


def main(patience: float) -> None:
    parent = os.getppid()
    while select.select([0], [], [], patience)[0]:
        if not os.read(0, 4096):
            return  # the other has ended
    if os.getppid() == parent:
        os.write(2, f"error: process {parent} was silent for {patience:g} s and is killed\n".encode())
        os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))
