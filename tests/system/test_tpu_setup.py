"""tpu_setup.sh against a gcloud of ours: it logs its arguments, gives prepared answers, and runs what workers would."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "tpu_setup.sh"
SLICE = ["--name", "pod", "--zone", "us-central2-b"]
COMMANDS = {
    "create": ["create", "v4-16", "tpu-ubuntu2204-base"],
    "install": ["install"],
    "check": ["check"],
    "run": ["run", "experiments/lenet.py", "--seeds", "5"],
    "stop": ["stop"],
    "fetch": ["fetch", "runs/lenet"],
    "delete": ["delete"],
}
NOT_FOUND = (1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'pod' was not found")
READY = (0, "READY\n", "")

GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
arguments = sys.argv[1:]
assert sys.stdin.read() == ""
with open(cloud / "calls", "a") as log:
    print(json.dumps(arguments), file=log)
verb = arguments[3] if arguments[0] == "compute" else arguments[1]
answers = json.loads((cloud / "answers").read_text())
status, out, err = answers[verb].pop(0) if answers.get(verb) else (0, "", "")
(cloud / "answers").write_text(json.dumps(answers))
sys.stdout.write(out)
sys.stderr.write(err)
workers = sorted(cloud.glob("worker*")) if status == 0 else []
command = next((a.removeprefix("--command=") for a in arguments if a.startswith("--command=")), None)
for worker in workers:
    if verb == "scp" and not arguments[4].startswith("--"):
        shutil.copy(arguments[4], worker / arguments[5].split(":")[1])
    if verb == "ssh":
        path = f"{cloud / 'worker-bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "HOME": str(worker), "PATH": path}
        status = subprocess.run(["bash", "-c", command], cwd=worker, env=environment).returncode or status
sys.exit(status)
"""

# What `python3 -m pip install --target tools uv` leaves behind on a worker: a uv that makes an environment whose Python
# writes its arguments down.
PIP = r"""#!/usr/bin/env bash
[[ "$*" == "-m pip install --quiet --target tools uv" ]] || exit 64
mkdir -p tools/bin
cat > tools/bin/uv <<'UV'
#!/usr/bin/env bash
printf '%s\n' "$*" >> uv.log
if [[ $1 == pip && ! -f src/pyproject.toml ]]; then exit 65; fi
if [[ $1 == venv ]]; then
  mkdir -p venv/bin
  cp "$FAKE_CLOUD/experiment" venv/bin/python
fi
UV
chmod +x tools/bin/uv
"""

EXPERIMENT = """#!/usr/bin/env bash
printf '%s\\0' "$@" > arguments
[[ ! -e wait ]] || { trap 'echo saved > saved; kill $!; exit 143' TERM; sleep 60 & touch ready; wait; }
exit "$(cat status 2>/dev/null || echo 0)"
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the script and two commits, to copy."""
    repository = tmp_path_factory.mktemp("template")
    (repository / "experiments").mkdir()
    (repository / "experiments" / "lenet.py").write_text("")
    shutil.copy(ROOT / SCRIPT, repository)
    git(repository, "init", "--quiet", "--template=")
    for text in ("first", "second"):
        (repository / "pyproject.toml").write_text(text)
        git(repository, "add", ".")
        git(repository, "commit", "--quiet", "--message", text)
    return repository


class Cloud:
    """A repository with the script, a gcloud, and a slice of `workers` machines."""

    def __init__(self, folder: Path, template: Path, workers: int) -> None:
        self.folder, self.repository = folder, folder / "repository"
        self.workers = [folder / f"worker{i}" for i in range(workers)]
        for worker in self.workers:
            worker.mkdir(parents=True)
        shutil.copytree(template, self.repository)
        executable(folder / "bin" / "gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        executable(folder / "worker-bin" / "python3", PIP)
        executable(folder / "experiment", EXPERIMENT)
        self.answer()

    def answer(self, **answers: Sequence[tuple[int, str, str]]) -> None:
        """What gcloud gives per verb, call by call: (status, stdout, stderr); success and silence after that."""
        (self.folder / "answers").write_text(json.dumps(answers))

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "FAKE_CLOUD": str(self.folder), "TMPDIR": str(self.folder)}

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.repository / SCRIPT), *SLICE, "--pause", "0", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.PIPE,  # open and silent: whoever reads it waits for ever
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
        out, err = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    @property
    def calls(self) -> list[list[str]]:
        log = self.folder / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def verbs(self) -> list[str]:
        return [call[3] if call[0] == "compute" else call[1] for call in self.calls]

    def commit(self, name: str = "HEAD") -> str:
        return git(self.repository, "rev-parse", name).strip()

    def home(self, worker: int = 0) -> Path:
        return self.workers[worker] / "dl_jax"


@pytest.fixture
def cloud(tmp_path: Path, template: Path) -> Cloud:
    return Cloud(tmp_path / "cloud", template, workers=1)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Cloud:
    """For all calls of the script that must leave everything as it is."""
    return Cloud(tmp_path_factory.mktemp("idle") / "cloud", template, workers=1)


@pytest.fixture
def pod(tmp_path: Path, template: Path) -> Cloud:
    return Cloud(tmp_path / "pod", template, workers=2)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize("script", [SCRIPT, ".ci/run"])
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_names_every_command(idle: Cloud) -> None:
    done = idle("--help")
    assert done.returncode == 0
    assert all(f"\n  {command}" in done.stdout for command in COMMANDS)
    assert idle.calls == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_prints_commands_and_calls_none(idle: Cloud, command: str) -> None:
    done = idle("--dry-run", *COMMANDS[command])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("+ ")
    assert "gcloud compute tpus tpu-vm" in done.stdout
    assert "--zone=us-central2-b --quiet" in done.stdout
    assert idle.calls == []
    assert sorted(path.name for path in idle.folder.iterdir()) == [
        "answers", "bin", "experiment", "repository", "worker-bin", "worker0"
    ]  # fmt: skip


def test_a_dry_run_prints_what_a_run_calls(cloud: Cloud) -> None:
    assert cloud("install").returncode == 0
    arguments = ["run", "experiments/lenet.py", "it's", "$HOME * `id`", "two\nlines", ""]
    planned, done = cloud("--dry-run", *arguments), cloud(*arguments)
    assert done.returncode == 0, done.stderr
    assert planned.stdout == done.stderr
    command = ["bash", "-c", f"printf '%s\\0' {planned.stdout[2:]}"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert words.split("\0")[1:-1] == cloud.calls[-1]


def test_a_dry_run_needs_no_slice(idle: Cloud, tmp_path: Path) -> None:
    linked = tmp_path / SCRIPT
    linked.symlink_to(idle.repository / SCRIPT)
    command = ["bash", str(linked), "--dry-run", "install"]
    done = subprocess.run(command, env=idle.environment, capture_output=True, text=True, check=True)
    assert "name:dl_jax.tar.gz --worker=all --zone=zone --quiet" in done.stdout
    assert f" {idle.repository} {idle.commit()}\n" in done.stdout


def test_every_call_names_slice_zone_and_project_and_asks_nothing(cloud: Cloud) -> None:
    cloud.answer(describe=[NOT_FOUND, READY])
    for command in COMMANDS.values():
        cloud("--project", "ours", *command)
    assert set(cloud.verbs) == {"describe", "create", "scp", "ssh", "delete"}
    for call in cloud.calls:
        assert call[:3] == ["compute", "tpus", "tpu-vm"]
        assert {"--zone=us-central2-b", "--project=ours", "--quiet"} <= set(call)
        assert any(word == "pod" or word.startswith("pod:") for word in call)


def test_the_slice_may_come_from_the_environment(cloud: Cloud) -> None:
    environment = {**cloud.environment, "TPU_NAME": "other", "TPU_ZONE": "europe-west4-a", "TPU_PROJECT": "theirs"}
    subprocess.run(["bash", str(cloud.repository / SCRIPT), "delete"], env=environment, check=True, capture_output=True)
    assert cloud.calls[-1][4:] == ["other", "--zone=europe-west4-a", "--project=theirs", "--quiet"]


def test_create_makes_a_slice_that_is_missing(cloud: Cloud) -> None:
    cloud.answer(describe=[NOT_FOUND])
    assert cloud("create", "v4-16", "tpu-ubuntu2204-base", "--spot").returncode == 0
    assert cloud.verbs == ["describe", "create"]
    assert cloud.calls[1][4:] == [
        "pod", "--accelerator-type=v4-16", "--version=tpu-ubuntu2204-base", "--spot", "--zone=us-central2-b", "--quiet"
    ]  # fmt: skip


def test_create_leaves_a_slice_that_is_there(cloud: Cloud) -> None:
    cloud.answer(describe=[READY])
    assert cloud(*COMMANDS["create"]).returncode == 0
    assert cloud.verbs == ["describe"]


def test_create_waits_for_one_that_is_being_made(cloud: Cloud) -> None:
    cloud.answer(describe=[(0, "CREATING\n", ""), (0, "CREATING\n", ""), READY])
    assert cloud(*COMMANDS["create"]).returncode == 0
    assert cloud.verbs == ["describe"] * 3


def test_create_tries_again_and_looks_first(cloud: Cloud) -> None:
    cloud.answer(describe=[NOT_FOUND, NOT_FOUND, READY], create=[(1, "", "no capacity"), (1, "", "connection lost")])
    done = cloud(*COMMANDS["create"])
    assert done.returncode == 0
    assert cloud.verbs == ["describe", "create", "describe", "create", "describe"]
    assert "no capacity" in done.stderr


def test_create_gives_up(cloud: Cloud) -> None:
    cloud.answer(describe=[NOT_FOUND] * 9, create=[(7, "", "no capacity")] * 9)
    done = cloud("--attempts", "3", *COMMANDS["create"])
    assert done.returncode == 7
    assert cloud.verbs == ["describe", "create"] * 3
    assert "gave up after attempt 3" in done.stderr


def test_wrong_use_is_not_tried_again(cloud: Cloud) -> None:
    cloud.answer(describe=[NOT_FOUND] * 9, create=[(2, "", "unrecognized arguments: --spto")] * 9)
    assert cloud(*COMMANDS["create"], "--spto").returncode == 2
    assert cloud.verbs == ["describe", "create"]


def test_pauses_between_attempts_double(cloud: Cloud) -> None:
    cloud.answer(describe=[(0, "CREATING\n", "")] * 9)
    executable(cloud.folder / "bin" / "sleep", '#!/usr/bin/env bash\necho "$1" >> "$FAKE_CLOUD/slept"\n')
    assert cloud("--attempts", "4", "--pause", "3", *COMMANDS["create"]).returncode == 1
    assert (cloud.folder / "slept").read_text().split() == ["3", "6", "12"]


def test_create_tells_a_lost_slice_from_a_missing_one(cloud: Cloud) -> None:
    cloud.answer(describe=[(0, "PREEMPTED\n", "")])
    done = cloud(*COMMANDS["create"])
    assert done.returncode == 2
    assert "pod is PREEMPTED" in done.stderr
    assert "delete" in done.stderr
    assert cloud.verbs == ["describe"]


@pytest.mark.parametrize("command", ["create", "delete"])
def test_an_unknown_state_is_not_a_missing_slice(cloud: Cloud, command: str) -> None:
    cloud.answer(describe=[(1, "", "PERMISSION_DENIED: not yours")] * 9)
    done = cloud("--attempts", "2", *COMMANDS[command])
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert cloud.verbs == ["describe"] * 2


def test_install_puts_one_commit_on_all_workers(pod: Cloud) -> None:
    (pod.repository / "pyproject.toml").write_text("not committed")
    done = pod("install")
    assert done.returncode == 0, done.stderr
    assert "not committed are not installed" in done.stderr
    for worker in range(2):
        home = pod.home(worker)
        assert (home / "src" / "pyproject.toml").read_text() == "second"
        assert git(home / "src", "rev-parse", "HEAD").strip() == pod.commit()
        assert git(home / "src", "status", "--porcelain") == ""
        assert (home / "experiments" / "lenet.py").is_file()
        log = (home / "uv.log").read_text()
        assert "--constraint src/constraints-py312-latest.txt --editable ./src[tpu]" in log
    assert all("--worker=all" in call for call in pod.calls)


def test_the_constraints_that_install_names_exist() -> None:
    assert "src/constraints-py312-latest.txt" in (ROOT / SCRIPT).read_text()
    assert (ROOT / "constraints-py312-latest.txt").is_file()


def test_install_can_go_back_and_keeps_what_experiments_wrote(cloud: Cloud) -> None:
    assert cloud("install").returncode == 0
    (cloud.home() / "runs").mkdir()
    (cloud.home() / "src" / "stale.py").touch()
    assert cloud("install", cloud.commit("HEAD~1")[:10]).returncode == 0
    assert (cloud.home() / "src" / "pyproject.toml").read_text() == "first"
    assert (cloud.home() / "runs").is_dir()
    assert not (cloud.home() / "src" / "stale.py").exists()


def test_install_of_an_unknown_commit_calls_nothing(idle: Cloud) -> None:
    done = idle("install", "no-such-branch")
    assert done.returncode == 2
    assert "no commit 'no-such-branch'" in done.stderr
    assert idle.calls == []


def test_install_survives_failing_transfers(cloud: Cloud) -> None:
    cloud.answer(scp=[(1, "", "broken pipe")] * 2, ssh=[(255, "", "timed out")])
    assert cloud("install").returncode == 0
    assert cloud.verbs == ["scp"] * 3 + ["ssh"] * 2


def test_an_install_that_fails_on_one_worker_fails(pod: Cloud) -> None:
    (pod.home(1) / "tools" / "bin").mkdir(parents=True)
    executable(pod.home(1) / "tools" / "bin" / "uv", "#!/usr/bin/env bash\nexit 2\n")
    done = pod("--attempts", "2", "install")
    assert done.returncode == 1
    assert "on all workers of pod" not in done.stderr
    assert pod.verbs == ["scp", "ssh", "ssh"]


def test_nothing_is_left_behind_here(cloud: Cloud) -> None:
    before = set(cloud.folder.iterdir())
    assert cloud("install").returncode == 0
    assert set(cloud.folder.iterdir()) - before == {cloud.folder / "calls"}


def test_arguments_reach_the_experiment_untouched(pod: Cloud) -> None:
    assert pod("install").returncode == 0
    arguments = ["--note", 'it\'s a "test"', "$HOME $(touch pwned) `id`", "*", "a\nb", "", "ü|&;<>\\", "--x=1 2"]
    assert pod("run", "experiments/lenet.py", *arguments).returncode == 0
    for worker in range(2):
        got = (pod.home(worker) / "arguments").read_text().split("\0")[:-1]
        assert got == ["experiments/lenet.py", *arguments, "--cluster"]
    assert not list(pod.folder.rglob("pwned"))


@pytest.mark.parametrize("status", [1, 3, 143])
def test_run_ends_with_the_experiments_status_and_runs_it_once(pod: Cloud, status: int) -> None:
    assert pod("install").returncode == 0
    (pod.home(1) / "status").write_text(str(status))
    assert pod(*COMMANDS["run"]).returncode == status
    assert pod.verbs == ["scp", "ssh", "ssh"]


def test_run_before_install_says_so(cloud: Cloud) -> None:
    done = cloud(*COMMANDS["run"])
    assert done.returncode == 2
    assert "nothing is installed" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["lenet.py"],
        ["--seeds", "5"],
        ["experiments/../../x.py"],
        ["experiments/../x.py"],
        ["experiments/vision/../../x.py"],
        ["experiments//../x.py"],
        ["experiments/./../../home/x.py", "--seeds", "5"],
        ["experiments/../../experiments/x.py"],
        ["../experiments/x.py"],
        ["/experiments/x.py"],
    ],
)
def test_run_wants_an_experiment(idle: Cloud, arguments: list[str]) -> None:
    for options in ([], ["--dry-run"]):
        done = idle(*options, "run", *arguments)
        assert done.returncode == 2
        assert "run needs an experiment's file first" in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert idle.calls == []


@pytest.mark.parametrize("path", ["vision/lenet.py", "vision/../lenet.py", "./a/../b//../lenet.py", "..a/lenet.py"])
def test_run_takes_any_path_within_experiments(idle: Cloud, path: str) -> None:
    done = idle("--dry-run", "run", f"experiments/{path}")
    assert done.returncode == 0, done.stderr
    assert f"python experiments/{path} --cluster" in done.stdout


def test_a_running_experiment_is_left_alone_until_it_is_stopped(cloud: Cloud) -> None:
    assert cloud("install").returncode == 0
    (cloud.home() / "wait").touch()
    running = cloud.start(*COMMANDS["run"])
    try:
        wait_for(cloud.home() / "ready")
        for command in ("run", "install"):
            done = cloud(*COMMANDS[command])
            assert done.returncode == 2
            assert "an experiment is running" in done.stderr
        assert cloud("stop").returncode == 0
        assert running.wait(timeout=20) == 143
        assert (cloud.home() / "saved").exists()
    finally:
        running.kill()
        running.communicate()
        if (cloud.home() / "run.pid").exists() and not (cloud.home() / "saved").exists():
            os.kill(int((cloud.home() / "run.pid").read_text()), signal.SIGTERM)
    assert "nothing runs" in cloud("stop").stdout
    (cloud.home() / "wait").unlink()
    assert cloud(*COMMANDS["run"]).returncode == 0


def test_fetch_from_a_bucket_and_from_a_worker(cloud: Cloud) -> None:
    cloud.answer(cp=[(1, "", "connection lost")])
    assert cloud("fetch", "gs://bucket/lenet", "results").returncode == 0
    assert cloud.calls == [["storage", "cp", "--recursive", "gs://bucket/lenet", "results", "--quiet"]] * 2
    assert cloud("--dry-run", "fetch", "runs/lenet").stdout == (
        "+ gcloud compute tpus tpu-vm scp --recurse pod:dl_jax/runs/lenet . --worker=0 --zone=us-central2-b --quiet\n"
    )


def test_delete_deletes_once(cloud: Cloud) -> None:
    cloud.answer(describe=[READY, NOT_FOUND])
    assert cloud("delete").returncode == 0
    assert cloud("delete").returncode == 0
    assert cloud.verbs == ["describe", "delete", "describe"]


def test_check_fails_where_a_worker_does(pod: Cloud) -> None:
    assert pod("install").returncode == 0
    assert pod("check").returncode == 0
    assert "jax.distributed.initialize()" in (pod.home(0) / "arguments").read_text()
    (pod.home(1) / "status").write_text("1")
    done = pod("check")
    assert done.returncode == 1
    assert pod.commit()[:7] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which command?"),
        (["destroy"], "unknown command 'destroy'"),
        (["usage"], "unknown command 'usage'"),
        (["--force", "delete"], "unknown option '--force'"),
        (["--zone"], "--zone needs a value"),
        (["--name", "", "delete"], "--name ''"),
        (["--name", "Pod!", "delete"], "--name 'Pod!'"),
        (["--zone", "", "delete"], "--zone ''"),
        (["--attempts", "0", "check"], "--attempts '0'"),
        (["--pause", "1.5", "check"], "--pause '1.5'"),
        (["create", "v4-16"], "create needs an accelerator type and a runtime version"),
        (["fetch"], "fetch needs a source"),
        (["delete", "all"], "delete takes no arguments"),
    ],
)
def test_wrong_use_is_one_line_and_calls_nothing(idle: Cloud, arguments: list[str], message: str) -> None:
    done = idle(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert idle.calls == []


def test_without_gcloud_it_says_what_to_install(cloud: Cloud) -> None:
    (cloud.folder / "bin" / "gcloud").unlink()
    for tool in ("bash", "git", "dirname", "realpath"):
        (cloud.folder / "bin" / tool).symlink_to(shutil.which(tool) or "")
    environment = {**cloud.environment, "PATH": str(cloud.folder / "bin")}
    command = ["bash", str(cloud.repository / SCRIPT), *SLICE, "check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "gcloud is not on the PATH" in done.stderr
