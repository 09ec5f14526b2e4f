"""A trace of some steps, for TensorBoard's profile page and Perfetto."""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

import jax
from etils import epath

from dl_jax.core.errors import InputError


class Profile:
    """Writes a trace of steps `first` to `last` of the first fit that comes to them, in the folder `profile`.

    The first process writes it. Raises InputError unless `steps` is "FIRST..LAST" with 1 <= FIRST <= LAST.
    """

    def __init__(self, steps: str, directory: epath.Path) -> None:
        found = re.fullmatch(r"(\d+)\.\.(\d+)", steps)
        self._first, self._last = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= self._first <= self._last:
            raise InputError(f"--profile {steps}, expected the first and the last step, such as 10..15; give them so")
        self._target = directory / "profile"
        self._folder: str | None = None  # where the trace under way is written
        self._done = jax.process_index() != 0
        self._before = 0

    def stepped(self, step: int) -> None:
        """Is called with the step at which a fit begins, and after each call of the program."""
        stride, self._before = max(step - self._before, 1), step
        if self._folder:
            if step >= self._last + 2 * stride:  # a call is still running when the next one is made
                self.close()
        elif not self._done and self._first - 1 <= step < self._last:
            self._folder = tempfile.mkdtemp()
            jax.profiler.start_trace(self._folder)

    def close(self) -> None:
        """Writes the trace under way, if there is one."""
        if not self._folder:
            return
        folder, self._folder, self._done = self._folder, None, True
        jax.profiler.stop_trace()
        try:
            for file in Path(folder).rglob("*"):  # XLA writes to local folders only
                if file.is_file():
                    target = self._target / file.relative_to(folder).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def end(self) -> None:
        """Is called at the end of the run. Warns where no fit came to the steps."""
        self.close()
        if not self._done:
            warnings.warn(f"no fit took the steps {self._first} to {self._last}, so none was profiled", stacklevel=2)
