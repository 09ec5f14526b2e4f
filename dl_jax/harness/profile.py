"""A trace of some steps, for TensorBoard's profile page and Perfetto."""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

import jax
from etils import epath

from dl_jax.core.errors import InputError, spared
from dl_jax.core.files import write_whole


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
        self._before = self._until = 0

    def begin(self, step: int) -> None:
        """Is called with the step at which a fit begins."""
        self._before = step
        self._start_if(self._first - 1 <= step < self._last)

    def stepped(self, step: int) -> None:
        """Is called after each call of the program. If a call has jumped over the first step, the next is traced."""
        before, self._before = self._before, step
        if self._folder:
            if step >= max(self._last, self._until) + 2 * (step - before):  # a call still runs when the next is made
                self.close()
        else:
            self._start_if(before < self._first - 1 <= step)

    def _start_if(self, due: bool) -> None:
        if due and not self._done:
            self._until = self._before + 1
            with spared("the trace cannot be begun", "none is written", Exception):
                folder = tempfile.mkdtemp()
                jax.profiler.start_trace(folder)
                self._folder = folder

    def close(self) -> None:
        """Writes the trace under way, if there is one."""
        if not self._folder:
            return
        folder, self._folder, self._done = self._folder, None, True
        with spared(f"the trace cannot be written to {self._target}", "it is lost", Exception):
            jax.profiler.stop_trace()
            for file in Path(folder).rglob("*"):  # XLA writes to local folders only
                if file.is_file():
                    write_whole(self._target / file.relative_to(folder).as_posix(), file.read_bytes())
        shutil.rmtree(folder, ignore_errors=True)

    def end(self) -> None:
        """Is called at the end of the run. Warns where no fit came to the steps."""
        self.close()
        if not self._done:
            warnings.warn(f"no fit took the steps {self._first} to {self._last}, so none was profiled", stacklevel=2)
