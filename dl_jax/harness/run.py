"""A run records one fit and resumes it.

    <workdir>/[child/...]  metrics.jsonl · TensorBoard events · checkpoints/

Process 0 writes the text files; all processes take part in writing checkpoints.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from dl_jax.core import events
from dl_jax.core.errors import InputError, nearest, spared
from dl_jax.core.files import failures, write_whole
from dl_jax.core.recorder import Best, Measurements, Recorder, Snapshot
from dl_jax.harness.checkpoint.store import Checkpoints
from dl_jax.harness.profile import Profile
from dl_jax.harness.report.figures import figure_png, sheet_png
from dl_jax.harness.report.terminal import Progress
from dl_jax.harness.report.writers import JsonLines, TensorBoard, read_lines
from dl_jax.harness.workdir import BOOKKEEPING, LOCKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SEEDS = 2**32
OWN = (*BOOKKEEPING, "metrics.jsonl", "checkpoints", "profile", *LOCKS)  # names that `keep` refuses
PREEMPTED = 143  # 128 + SIGTERM, so that a supervisor restarts the run


class Preempted(SystemExit):
    """The run was asked to end by a signal. Its state has been saved, or it was not in a fit.

    `together` is whether all processes end so, at the same step.
    """

    def __init__(self, together: bool = False) -> None:
        super().__init__(PREEMPTED)
        self.together = together


def never(step: int) -> bool:
    """The default of `Settings.preempted`: never ends the run."""
    return False


def alone(facts: Mapping[str, Any]) -> None:
    """The default of `Settings.agree`: there is no other process."""


def unknown() -> dict[str, float]:
    """The default of `Settings.usage`: nothing is known."""
    return {}


def nothing() -> None:
    """The default of `Settings.saved`: nobody wants to know."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that a run and its children share."""

    seeds: tuple[int, ...] = (0,)
    skip_nonfinite: bool = False
    fsdp: bool = False
    checkpoint_every: int = 1000  # steps
    batch_size: int | None = None  # examples in a step
    preempted: Callable[[int], bool] = never  # after each step: whether to end, the same on all processes
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the run: see `harness.identity`
    read: Mapping[str, str] = dataclasses.field(default_factory=dict)  # data sets read so far: see `core.inputs`
    agree: Callable[[Mapping[str, Any]], None] = alone  # raises InputError where processes give other facts
    usage: Callable[[], dict[str, float]] = unknown  # goodput and memory, shown in TensorBoard
    saved: Callable[[], Any] = nothing  # is called at each checkpoint
    profile: Profile | None = None

    def __post_init__(self) -> None:
        """Raises InputError where there is no seed, a seed occurs twice, or one is outside [0, 2^32).

        JAX uses 32 bits of a seed, so a larger seed would give the same random numbers as a smaller one.
        """
        whole = lambda seed: isinstance(seed, int | np.integer) and not isinstance(seed, bool)
        wrong = [seed for seed in self.seeds if not (whole(seed) and 0 <= seed < MOST_SEEDS)]
        if wrong:
            raise InputError(f"seed {wrong[0]!r}, expected 0 to {MOST_SEEDS - 1}; use a --seed in that range")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds {self.seeds}, expected one or more, each once; give different numbers")


class Run(Recorder):
    """The record of one fit. A script with several fits gives each a child run: `fit(..., run=run / "teacher")`.

    Without a directory it shows the progress and keeps nothing.
    """

    def __init__(self, directory: epath.Path | None = None, settings: Settings = Settings(), name: str = "") -> None:
        self.directory, self.settings, self.name = directory, settings, name
        self.skip_nonfinite, self.fsdp = settings.skip_nonfinite, settings.fsdp
        self._children: dict[str, Run] = {}
        self._checkpoints: Checkpoints | None = None
        self._board: TensorBoard | None = None
        self._lines: JsonLines | None = None
        self._progress: Progress | None = None
        self._reported: list[tuple[int, Mapping[str, Any]]] = []
        self._step = -1  # the last step reported to this run; -1 before the fit
        self._saved: int | None = None
        self._ending = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the run; results have one value for each, in this order."""
        return self.settings.seeds

    def keys(self, n: int) -> tuple[jax.Array, ...]:
        """n independent typed PRNG keys for each seed: n arrays [S]."""
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), n))(np.array(self.seeds))  # [S, n]
        return tuple(keys[:, i] for i in range(n))

    def __truediv__(self, name: str) -> "Run":
        """The child run of this name, whose folder is a subfolder of this run's."""
        if name not in self._children:
            directory = self.directory / name if self.directory else None
            self._children[name] = Run(directory, self.settings, f"{self.name}/{name}".lstrip("/"))
        return self._children[name]

    def owner(self) -> dict[str, Any]:
        """Whose the run's checkpoints are, in types that JSON preserves."""
        return json.loads(json.dumps({**self.settings.identity, "run": self.name, "data": dict(self.settings.read)}))

    def start(self, snapshot: Snapshot, steps: int, best: Best | None) -> Snapshot:
        """Restores the newest checkpoint in the run's folder, if there is one. Implements `Recorder.start`.

        Raises InputError where the processes of the run differ in what they are to do or in the data that they read.
        """
        if self._step >= 0:
            raise RuntimeError(f"run {self.name!r} already holds a fit; give each fit a child: run / 'name'")
        self.settings.agree({**self.owner(), "steps of the fit": steps})
        if self.directory:
            agree = None if self.settings.agree is alone else self._agree_on_state
            folder = str(self.directory / "checkpoints")
            with events.phase("restore"):
                self._checkpoints = Checkpoints(folder, best=best, owner=self.owner, agree=agree)
                restored = self._checkpoints.restore({"state": snapshot.state, "stop": snapshot.stop})
            if restored:
                self._saved, tree, note = restored
                snapshot = Snapshot(tree["state"], tree["stop"], note or {})
        self._step = self._saved or 0
        if self.settings.profile:
            self.settings.profile.begin(self._step)
        if self.directory:
            earlier = read_lines(self.directory / "metrics.jsonl", self._step)
            self._reported = [(record["step"], record) for record in earlier]
        if jax.process_index() == 0:
            self._progress = Progress(self.name or "train", self._step, steps, self.settings.batch_size)
            if self.directory:
                self._lines = JsonLines(self.directory / "metrics.jsonl", self._step)
                self._board = TensorBoard(self.directory, self._step, self.seeds)
        return snapshot

    def _agree_on_state(self, digests: Mapping[str, Any]) -> None:
        self.settings.agree({f"state of run {self.name!r} at step {self._step}": digests})

    def stepped(self, step: int) -> bool:
        """Shows the progress, and returns whether a checkpoint is due. Implements `Recorder.stepped`.

        Raises Preempted where the run has been asked to end and has no folder to save to.
        """
        before, self._step = self._step, step
        if self.settings.profile:
            self.settings.profile.stepped(step)
        if self._progress:
            self._progress.update(step)
        self._ending = self.settings.preempted(step)
        if not self._checkpoints:
            if self._ending:
                raise Preempted(together=True)
            return False
        every = self.settings.checkpoint_every
        return self._ending or step // every > before // every

    def save(self, step: int, snapshot: Snapshot, measured: Measurements) -> None:
        """Writes a checkpoint if the run has a folder. Implements `Recorder.save`.

        Raises Preempted, after the checkpoint is complete, where the run has been asked to end.
        """
        if not self._checkpoints:
            return
        if self._lines:
            self._lines.flush()
        if self._board:
            self._board.flush()
        scalars = {name: np.asarray(value).item() for name, value in measured.items() if np.size(value) == 1}
        tree = {"state": snapshot.state, "stop": snapshot.stop}
        with events.phase("save"):
            self._checkpoints.save(step, tree, scalars, note=snapshot.window)
            self._saved = step
            self.settings.saved()
            if self._ending:
                self._checkpoints.wait()
        if self._ending:
            raise Preempted(together=True)

    def report(self, step: int, metrics: Measurements) -> None:
        """Adds the metrics to the progress bar, metrics.jsonl and TensorBoard. Implements `Recorder.report`."""
        self._reported.append((step, metrics))
        if self._progress:
            self._progress.update(step, metrics)
        if self._lines:
            self._lines.write(step, metrics)
        if self._board:
            usage = self.settings.usage() if "steps_per_second" in metrics else {}  # once, not with measurements too
            self._board.scalars(step, {**metrics, **usage})

    def finish(self, step: int, snapshot: Snapshot) -> None:
        """Saves the last state and waits until it is written. Implements `Recorder.finish`.

        Raises Preempted where the run was asked to end meanwhile.
        """
        if self.settings.profile:
            self.settings.profile.close()
        if self._checkpoints:
            if self._saved != step:
                self.save(step, snapshot, {})
            with events.phase("save"):
                self._checkpoints.wait()
        if self.settings.preempted(step):
            raise Preempted(together=True)
        if self._progress:
            self._progress.close()
            self._progress = None

    def history(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All reported values of a metric: steps int [n] and values float64 [n], or [n, S] for S seeds.

        `name` is a metric of the train step, such as "loss", or "watch/" and a measurement of `Watch`. The values
        include those of earlier attempts at the same fit, and values that are not finite are NaN. Raises InputError
        where no value of that name was reported.
        """
        found = [(step, metrics[name]) for step, metrics in self._reported if name in metrics]
        if not found:
            known = {key for _, metrics in self._reported for key in metrics}
            expected = f"expected one of {', '.join(sorted(known))}{nearest(name, known)}"
            reason = expected if known else "as nothing has been reported yet; call history after fit"
            raise InputError(f"run {self.name!r} has no history of {name!r}, {reason}")
        values = np.array([value for _, value in found], np.float64)  # JSON's null becomes NaN
        return np.array([step for step, _ in found]), np.where(np.isfinite(values), values, np.nan)

    def last_saved(self) -> str:
        """A phrase that says where the newest checkpoint is. Implements `Recorder.last_saved`."""
        if self._saved is None:
            return "nothing was saved"
        return f"the last good checkpoint is step {self._saved} in {self.directory}/checkpoints"

    def images(self, step: int, draw: Callable[[], Mapping[str, Any]]) -> None:
        """Shows images in TensorBoard at `step`, and saves them as NAME.png in the run's folder.

        `draw()` returns {name: images [N, H, W, C], uint8 or floats in [0, 1]}; the N images of a name are tiled into
        one. It is called on the first process, and only if the run has a folder.
        """
        if self._keeps:
            for name, images in draw().items():
                self._show(name, step, sheet_png(np.asarray(images)))

    def figure(self, name: str, step: int, draw: Callable[[], "Figure"]) -> None:
        """Shows the Matplotlib figure that `draw()` returns, in the same way as `images`."""
        if self._keeps:
            self._show(name, step, figure_png(draw()))

    def keep(self, name: str, content: Any) -> None:
        """Writes the file `name` to the run's folder, for example a vocabulary that predictions will need.

        `content` is text, bytes, an array, which is written in NumPy's .npy format, or lists and dicts that JSON can
        represent. The first process writes it, and only if the run has a folder. Raises InputError for other content,
        and for the name of a file of the run itself.
        """
        if name in OWN:
            raise InputError(f"cannot keep {name}, which is a file of the run itself; choose another name")
        if self._keeps:
            assert self.directory
            file, data = self.directory / name, _file_content(name, content)
            with spared(f"{file} cannot be written", "it is lost", failures(file)):
                write_whole(file, data)

    @property
    def _keeps(self) -> bool:
        return self.directory is not None and jax.process_index() == 0

    def _show(self, name: str, step: int, png: bytes) -> None:
        assert self.directory
        if not self._board:
            self._board = TensorBoard(self.directory, self._step, self.seeds)
        self._board.png(name, step, png)
        self.keep(f"{name}.png", png)

    def close(self) -> None:
        """Finishes all files of this run and of its children."""
        with contextlib.ExitStack() as stack:
            for end in (*self._children.values(), self._progress, self._lines, self._board, self._checkpoints):
                if end:
                    stack.callback(end.close)


def _file_content(name: str, content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, np.ndarray | jax.Array):
        file = io.BytesIO()
        np.save(file, np.asarray(content), allow_pickle=False)
        return file.getvalue()
    try:
        return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"cannot keep {name}, a {type(content).__name__} ({error}); expected text, bytes, an array, or lists and "
            "dicts of numbers and texts"
        ) from error
