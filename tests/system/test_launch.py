"""The command line of an experiment: flags, exit statuses, the folder of a run, and one clear line for bad input."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dl_jax.core import files as core_files
from dl_jax.core.errors import InputError
from dl_jax.core.files import cache_folder
from dl_jax.core.fit import Watch, fit
from dl_jax.core.inputs import note
from dl_jax.core.step import init_state, make_step
from dl_jax.data.source import data_folder
from dl_jax.harness.checkpoint import store as checkpoint
from dl_jax.harness.fields import Positive
from dl_jax.harness.flags import command, parse
from dl_jax.harness.identity import differences
from dl_jax.harness.launch import launch, name_of
from dl_jax.harness.machine import device, versions
from dl_jax.harness.results.claims import Claim
from dl_jax.harness.run import Run, Settings


@dataclasses.dataclass(frozen=True)
class Config:
    """A line fitted to four points."""

    dataset: str = "points"  # what it learns from
    steps: int = 12  # train steps
    batch_size: int = 4  # examples per step
    learning_rate: Positive[float] = 0.1  # of SGD
    poison: int = -1  # step whose batch is NaN
    width: int = 1  # of the parameter
    hidden_bug: bool = False  # whether main crashes


PRESETS = {"paper": Config(), "quick": Config(steps=4)}
CLAIMS = (
    Claim("slope", "Nobody 1900", "Table 1", 3.0, 0.2, better="higher", seeds=1),
    Claim("slope", "Nobody 1900", "Table 2", 9.0, 0.2, seeds=1, given={"dataset": "moon"}),
)


ELSEWHERE = {"poison": -1, "width": 0}  # what changes a run and is not in its config, such as another commit


def loss(variables, batch, key):
    return ((variables["params"]["w"].sum() * batch["x"] - batch["y"]) ** 2).mean(), ({}, {})


def main(cfg: Config, run: Run):
    if cfg.hidden_bug:
        raise RuntimeError("a bug")
    x = np.float32([-1, 0.5, 1, 2])
    tx = optax.sgd(cfg.learning_rate)
    step = make_step(loss, tx)
    slopes = []
    for seed in run.seeds:
        state = init_state(jax.random.key(seed), {"params": {"w": jnp.zeros(cfg.width + ELSEWHERE["width"])}}, tx)
        batches = lambda i: {"x": x, "y": np.where(i in (cfg.poison, ELSEWHERE["poison"]), np.nan, 3 * x).astype("f4")}
        state = fit(step, state, batches, steps=cfg.steps, run=run / f"seed{seed}", every=4)
        slopes.append(state.params["w"].sum())
    return {"slope": np.array(slopes)}


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the experiment with these flags; gives (exit status, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*flags: str):
        monkeypatch.setattr(sys, "argv", ["experiment.py", *flags])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            launch(main, PRESETS, CLAIMS)
        signal.signal(signal.SIGTERM, before)
        return (ended.value.code, *capsys.readouterr())

    return run


def one_line(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in stderr
    return line


def test_a_run_ends_with_the_table_and_the_result(call, tmp_path):
    status, out, err = call("--preset", "paper", "--seeds", "2", "--workdir", str(tmp_path / "run"))
    assert status == 0
    assert "reproduced" in out
    assert "not applicable: needs dataset=moon" in out
    assert "seed1" in err
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["seeds"] == [0, 1]
    assert result["config"]["steps"] == 12
    assert result["measured"]["slope"]["n"] == 2
    assert [claim["verdict"] for claim in result["claims"]] == ["reproduced", "not applicable"]
    assert result["command"] == "python experiments/test_launch.py --preset paper --seeds 2"
    assert str(tmp_path) not in json.dumps(result)
    assert (tmp_path / "run/test_launch.py").read_text() == Path(__file__).read_text()
    assert json.loads((tmp_path / "run/config.json").read_text())["preset"] == "paper"
    lines = [json.loads(line) for line in (tmp_path / "run/seed0/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_lacks_a_character_ends_no_run(monkeypatch, tmp_path, encoding):
    out = (tmp_path / "out").open("w", encoding=encoding)
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--preset", "paper", "--seeds", "1"])
    monkeypatch.setattr(sys, "stdout", out)

    def prints(cfg: Config, run: Run):
        print("\N{GREEK SMALL LETTER OMEGA} \N{REPLACEMENT CHARACTER}")
        return main(cfg, run)

    with out, pytest.raises(SystemExit) as ended:
        launch(prints, PRESETS, CLAIMS)
    assert ended.value.code == 0
    table = (tmp_path / "out").read_text(encoding=encoding)
    assert table.startswith("? ?\n")
    assert f"measured {'?' if encoding == 'ascii' else '±'} std" in table


@pytest.mark.parametrize("content", ["", '{"measured": {"sl', "[]", '{"other": 1}', "null"])
def test_a_torn_result_is_written_anew(call, tmp_path, content):
    flags = ("--preset", "paper", "--seeds", "1", "--workdir", str(tmp_path))
    assert call(*flags)[0] == 0
    (tmp_path / "result.json").write_text(content)
    assert call(*flags)[0] == 0
    assert json.loads((tmp_path / "result.json").read_text())["measured"]["slope"]["n"] == 1


@pytest.mark.parametrize(
    "content", ["", '[{"commit": ', "{}", '[{"commit": null}]', '[{"commit": "a", "clean": true, "seconds": "x"}]']
)
def test_torn_attempts_leave_a_result_that_does_not_count_as_clean(call, tmp_path, content):
    flags = ("--preset", "paper", "--seeds", "1", "--workdir", str(tmp_path))
    assert call(*flags, "--poison", "2")[0] == 2
    (tmp_path / "attempts.json").write_text(content)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"poison": 2', '"poison": -1'))
    with pytest.warns(UserWarning, match=r"attempts\.json is damaged"):
        assert call(*flags)[0] == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["attempts"][0] == {"commit": None, "clean": False, "seconds": None}
    assert not result["clean"]


def test_a_folder_may_begin_with_the_home_folder(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    monkeypatch.setenv("DL_JAX_CACHE_DIR", "")
    flags = ("--workdir=~/run", "--data-dir=~/data", "--cache-dir=~/cache")
    assert call("--seeds", "1", *flags)[0] == 0
    assert (tmp_path / "home/run/result.json").exists()
    assert data_folder() == tmp_path / "home/data"
    assert cache_folder() == tmp_path / "home/cache"
    assert checkpoint.load("~/run/seed0/checkpoints")[0] == 4
    assert not list(tmp_path.glob("~*"))


def test_the_default_preset_is_quick_and_never_judged(call):
    status, out, _ = call("--seeds", "1")
    assert status == 0
    assert "not applicable: needs preset paper" in out


def test_a_missed_claim_is_status_3(call, monkeypatch):
    monkeypatch.setitem(PRESETS, "paper", Config(learning_rate=1e-4))
    status, out, _ = call("--preset", "paper", "--seeds", "1")
    assert status == 3
    assert "not reproduced" in out


def test_a_preset_that_was_changed_answers_no_claim(call):
    status, out, _ = call("--preset", "paper", "--seeds", "1", "--learning-rate", "1e-4", "--dataset", "moon")
    assert status == 0
    assert "not applicable: needs preset paper" in out


def test_what_a_claim_is_given_is_no_change_of_the_preset(call):
    status, out, _ = call("--preset", "paper", "--seeds", "1", "--dataset", "moon")
    assert status == 0
    assert "better than claimed" in out


def test_a_finished_run_is_restored_without_a_step(call, tmp_path, monkeypatch):
    flags = ("--preset", "paper", "--seeds", "1", "--workdir", str(tmp_path))
    call(*flags)
    first = (tmp_path / "result.json").read_text()
    monkeypatch.setattr(sys.modules[__name__], "loss", None)  # another step would fail
    assert call(*flags)[0] == 0
    assert (tmp_path / "result.json").read_text() == first


def test_a_crash_is_status_1_with_its_traceback(call):
    status, _, err = call("--hidden-bug")
    assert status == 1
    assert "RuntimeError: a bug" in err
    assert "Traceback" in err


def test_nan_names_the_step_and_keeps_the_checkpoint(call, tmp_path):
    flags = ("--preset", "paper", "--seeds", "1", "--workdir", str(tmp_path), "--checkpoint-every", "4")
    status, _, err = call(*flags, "--poison", "6")
    assert status == 2
    line = one_line(err)
    assert "loss is nan at step 7" in line
    assert f"the last good checkpoint is step 4 in {tmp_path}/seed0/checkpoints" in line
    step, tree = checkpoint.load(str(tmp_path / "seed0/checkpoints"))
    assert step == 4
    assert np.isfinite(tree["state"]["params"]["w"]).all()


def test_nan_can_be_skipped(call, tmp_path):
    status, _, _ = call(
        "--preset", "paper", "--seeds", "1", "--workdir", str(tmp_path), "--poison", "6", "--on-nan", "skip"
    )
    assert status == 0
    assert '"skipped": 1' in (tmp_path / "seed0/metrics.jsonl").read_text()


def test_another_config_in_the_folder_names_the_field(call, tmp_path):
    call("--seeds", "1", "--workdir", str(tmp_path))
    status, _, err = call("--seeds", "1", "--workdir", str(tmp_path), "--learning-rate", "0.2")
    assert status == 2
    assert "learning_rate is 0.1 in the folder, 0.2 in this command" in one_line(err)


def test_every_attempt_is_part_of_the_evidence(call, tmp_path, monkeypatch):
    flags = ("--preset", "paper", "--seeds", "1", "--workdir", str(tmp_path), "--checkpoint-every", "4")
    assert call(*flags, "--hidden-bug")[0] == 1  # before its first fit: it leaves nothing
    with monkeypatch.context() as patched:
        patched.setitem(ELSEWHERE, "poison", 6)
        assert call(*flags)[0] == 2
    (first,) = json.loads((tmp_path / "attempts.json").read_text())
    assert (first["versions"], first["device"]) == (versions(), device())
    killed = {"commit": "0" * 40, "clean": False, "seconds": None}
    (tmp_path / "attempts.json").write_text(json.dumps([first, killed]))
    assert call(*flags)[0] == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["attempts"][:2] == [first, killed]
    assert len(result["attempts"]) == 3
    assert result["wall_seconds"] == pytest.approx(first["seconds"] + result["attempts"][2]["seconds"], abs=0.11)
    assert not result["clean"]


def test_other_seeds_in_the_folder_are_refused(call, tmp_path):
    flags = ("--preset", "paper", "--workdir", str(tmp_path))
    call(*flags, "--seeds", "1")
    for other, here in (("--seeds=3", "[0, 1, 2]"), ("--seed=7", "[7]")):
        status, _, err = call(*flags, "--seeds", "1", other)
        assert status == 2
        assert f"seeds is [0] in the folder, {here} in this command" in one_line(err)
    assert json.loads((tmp_path / "result.json").read_text())["measured"]["slope"]["n"] == 1


def test_a_field_that_its_type_forbids_is_one_line_before_any_work(call, tmp_path):
    status, _, err = call("--learning-rate", "-0.1", "--workdir", str(tmp_path / "run"))
    assert status == 2
    assert one_line(err) == "error: --learning-rate is -0.1, expected more than 0; change it"
    assert not (tmp_path / "run").exists()


def test_folders_given_as_flags_are_the_environment_of_the_run(call, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    monkeypatch.setenv("DL_JAX_CACHE_DIR", "/nowhere")
    call("--seeds", "1", "--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "data"
    assert cache_folder() == tmp_path / "cache"


def test_a_run_that_never_began_gives_its_folder_free(call, tmp_path):
    assert call("--hidden-bug", "--workdir", str(tmp_path))[0] == 1
    assert call("--seeds", "1", "--workdir", str(tmp_path))[0] == 0


@pytest.mark.parametrize("torn", ["", '{"experiment": ', None])
def test_a_torn_config_is_rebuilt_from_a_checkpoint(call, tmp_path, torn):
    flags = ("--seeds", "1", "--workdir", str(tmp_path))
    call(*flags)
    config = tmp_path / "config.json"
    whole = config.read_text()
    config.unlink()
    if torn is not None:
        config.write_text(torn)
    with pytest.warns(UserWarning, match=r"config.json is missing or damaged, rebuilt from a checkpoint"):
        assert call(*flags, "--learning-rate", "0.2")[0] == 2  # another run's all the same
    with pytest.warns(UserWarning, match=r"config.json is missing or damaged, rebuilt from a checkpoint"):
        assert call(*flags)[0] == 0
    assert config.read_text() == whole


def test_a_torn_config_without_a_checkpoint_is_one_line(call, tmp_path):
    call("--seeds", "1", "--workdir", str(tmp_path))
    (tmp_path / "config.json").write_text('{"experiment": ')
    shutil.rmtree(tmp_path / "seed0" / "checkpoints")
    status, _, err = call("--seeds", "1", "--workdir", str(tmp_path))
    assert status == 2
    assert "config.json is missing, damaged or not of a run" in one_line(err)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"my": "settings"}'),
        ("config.json", "[1, 2]"),
        ("config.json", "half a {"),
        ("result.json", "{}"),
        ("attempts.json", "[]"),
        ("test_launch.py", "print('mine')"),
    ],
)
def test_a_file_that_is_not_of_a_run_is_not_taken_over(call, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    status, _, err = call("--seeds", "1", "--workdir", str(tmp_path))
    assert status == 2
    assert name in one_line(err) or "not of a run" in one_line(err)
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and path.name != ".lock"] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_config_of_another_program_beside_checkpoints_is_not_taken_over(call, tmp_path):
    flags = ("--seeds", "1", "--workdir", str(tmp_path))
    call(*flags)
    (tmp_path / "config.json").write_text('{"my": "settings"}')
    status, _, err = call(*flags)
    assert status == 2
    assert "not of a run" in one_line(err)
    assert (tmp_path / "config.json").read_text() == '{"my": "settings"}'


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(core_files, "PAUSES", (0.01,))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("function", ["scandir", "listdir", "stat"])
def test_a_folder_that_cannot_be_read_is_not_taken_over(call, tmp_path, monkeypatch, no_pauses, function):
    flags = ("--seeds", "1", "--workdir", str(tmp_path))
    call(*flags)
    before, original = contents(tmp_path), getattr(os, function)

    def refuse(path=".", *given, **options):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(tmp_path / "seed0")):
            raise OSError(errno.EMFILE, "Too many open files")
        return original(path, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, function, refuse)
        status, _, err = call(*flags, "--learning-rate", "9")
    assert status == 75 or "learning_rate is 0.1 in the folder, 9.0 in this command" in one_line(err)
    assert contents(tmp_path) == before
    assert call(*flags)[0] == 0


@pytest.mark.parametrize("name", ["config.json", "attempts.json"])
def test_bookkeeping_that_cannot_be_read_is_not_replaced(call, tmp_path, monkeypatch, no_pauses, name):
    flags = ("--seeds", "1", "--workdir", str(tmp_path))
    call(*flags)
    before, read = contents(tmp_path), type(epath.Path(tmp_path)).read_bytes

    def refuse(path):
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(type(epath.Path(tmp_path)), "read_bytes", refuse)
        status, _, err = call(*flags)
    assert status == 75
    assert f"{name} cannot be read (Input/output error), tried 2 times" in one_line(err)
    assert contents(tmp_path) == before


def test_attempts_whose_seconds_are_damaged_end_no_run(call, tmp_path):
    flags = ("--seeds", "1", "--workdir", str(tmp_path))
    call(*flags)
    (attempt,) = json.loads((tmp_path / "attempts.json").read_text())
    (tmp_path / "attempts.json").write_text(json.dumps([{**attempt, "spent": None}]))
    (tmp_path / "result.json").unlink()
    with pytest.warns(UserWarning, match=r"attempts.json is damaged"):
        assert call(*flags)[0] == 0


def test_a_result_of_other_data_is_not_replaced(call, tmp_path, monkeypatch):
    """Data that are read after the last fit are in no checkpoint."""
    flags = ("--seeds", "1", "--workdir", str(tmp_path))

    def reads_late(version):
        def late(cfg: Config, run: Run):
            found = main(cfg, run)
            note("digits test", version)
            return {"slope": found["slope"] + (version != "1")}

        return late

    monkeypatch.setattr(sys, "argv", ["experiment.py", *flags])
    for version, status in (("1", 0), ("1", 0), ("2", 2)):
        with pytest.raises(SystemExit) as ended:
            launch(reads_late(version), PRESETS, CLAIMS[:0])
        assert ended.value.code == status
    assert json.loads((tmp_path / "result.json").read_text())["data"] == {"digits test": "1"}
    assert [each["data"]["digits test"] for each in json.loads((tmp_path / "attempts.json").read_text())] == [
        "1",
        "1",
        "2",
    ]


def test_checkpoints_of_another_child_are_refused(call, tmp_path):
    flags = ("--seeds", "2", "--workdir", str(tmp_path))
    assert call(*flags)[0] == 0
    shutil.rmtree(tmp_path / "seed1")
    shutil.copytree(tmp_path / "seed0", tmp_path / "seed1")
    status, _, err = call(*flags)
    assert status == 2
    assert "belongs to another run: run is seed0 in the checkpoint, seed1 in this command" in one_line(err)


def test_restart_sets_aside_what_is_there_and_keeps_it(call, tmp_path):
    flags = ("--seeds", "1", "--workdir", str(tmp_path))
    for learning_rate in ("0.1", "0.05", "0.02"):
        assert call(*flags, "--learning-rate", learning_rate)[0] in (0, 3) or learning_rate != "0.1"
        if learning_rate != "0.1":
            assert call(*flags, "--learning-rate", learning_rate, "--restart")[0] == 0
    rates = [
        json.loads((tmp_path / folder / "config.json").read_text())["config"]["learning_rate"]
        for folder in ("before-restart", "before-restart-2", ".")
    ]
    assert rates == [0.1, 0.05, 0.02]
    assert (tmp_path / "before-restart/seed0/checkpoints").is_dir()
    (attempt,) = json.loads((tmp_path / "attempts.json").read_text())
    assert attempt["seconds"] > 0


def test_a_folder_of_before_seeds_were_part_of_a_run_is_refused_in_one_line(call, tmp_path):
    call("--seeds", "1", "--workdir", str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["seeds"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, _, err = call("--seeds", "1", "--workdir", str(tmp_path))
    assert status == 2
    assert (
        "holds another run: seeds is not set in the folder, [0] in this command; use those values, another folder"
        in one_line(err)
    )


def test_a_checkpoint_of_before_states_had_a_seed_axis_is_refused_in_one_line(tmp_path):
    """The leaves of the checkpoint are [...], those of the present state [S, ...]."""
    state = init_state(jax.random.key(0), {"params": {"w": jnp.zeros(2)}}, optax.adam(0.1))
    with contextlib.closing(checkpoint.Checkpoints(str(tmp_path / "checkpoints"))) as checkpoints:
        checkpoints.save(5, {"state": state, "stop": {}})
    states = jax.tree.map(lambda leaf: leaf[None], state)
    with (
        contextlib.closing(Run(epath.Path(tmp_path))) as run,
        pytest.raises(InputError, match=r"^checkpoint .*/5 does not fit this model \(6 differences\): .*--w"),
    ):
        fit(lambda state, batch: (state, {}), states, lambda i: {}, steps=9, run=run)


def test_another_experiment_in_the_folder_is_named(call, tmp_path):
    call("--seeds", "1", "--workdir", str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "experiment": "audio/whale"}))
    assert "experiment is audio/whale in the folder, test_launch in this command" in one_line(
        call("--seeds", "1", "--workdir", str(tmp_path))[2]
    )


def test_a_checkpoint_of_another_architecture_names_the_leaf(call, tmp_path, monkeypatch):
    call("--seeds", "1", "--workdir", str(tmp_path))
    monkeypatch.setitem(ELSEWHERE, "width", 2)
    status, _, err = call("--seeds", "1", "--workdir", str(tmp_path))
    assert status == 2
    assert "state/params/w: checkpoint (1,), model (3,)" in one_line(err)


def test_a_folder_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = call("--workdir", str(tmp_path / "file" / "run"))
    assert status == 2
    assert "cannot be written" in one_line(err)


def test_a_folder_in_use(call, tmp_path):
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = call("--seeds", "1", "--workdir", str(tmp_path))
    assert status == 2
    assert "is in use by another process" in one_line(err)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--seeds", "0"), "--seeds 0, expected 1 or more"),
        (("--processes", "0"), "--processes 0, expected 1 or more"),
        (("--cpu-devices", "0"), "--cpu-devices 0, expected 1 or more"),
        (("--grace", "0"), "--grace 0, expected more than 0 seconds"),
        (("--grace", "nan"), "--grace nan, expected more than 0 seconds"),
        (("--deadline", "-1"), "--deadline -1, expected more than 0 seconds"),
        (("--join-within", "0"), "--join-within 0, expected more than 0 seconds"),
        (("--restart",), "--restart is given without --workdir"),
        (("--profile", "1..2"), "--profile is given without --workdir"),
        (("--seed", "-1"), "seed -1, expected 0 to 4294967295"),
        (("--seed", "4294967295", "--seeds", "2"), "seed 4294967296, expected 0 to 4294967295"),
        (("--seed", "9223372036854775808"), "seed 9223372036854775808, expected 0 to 4294967295"),
        (("--checkpoint-every", "0"), "--checkpoint-every 0, expected 1 or more"),
        (("--process-id", "1"), "missing: --coordinator, --processes"),
    ],
)
def test_flags_out_of_range(call, flags, expected):
    status, _, err = call(*flags)
    assert status == 2
    assert expected in one_line(err)


def test_no_cluster_is_one_line(call, monkeypatch):
    def initialize(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    status, _, err = call("--cluster")
    assert status == 2
    assert "cannot join a run of several processes (coordinator_address should be defined.)" in one_line(err)


def test_a_wrong_flag_names_the_nearest(call):
    status, _, err = call("--stepz", "3")
    assert status == 2
    assert "--steps" in err


def test_help_explains_every_flag(call):
    status, out, _ = call("--help")
    assert status == 0
    for text in ("--learning-rate", "of SGD", "--workdir", "--seeds", "--on-nan", "examples per step"):
        assert text in out


def test_sigterm_saves_and_exits_with_143(call, tmp_path, monkeypatch):
    flags = ("--preset", "paper", "--seeds", "1", "--workdir", str(tmp_path), "--steps", "40")
    plain = loss

    def interrupted(variables, batch, key):
        jax.debug.callback(lambda: os.kill(os.getpid(), signal.SIGTERM))
        return plain(variables, batch, key)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[__name__], "loss", interrupted)
        assert call(*flags)[0] == 143
    step, _ = checkpoint.load(str(tmp_path / "seed0/checkpoints"))
    assert 1 <= step < 40
    assert not (tmp_path / "result.json").exists()
    assert call(*flags)[0] == 0


def test_parse_applies_flags_on_the_preset():
    name, config, common = parse(["--preset=quick", "--learning-rate", "3"], PRESETS, "")
    assert (name, config, common.seeds) == ("quick", dataclasses.replace(PRESETS["quick"], learning_rate=3.0), 5)


def test_the_command_leaves_out_where_things_lie():
    flags = ["--workdir", "/a b", "--seeds", "5", "--data-dir=/x", "--data_dir", "/y", "--dataset", "my set"]
    many = ["--coordinator", "host:1", "--processes=2", "--process_id", "0", "--debug"]
    assert command("vision/lenet", [*flags, *many]) == "python experiments/vision/lenet.py --seeds 5 --dataset 'my set'"


def test_no_flags_are_the_quick_preset_with_its_defaults():
    name, config, common = parse([], PRESETS, "")
    assert (name, config, common.seeds) == ("quick", PRESETS["quick"], 5)


def test_two_presets_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--preset=paper", "--preset", "quick"], PRESETS, "")
    assert capsys.readouterr().err == "error: --preset is given twice, expected once; remove one\n"


def test_name_of_a_script():
    assert name_of(Path("/home/me/project/experiments/vision/lenet.py")) == "vision/lenet"
    assert name_of(Path("/tmp/mine.py")) == "mine"


def test_differences_names_nested_fields_and_missing_ones():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "d": 2}}, "in the folder") == [
        "b is 1 in the folder, 3 in this command",
        "c is 2 in the folder, not set in this command",
        "d is not set in the folder, 2 in this command",
    ]


def test_a_run_keeps_its_best_checkpoint_beside_the_newest(tmp_path):
    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(0), {"params": {"w": jnp.zeros(1)}}, tx)
    batches = lambda i: {"x": np.ones(4, np.float32), "y": np.ones(4, np.float32)}
    errors = iter([3.0, 1.0, np.nan, 2.0, 4.0, 5.0])
    watch = Watch(2, lambda variables: {"error": np.float32(next(errors))}, best=("error", "min"))
    with contextlib.closing(Run(epath.Path(tmp_path))) as run:
        fit(make_step(loss, tx), state, batches, steps=12, run=run, watch=watch)
    folder = tmp_path / "checkpoints"
    assert checkpoint.best_step(str(folder)) == 4
    assert sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) == [4, 10, 12]


def test_a_run_holds_one_fit():
    tx = optax.sgd(0.1)
    state = init_state(jax.random.key(0), {"params": {"w": jnp.zeros(1)}}, tx)
    batches = lambda i: {"x": np.ones(4, np.float32), "y": np.ones(4, np.float32)}
    run = Run(settings=Settings())
    fit(make_step(loss, tx), state, batches, steps=1, run=run / "a")
    fit(make_step(loss, tx), state, batches, steps=1, run=run / "b")
    with pytest.raises(RuntimeError, match="run 'a' already holds a fit"):
        fit(make_step(loss, tx), state, batches, steps=2, run=run / "a")
