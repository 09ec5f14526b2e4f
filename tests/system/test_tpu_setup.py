"""tpu_setup.sh against a gcloud of ours (programs/gcloud.py), on whose workers its scripts really run."""

import importlib.machinery
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "tpu_setup.sh"
FAKE = ROOT / "tests" / "system" / "programs" / "gcloud.py"
SLICE = ["--name", "pod", "--zone", "us-central2-b"]
RUN = ["run", "experiments/lenet.py", "--seeds", "5"]
COMMANDS = {
    "launch": ["launch", "v4-16", "--spot", *RUN[1:]],
    "create": ["create", "v4-16"],
    "install": ["install"],
    "check": ["check"],
    "run": RUN,
    "stop": ["stop"],
    "fetch": ["fetch", "runs/lenet"],
    "status": ["status"],
    "delete": ["delete"],
}
READY = {"queue": "ACTIVE", "node": "READY"}
MISSING = {"queue": "MISSING", "node": "MISSING"}
DELETE = "./tpu_setup.sh --name pod --zone us-central2-b delete"

pytestmark = pytest.mark.skipif(not shutil.which("ssh-agent"), reason="OpenSSH is not installed")

# Imported, so that it is compiled once and not at each of hundreds of calls.
GCLOUD = f"""#!{sys.executable} -IS
import sys
sys.path.insert(0, {str(FAKE.parent)!r})
import gcloud
gcloud.run(sys.argv[1:])
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

# Line n of `statuses` says how the nth run on a worker ends; "wait" waits for a signal, until there is a file `go`.
EXPERIMENT = r"""#!/usr/bin/env bash
worker=${HOME##*/}
echo "$worker" >> "$FAKE_CLOUD/runs"
n=$(grep -c "$worker" "$FAKE_CLOUD/runs")
printf '%s\0' "$@" > arguments
env -0 > environment
echo "run $n on $worker"
status=$(sed -n "${n}p" "$FAKE_CLOUD/statuses" 2>/dev/null)
if [[ $status == wait ]]; then
  trap 'echo saved > saved; exit 143' TERM
  touch ready
  until [[ -e $FAKE_CLOUD/go ]]; do sleep 0.02; done
  status=0
fi
echo "run $n ends"
exit "${status:-0}"
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def agent() -> Iterator[tuple[Path, Path]]:
    """The socket of an ssh-agent, and the key that it holds."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short path: sockets allow 108 bytes
        socket, key = Path(folder, "agent"), Path(folder, "google_compute_engine")
        run = {"capture_output": True, "text": True, "check": True}
        began = subprocess.run(["ssh-agent", "-s", "-a", socket], **run).stdout
        pid = int(re.findall(r"SSH_AGENT_PID=(\d+)", began)[0])
        try:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], **run)
            subprocess.run(["ssh-add", key], env={**os.environ, "SSH_AUTH_SOCK": str(socket)}, **run)
            yield socket, key
        finally:
            os.kill(pid, signal.SIGTERM)


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
    """A repository with the script, a gcloud, an agent, and a slice of `workers` machines, READY at first."""

    def __init__(self, folder: Path, template: Path, agent: tuple[Path, Path], workers: int) -> None:
        self.folder, self.repository = folder, folder / "repository"
        self.workers = [folder / f"worker{i}" for i in range(workers)]
        for worker in self.workers:
            worker.mkdir(parents=True)
        shutil.copytree(template, self.repository)
        executable(folder / "bin" / "gcloud", GCLOUD)
        executable(folder / "worker-bin" / "python3", PIP)
        executable(folder / "experiment", EXPERIMENT)
        shutil.copytree(agent[1].parent, folder / ".ssh", ignore=lambda *_: ["agent"])
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "FAKE_CLOUD": str(folder),
            "TMPDIR": str(folder),
            "SSH_AUTH_SOCK": str(agent[0]),
        }
        self.holds(**READY)
        self.fails()

    def holds(self, queue: str, node: str, grants: Sequence[list[str]] = ()) -> None:
        """The states of queued resource and slice, and those that requests go through, "QUEUE" or "QUEUE SLICE"."""
        (self.folder / "state").write_text(json.dumps({"queue": queue, "node": node, "next": [], "grants": grants}))

    def fails(self, faults: dict[str, list] | None = None) -> None:
        """What happens to the calls of each verb, one after the other: see programs/gcloud.py."""
        (self.folder / "faults").write_text(json.dumps(faults or {}))

    def ends(self, *statuses: int | str) -> None:
        """How the runs on each worker end, one after the other; with success after that."""
        (self.folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.repository / SCRIPT), *SLICE, "--pause", "0", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.PIPE,  # open and silent: whoever reads it waits for ever
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @contextmanager
    def during(self, *arguments: str) -> Iterator[subprocess.Popen]:
        """While that command runs; at last nothing of it is left, also on the workers, which hold its output open."""
        process = self.start(*arguments)
        try:
            yield process
        finally:
            process.kill()
            self.end()
            process.communicate()

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    @property
    def state(self) -> dict[str, str]:
        state = json.loads((self.folder / "state").read_text())
        return {"queue": state["queue"], "node": state["node"]}

    @property
    def calls(self) -> list[list[str]]:
        log = self.folder / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def verbs(self) -> list[str]:
        """The verbs of the calls, without those that only look."""
        verbs = [call[3] if call[0] == "compute" else call[1] for call in self.calls]
        return [verb for verb in verbs if verb != "describe"]

    @property
    def runs(self) -> int:
        """How often worker 0 has begun an experiment; all others as often."""
        log = self.folder / "runs"
        began = log.read_text().split() if log.exists() else []
        counts = {began.count(worker.name) for worker in self.workers}
        assert len(counts) == 1, began
        return counts.pop()

    def commit(self, name: str = "HEAD") -> str:
        return git(self.repository, "rev-parse", name).strip()

    def installed(self, once: Path) -> "Cloud":
        """With what `install` leaves behind on all workers, copied from where it ran once."""
        for worker in self.workers:
            shutil.copytree(once, worker / "dl_jax", symlinks=True)
        return self

    def home(self, worker: int = 0) -> Path:
        return self.workers[worker] / "dl_jax"

    def end(self) -> None:
        """Ends what may still run on the workers."""
        (self.folder / "go").touch()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, template: Path, agent: tuple[Path, Path]) -> Path:
    """A worker's folder after `install`."""
    made = Cloud(tmp_path_factory.mktemp("once") / "cloud", template, agent, workers=1)
    done = made("install")
    assert done.returncode == 0, done.stderr
    return made.home()


@pytest.fixture
def cloud(tmp_path: Path, template: Path, agent: tuple[Path, Path]) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud", template, agent, workers=1)
    yield made
    made.end()


@pytest.fixture
def pod(tmp_path: Path, template: Path, agent: tuple[Path, Path]) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "pod", template, agent, workers=2)
    yield made
    made.end()


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory, template: Path, agent: tuple[Path, Path]) -> Cloud:
    """For all calls of the script that must leave everything as it is."""
    return Cloud(tmp_path_factory.mktemp("idle") / "cloud", template, agent, workers=1)


@pytest.fixture
def host(cloud: Cloud, once: Path) -> Cloud:
    """One worker, with everything installed."""
    return cloud.installed(once)


@pytest.fixture
def hosts(pod: Cloud, once: Path) -> Cloud:
    """Two workers, with everything installed."""
    return pod.installed(once)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def printed(text: str) -> list[list[str]]:
    """The commands that the script has printed, as a shell reads them."""
    blocks = re.findall(r"^\+ (.*?)(?=^[+#] |^tpu_setup: |\Z)", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(block) for block in blocks]


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.splitlines()[-1].removeprefix("tpu_setup: ")


def shellcheck(*arguments: str, text: str | None = None) -> str:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed")
    return subprocess.run([program, *arguments], input=text, capture_output=True, text=True).stdout


def fake_gcloud() -> ModuleType:
    module = ModuleType("fake_gcloud")
    importlib.machinery.SourceFileLoader(module.__name__, str(FAKE)).exec_module(module)
    return module


# What is printed, and what is refused, without a call.


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
    assert "gcloud compute tpus " in done.stdout
    assert "--zone=us-central2-b --quiet" in done.stdout
    assert idle.calls == []
    assert {path.name for path in idle.folder.iterdir()} == {
        ".ssh", "bin", "experiment", "faults", "repository", "state", "worker-bin", "worker0"
    }  # fmt: skip


def test_a_dry_run_of_launch_is_complete(idle: Cloud) -> None:
    gcloud = fake_gcloud()
    text = idle("--dry-run", "--restarts", "7", *COMMANDS["launch"]).stdout
    calls = [command[1:] for command in printed(text) if command[0] == "gcloud"]
    parsed = [gcloud.parse(call) for call in calls]
    verbs = [f"{command.split()[-1]} {flags.get('--worker', '')}".strip() for command, _, flags in parsed]
    assert [verb for verb in verbs if verb != "describe"] == [
        "delete", "create", "ssh all", "scp all", "ssh all", "ssh all", "ssh all", "ssh all", "ssh 0"
    ]  # fmt: skip
    assert "--force" in parsed[2][2]
    assert parsed[3][2].items() >= {
        "--node-id": "pod", "--accelerator-type": "v4-16", "--runtime-version": "tpu-ubuntu2204-base", "--spot": ""
    }.items()  # fmt: skip
    assert "# until the run ends with 0, 2 or 3, and 7 times after any other status (143, 255, 75, ...):" in text
    assert text.index("# at the end, and after a failure:") < text.rindex("describe")


def test_a_dry_run_prints_what_a_run_calls(host: Cloud) -> None:
    before = len(host.calls)
    arguments = ["run", "experiments/lenet.py", "it's", "$HOME * `id`", "two\nlines", ""]
    planned, done = host("--dry-run", *arguments), host(*arguments)
    assert done.returncode == 0, done.stderr
    commands = printed(planned.stdout)
    assert commands[0] == ["ssh-add", "-l"]
    assert [command[1:] for command in commands[1:]] == host.calls[before:]
    assert commands == printed(done.stderr)


def test_a_dry_run_without_a_command_is_that_of_a_launch(idle: Cloud) -> None:
    example = ["launch", "v6e-16", "--spot", "experiments/vision/lenet.py", "--workdir", "gs://bucket/lenet"]
    assert idle("--dry-run").stdout == idle("--dry-run", *example).stdout


def test_a_dry_run_needs_no_slice(idle: Cloud, tmp_path: Path) -> None:
    linked = tmp_path / SCRIPT
    linked.symlink_to(idle.repository / SCRIPT)
    command = ["bash", str(linked), "--dry-run", "install"]
    done = subprocess.run(command, env=idle.environment, capture_output=True, text=True, check=True)
    assert "name:dl_jax.tar.gz --worker=all --zone=zone --quiet" in done.stdout
    assert f" {idle.repository} {idle.commit()}\n" in done.stdout


def test_shellcheck_finds_nothing_in_what_workers_run(idle: Cloud) -> None:
    scripts = set()
    for command in COMMANDS.values():
        for call in printed(idle("--dry-run", "--data", "gs://bucket/tfds", "--env", "A=b", *command).stdout):
            scripts |= {word.removeprefix("--command=") for word in call if word.startswith("--command=")}
    assert len(scripts) == 8
    for script in scripts:
        # SC2050: a commit is compared with a file; SC2016: run.sh is expanded when it runs; SC2317, SC2329: not every
        # script calls all that it is given to call.
        assert shellcheck("--shell=bash", "--exclude=SC2050,SC2016,SC2317,SC2329", "-", text=script) == "", script
    starts = [script for script in scripts if "> run.sh" in script]
    assert len(starts) == 1  # launch and run start the same


@pytest.mark.parametrize("script", [SCRIPT, ".ci/run"])
def test_shellcheck_finds_nothing(script: str) -> None:
    assert shellcheck(str(ROOT / script)) == ""


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
        (["--restarts", "-1", "check"], "--restarts '-1'"),
        (["--restarts", "08", "check"], "--restarts '08'"),
        (["--pause", "1.5", "check"], "--pause '1.5'"),
        (["--pause", "08", "check"], "--pause '08'"),
        (["--data", "tfds", "install"], "--data 'tfds', expected a folder in a bucket"),
        (["--env", "check"], "--env check, but no such variable is set here"),
        (["--env", "A B=c", "check"], "--env 'A B=c', expected NAME=VALUE"),
        (["--env"], "--env '', expected NAME=VALUE"),
        (["create"], "a slice type comes first"),
        (["create", "v9-16"], "slice type 'v9-16', expected v4-N, v5litepod-N, v5p-N or v6e-N"),
        (["create", "tpu7x-16"], "docs/pods.md"),
        (["launch", "v4-16", "--spot"], "launch needs an experiment's file, not ''"),
        (["launch", "v4-16", "--node-id=x", "experiments/lenet.py"], "'--node-id=x' after launch, but"),
        (["launch", "v4-16", "--project", "x", "experiments/lenet.py"], "'--project' after launch, but"),
        (["create", "v4-16", "--accelerator-type=v4-8"], "'--accelerator-type=v4-8' after create"),
        (["launch", "experiments/lenet.py"], "a slice type comes first"),
        (["launch", "v4-16", "experiments/../x.py"], "launch needs an experiment's file"),
        (["install", "no-such-branch"], "no commit 'no-such-branch'"),
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
        assert "run needs an experiment's file" in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert idle.calls == []


@pytest.mark.parametrize("path", ["vision/lenet.py", "vision/../lenet.py", "./a/../b//../lenet.py", "..a/lenet.py"])
def test_run_takes_any_path_within_experiments(idle: Cloud, path: str) -> None:
    done = idle("--dry-run", "run", f"experiments/{path}")
    assert done.returncode == 0, done.stderr
    assert f"python experiments/{path} --cluster" in done.stdout


def test_without_gcloud_it_says_what_to_install(cloud: Cloud) -> None:
    (cloud.folder / "bin" / "gcloud").unlink()
    for tool in ("bash", "git", "dirname", "realpath"):
        (cloud.folder / "bin" / tool).symlink_to(shutil.which(tool) or "")
    cloud.environment["PATH"] = str(cloud.folder / "bin")
    done = cloud("check")
    assert done.returncode == 2
    assert "gcloud is not on the PATH" in done.stderr


@pytest.mark.parametrize("command", ["launch", "install", "check", "run", "stop"])
def test_without_the_key_in_an_agent_nothing_is_called(cloud: Cloud, command: str) -> None:
    (cloud.folder / ".ssh" / "google_compute_engine.pub").unlink()
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", cloud.folder / ".ssh" / "google_compute_engine"],
        input="y\n", text=True, capture_output=True, check=True,
    )  # fmt: skip
    another_key = cloud(*COMMANDS[command])
    cloud.environment["SSH_AUTH_SOCK"] = ""
    no_agent = cloud(*COMMANDS[command])
    for done in (another_key, no_agent):
        assert done.returncode == 2
        assert done.stderr.splitlines()[1:] == [
            "tpu_setup: ssh-agent does not hold gcloud's key; run: "
            f'eval "$(ssh-agent)" && ssh-add {cloud.folder}/.ssh/google_compute_engine'
        ]
    shutil.rmtree(cloud.folder / ".ssh")
    assert "gcloud has no ssh key; make it: ssh-keygen" in cloud(*COMMANDS[command]).stderr
    assert cloud.calls == []


# The gcloud that all of this is tested against.


def test_the_fake_refuses_what_the_reference_does_not_name(pod: Cloud) -> None:
    def gcloud(*arguments: str) -> subprocess.CompletedProcess:
        command = [str(pod.folder / "bin" / "gcloud"), *arguments]
        return subprocess.run(command, env=pod.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    ssh = ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z", "--worker=all", "--command=true"]
    assert gcloud(*ssh).returncode == 0
    refused = gcloud(*ssh, "--tunnel-through-iap")  # there is one, but only in the alpha version
    assert refused.returncode == 2
    assert "https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh" in refused.stderr
    assert gcloud(*ssh, "--internal-ip=yes").returncode == 2
    assert gcloud(*ssh[:4], "pod", "other").returncode == 2
    assert gcloud("compute", "tpus", "queued-resources", "suspend", "pod").returncode == 2
    pod.environment["SSH_AUTH_SOCK"] = ""
    assert "not present in the SSH agent" in gcloud(*ssh).stderr
    assert gcloud(*ssh, "--worker=0").returncode == 0


# The slice.


def test_every_call_names_slice_zone_and_project_and_asks_nothing(idle: Cloud) -> None:
    for command in COMMANDS.values():
        text = idle("--dry-run", "--project", "ours", "--internal-ip", *command).stdout
        for call in [call for call in printed(text) if call[0] == "gcloud"]:
            assert {"--zone=us-central2-b", "--project=ours", "--quiet"} <= set(call)
            assert any(word == "pod" or word.startswith("pod:") for word in call)
            assert ("--internal-ip" in call) == (call[4] in ("ssh", "scp"))


def test_the_slice_may_come_from_the_environment(cloud: Cloud) -> None:
    environment = {**cloud.environment, "TPU_NAME": "other", "TPU_ZONE": "europe-west4-a", "TPU_PROJECT": "theirs"}
    subprocess.run(["bash", str(cloud.repository / SCRIPT), "delete"], env=environment, check=True, capture_output=True)
    assert cloud.calls[-1][4:] == ["other", "--force", "--zone=europe-west4-a", "--project=theirs", "--quiet"]


def test_create_makes_a_slice_that_is_missing(cloud: Cloud) -> None:
    cloud.holds(**MISSING)
    done = cloud("create", "v6e-16", "--spot", "--valid-until-duration=6h")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create"]
    assert cloud.state == READY
    assert next(call[4:] for call in cloud.calls if call[3] == "create") == [
        "pod", "--node-id=pod", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot",
        "--valid-until-duration=6h", "--zone=us-central2-b", "--quiet",
    ]  # fmt: skip
    assert cloud("create", "v6e-16").returncode == 0
    assert cloud.verbs == ["create"]


@pytest.mark.parametrize(
    ("kind", "runtime"),  # https://cloud.google.com/tpu/docs/runtimes
    [
        ("v4-16", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_follows_from_the_type(idle: Cloud, kind: str, runtime: str) -> None:
    text = idle("--dry-run", "create", kind).stdout
    assert f" --accelerator-type={kind} --runtime-version={runtime} --zone" in text


def test_another_runtime_can_be_asked_for(idle: Cloud) -> None:
    for flags in (["--runtime-version=mine"], ["--runtime-version", "mine"]):
        text = idle("--dry-run", "create", "v9-16", *flags).stdout
        assert text.count("--runtime-version") == 1
        assert f" --accelerator-type=v9-16 {' '.join(flags)} " in text


def test_create_waits_in_the_queue_and_for_the_machines(cloud: Cloud) -> None:
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE CREATING", "ACTIVE CREATING", "ACTIVE"]
    cloud.holds(**MISSING, grants=[["ACCEPTED", *states]])
    executable(cloud.folder / "bin" / "sleep", '#!/usr/bin/env bash\necho "$1" >> "$FAKE_CLOUD/slept"\n')
    done = cloud("--pause", "8", *COMMANDS["create"])
    assert done.returncode == 0
    assert cloud.verbs == ["create"]
    assert (cloud.folder / "slept").read_text().split() == ["8", "16", "32", "60", "60"]
    assert "queued resource ACTIVE, slice CREATING" in done.stderr


def test_create_tries_again_and_looks_first(cloud: Cloud) -> None:
    cloud.holds(**MISSING)
    cloud.fails({"create": [[1, "no capacity"], [1, "connection lost"]]})
    done = cloud(*COMMANDS["create"])
    assert done.returncode == 0
    assert [call[3] for call in cloud.calls] == ["describe", "describe", "create"] * 3 + ["describe", "describe"]
    assert "no capacity" in done.stderr


def test_create_gives_up(cloud: Cloud) -> None:
    cloud.holds(**MISSING)
    cloud.fails({"create": [[7, "no capacity"]] * 9})
    executable(cloud.folder / "bin" / "sleep", '#!/usr/bin/env bash\necho "$1" >> "$FAKE_CLOUD/slept"\n')
    done = cloud("--attempts", "4", "--pause", "3", *COMMANDS["create"])
    assert done.returncode == 7
    assert cloud.verbs == ["create"] * 4
    assert "gave up after attempt 4" in done.stderr
    assert (cloud.folder / "slept").read_text().split() == ["3", "6", "12"]
    assert last_line(done) == "pod: no queued resource, no slice: nothing is billed"


def test_wrong_use_of_gcloud_is_not_tried_again(cloud: Cloud) -> None:
    cloud.holds(**MISSING)
    for command in (["create", "v4-16", "--spto"], ["launch", "v4-16", "--spto", "experiments/lenet.py"]):
        done = cloud(*command)
        assert done.returncode == 2
        assert "unrecognized arguments: --spto" in done.stderr
    assert cloud.verbs == ["create"] * 2


LOST = [
    ("FAILED", "MISSING"),
    ("SUSPENDED", "MISSING"),
    ("ACTIVE", "PREEMPTED"),
    ("ACTIVE", "MISSING"),
]


@pytest.mark.parametrize(("queue", "node"), LOST)
def test_create_tells_a_lost_slice_from_a_missing_one(cloud: Cloud, queue: str, node: str) -> None:
    cloud.holds(queue, node)
    done = cloud(*COMMANDS["create"])
    assert done.returncode == 2
    assert f"pod is lost (queued resource {queue}, slice {node}); run: {DELETE}" in done.stderr
    assert cloud.verbs == []


@pytest.mark.parametrize("command", ["create", "delete", "status"])
def test_an_unknown_state_is_not_a_missing_slice(cloud: Cloud, command: str) -> None:
    cloud.fails({"describe": [[1, "PERMISSION_DENIED: not yours"]] * 9})
    done = cloud("--attempts", "2", *COMMANDS[command])
    assert done.returncode == 1
    assert "PERMISSION_DENIED" in done.stderr
    assert f"pod: cannot tell whether it is billed; to be sure, run: {DELETE}" in done.stdout + done.stderr
    assert cloud.verbs == []


@pytest.mark.parametrize(
    ("queue", "node", "says"),
    [
        ("MISSING", "MISSING", "no queued resource, no slice: nothing is billed"),
        ("WAITING_FOR_RESOURCES", "MISSING", "queued resource WAITING_FOR_RESOURCES, no slice: nothing is billed now"),
        ("ACTIVE", "READY", "queued resource ACTIVE, slice READY: billed until it is deleted"),
        ("SUSPENDED", "PREEMPTED", "queued resource SUSPENDED, slice PREEMPTED: nothing is billed any more"),
        ("MISSING", "READY", "queued resource MISSING, slice READY: billed until it is deleted"),
    ],
)
def test_status_says_what_is_billed_and_delete_ends_it(cloud: Cloud, queue: str, node: str, says: str) -> None:
    cloud.holds(queue, node)
    done = cloud("--project", "ours", "status")
    assert done.returncode == 0
    assert done.stdout.startswith(f"pod: {says}")
    assert done.stdout.count("\n") == 1
    missing = queue == node == "MISSING"
    assert missing or done.stdout.endswith("./tpu_setup.sh --name pod --zone us-central2-b --project ours delete\n")
    for _ in range(2):
        assert cloud("delete").returncode == 0
    assert cloud.state == MISSING
    assert cloud.verbs == ([] if missing else ["delete"])


@pytest.mark.parametrize("command", COMMANDS)
def test_after_a_failure_the_last_line_says_what_is_billed(cloud: Cloud, command: str) -> None:
    cloud.fails({verb: [[7, "broken"]] * 9 for verb in ("ssh", "scp", "create", "delete")})
    if command == "create":
        cloud.holds(**MISSING)
    done = cloud("--attempts", "1", "--restarts", "1", *COMMANDS[command])
    if command != "status":
        assert done.returncode == 7
        assert last_line(done).startswith("pod: ")
        assert "billed" in last_line(done)
        assert command == "create" or last_line(done).endswith(DELETE)


# The environment.


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
    assert pod.verbs == ["ssh", "scp", "ssh"]
    assert pod("install").returncode == 0
    assert pod.verbs == ["ssh", "scp", "ssh", "ssh"]


def test_the_constraints_that_install_names_exist() -> None:
    assert "src/constraints-py312-latest.txt" in (ROOT / SCRIPT).read_text()
    assert (ROOT / "constraints-py312-latest.txt").is_file()


def test_install_can_go_back_and_keeps_what_experiments_wrote(host: Cloud) -> None:
    (host.home() / "runs").mkdir()
    (host.home() / "src" / "stale.py").touch()
    assert host("install", host.commit("HEAD~1")[:10]).returncode == 0
    assert (host.home() / "src" / "pyproject.toml").read_text() == "first"
    assert (host.home() / "runs").is_dir()
    assert not (host.home() / "src" / "stale.py").exists()


def test_install_survives_failing_transfers(cloud: Cloud) -> None:
    cloud.fails({"scp": [[1, "broken pipe"]] * 2, "ssh": [None, [255, "timed out"]]})
    assert cloud("install").returncode == 0
    assert cloud.verbs == ["ssh"] + ["scp"] * 3 + ["ssh"] * 2


def test_an_install_that_fails_on_one_worker_fails(pod: Cloud) -> None:
    (pod.home(1) / "tools" / "bin").mkdir(parents=True)
    executable(pod.home(1) / "tools" / "bin" / "uv", "#!/usr/bin/env bash\nexit 2\n")
    for _ in range(2):
        done = pod("--attempts", "2", "install")
        assert done.returncode == 1
        assert "on all workers of pod" not in done.stderr
    assert pod.verbs == ["ssh", "scp", "ssh", "ssh"] * 2


def test_an_archive_that_cannot_be_read_is_not_installed(host: Cloud) -> None:
    executable(host.folder / "worker-bin" / "tar", "#!/usr/bin/env bash\nmkdir src; touch src/pyproject.toml; exit 2\n")
    assert host("--attempts", "2", "install", host.commit("HEAD~1")).returncode == 1
    assert not (host.home() / "installed").exists()


def test_an_install_that_failed_is_not_taken_for_the_one_before(host: Cloud) -> None:
    executable(host.home() / "tools" / "bin" / "uv", "#!/usr/bin/env bash\nexit 2\n")
    assert host("--attempts", "1", "install", host.commit("HEAD~1")).returncode == 1
    shutil.rmtree(host.home() / "tools")
    assert host("install").returncode == 0
    assert (host.home() / "src" / "pyproject.toml").read_text() == "second"


def test_nothing_is_left_behind_here(cloud: Cloud) -> None:
    before = set(cloud.folder.iterdir())
    assert cloud("install").returncode == 0
    assert set(cloud.folder.iterdir()) - before == {cloud.folder / "calls"}


def test_data_are_copied_to_every_worker_and_found_there(hosts: Cloud) -> None:
    mnist = hosts.folder / "gs" / "bucket" / "tfds" / "mnist"
    mnist.mkdir(parents=True)
    (mnist / "a.array_record").write_text("images")
    assert hosts("--data", "gs://bucket/tfds", "install").returncode == 0
    assert hosts(*RUN).returncode == 0
    for worker in range(2):
        assert (hosts.home(worker) / "data" / "mnist" / "a.array_record").read_text() == "images"
        environment = (hosts.home(worker) / "environment").read_text().split("\0")
        assert f"TFDS_DATA_DIR={hosts.home(worker)}/data" in environment
    assert hosts("--env", "TFDS_DATA_DIR=gs://bucket/tfds", *RUN).returncode == 0
    assert "TFDS_DATA_DIR=gs://bucket/tfds" in (hosts.home() / "environment").read_text().split("\0")
    missing = hosts("--attempts", "1", "--data", "gs://bucket/none", "install")
    assert missing.returncode == 1
    assert "no such file" in missing.stderr


def test_check_fails_where_a_worker_does(hosts: Cloud) -> None:
    assert hosts("check").returncode == 0
    assert "jax.distributed.initialize()" in (hosts.home(0) / "arguments").read_text()
    hosts.ends(0, 1)
    done = hosts("check")
    assert done.returncode == 1
    assert hosts.commit()[:7] in done.stdout


# A run.


def test_arguments_and_environment_reach_the_experiment_untouched(hosts: Cloud) -> None:
    arguments = ["--note", 'it\'s a "test"', "$HOME $(touch pwned) `id`", "*", "a\nb", "", "ü|&;<>\\", "--x=1 2"]
    hosts.environment["TOKEN"] = "a'b $(touch pwned)\n*\n"
    variables = ["--env", "TOKEN", "--env", "FLAGS=--a=1 '--b'", "--env", "NONE="]
    done = hosts(*variables, "run", "experiments/lenet.py", *arguments)
    assert done.returncode == 0
    for worker in range(2):
        got = (hosts.home(worker) / "arguments").read_text().split("\0")[:-1]
        assert got == ["experiments/lenet.py", *arguments, "--cluster"]
        environment = (hosts.home(worker) / "environment").read_text().split("\0")
        given = {"TOKEN=a'b $(touch pwned)\n*\n", "FLAGS=--a=1 '--b'", "NONE="}
        assert {"PYTHONUNBUFFERED=1", *given} <= set(environment)
    assert not list(hosts.folder.rglob("pwned"))


@pytest.mark.parametrize("status", [0, 143])
def test_run_ends_with_the_experiments_status_and_runs_it_once(hosts: Cloud, status: int) -> None:
    hosts.ends(status)
    done = hosts(*RUN)
    assert done.returncode == status
    assert hosts.runs == 1
    assert done.stdout == "run 1 on worker0\nrun 1 ends\n"
    assert (hosts.home(1) / "run.log").read_text() == "run 1 on worker1\nrun 1 ends\n"
    assert last_line(done) == f"pod: queued resource ACTIVE, slice READY: billed until it is deleted: {DELETE}"
    assert hosts(*RUN).returncode == 0
    assert (hosts.home() / "run.log").read_text() == "run 2 on worker0\nrun 2 ends\n"
    assert (hosts.home() / "run.log.1").read_text() == "run 1 on worker0\nrun 1 ends\n"


def test_run_before_install_says_so(cloud: Cloud) -> None:
    done = cloud(*RUN)
    assert done.returncode == 2
    assert "\nnothing is installed on " in done.stderr


def test_a_lost_connection_ends_nothing_and_the_same_command_follows_again(hosts: Cloud) -> None:
    hosts.ends("wait", 1)
    hosts.fails({"ssh 0": ["cut"]})
    done = hosts(*RUN)
    assert done.returncode == 255
    assert "the run goes on, and the same command follows it again" in done.stderr
    with hosts.during(*RUN) as following:
        assert following.stdout
        assert following.stdout.readline() == "run 1 on worker0\n"
        hosts.end()
        assert following.wait(timeout=20) == 0
        assert following.stdout.read() == "run 1 ends\n"
    assert hosts.runs == 1
    assert hosts(*RUN).returncode == 1  # it has ended: the same command resumes it
    assert hosts.runs == 2


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_ending_the_launching_side_ends_nothing(hosts: Cloud, sent: signal.Signals) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it is ignored, also by children
    hosts.ends("wait")
    with hosts.during(*COMMANDS["launch"]) as launching:
        assert launching.stdout
        assert launching.stdout.readline() == "run 1 on worker0\n"
        wait_for(hosts.home(1) / "ready")
        os.killpg(launching.pid, sent)  # as a terminal does: gcloud too
        assert launching.wait(timeout=20) != 0
        for worker in range(2):
            assert Path("/proc", (hosts.home(worker) / "run.pid").read_text().strip()).exists()
    assert hosts(*COMMANDS["launch"]).returncode == 0
    for worker in range(2):
        assert not (hosts.home(worker) / "saved").exists()
        assert any("run 1 ends" in log.read_text() for log in hosts.home(worker).glob("run.log*"))


def test_a_running_experiment_is_left_alone_until_it_is_stopped(host: Cloud) -> None:
    host.ends("wait")
    with host.during(*RUN) as running:
        wait_for(host.home() / "ready")
        for command in (["run", "experiments/lenet.py"], ["--env", "A=b", *RUN], ["install", host.commit("HEAD~1")]):
            done = host(*command)
            assert done.returncode == 2
            assert "\nan experiment is running on " in done.stderr
        assert host("stop").returncode == 0
        assert running.wait(timeout=20) == 143
        assert (host.home() / "saved").exists()
    assert "nothing runs" in host("stop").stdout
    assert host(*RUN).returncode == 0
    assert host.runs == 2


def test_commands_that_gcloud_sends_twice_run_an_experiment_once(pod: Cloud) -> None:
    pod.fails({"ssh": ["drop"] * 20})
    pod.ends(3)
    assert pod(*COMMANDS["launch"]).returncode == 3
    assert pod.runs == 1
    assert pod(*RUN).returncode == 0
    assert pod("stop").returncode == 0
    assert pod.runs == 2


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, 75)])
def test_what_a_host_that_shuts_down_leaves_behind(host: Cloud, sent: signal.Signals, status: int) -> None:
    host.ends("wait")
    with host.during(*RUN) as running:
        wait_for(host.home() / "ready")
        os.killpg(int((host.home() / "run.pid").read_text()), sent)  # all of its processes
        err = running.communicate(timeout=20)[1]
        assert running.returncode == status
        assert ("\nthe run on " in err) == (status == 75)
    assert host(*RUN).returncode == 0


def test_fetch_from_a_bucket_and_from_a_worker(cloud: Cloud) -> None:
    for folder in (cloud.folder / "gs" / "bucket" / "lenet", cloud.home() / "runs" / "lenet"):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(str(folder))
    cloud.fails({"cp": [[1, "connection lost"]]})
    assert cloud("fetch", "gs://bucket/lenet", "results").returncode == 0
    assert cloud.calls == [["storage", "cp", "--recursive", "gs://bucket/lenet", "results", "--quiet"]] * 2
    assert "gs/bucket" in (cloud.folder / "results" / "result.json").read_text()
    assert cloud("fetch", "runs/lenet", "fetched").returncode == 0
    assert "worker0" in (cloud.folder / "fetched" / "result.json").read_text()
    assert cloud.calls[-1][3:] == [
        "scp", "--recurse", "pod:dl_jax/runs/lenet", "fetched", "--worker=0", "--zone=us-central2-b", "--quiet"
    ]  # fmt: skip


# A run that is started again.


@pytest.mark.parametrize("status", [2, 3])
def test_launch_rents_installs_and_runs_once(pod: Cloud, status: int) -> None:
    pod.holds(**MISSING)
    pod.ends(status)
    done = pod(*COMMANDS["launch"])
    assert done.returncode == status
    assert pod.verbs == ["create", "ssh", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert pod.runs == 1
    assert done.stdout == "run 1 on worker0\nrun 1 ends\n"
    assert last_line(done) == f"pod: queued resource ACTIVE, slice READY: billed until it is deleted: {DELETE}"


def test_launch_starts_again_what_was_cut_off(hosts: Cloud) -> None:
    hosts.ends(143, 75, 1, 3)
    done = hosts(*COMMANDS["launch"])
    assert done.returncode == 3
    assert hosts.runs == 4
    assert "restart 1 of 10 after status 143" in done.stderr
    assert "restart 3 of 10 after status 1" in done.stderr
    assert hosts.verbs.count("scp") == 0


def test_launch_gives_up_after_so_many_restarts(hosts: Cloud) -> None:
    hosts.ends(*[75] * 9)
    done = hosts("--restarts", "1", *COMMANDS["launch"])
    assert done.returncode == 75
    assert hosts.runs == 2
    assert "gave up after 1 restarts (status 75)" in done.stderr
    assert last_line(done).endswith(DELETE)


def test_launch_follows_again_after_a_lost_connection(hosts: Cloud) -> None:
    hosts.ends("wait")
    hosts.fails({"ssh 0": ["cut", [255, "still no connection"]]})
    with hosts.during(*COMMANDS["launch"]) as launching:
        wait_for(hosts.home(1) / "ready")
        while len([call for call in hosts.calls if "--worker=0" in call]) < 2:
            time.sleep(0.02)
        hosts.end()  # it ends while nobody follows
        out, err = launching.communicate(timeout=20)
    assert launching.returncode == 0
    assert out.endswith("run 1 on worker0\nrun 1 ends\n")
    assert "restart 2 of 10 after status 255" in err
    assert hosts.runs == 1


def test_launch_makes_a_preempted_slice_anew(pod: Cloud) -> None:
    pod.holds(**MISSING, grants=[["ACTIVE"], ["WAITING_FOR_RESOURCES", "ACTIVE"]])
    pod.ends("wait", 3)
    pod.fails({"ssh 0": ["preempt"]})
    done = pod(*COMMANDS["launch"])
    assert done.returncode == 3
    assert "pod is lost (queued resource SUSPENDED, slice PREEMPTED); making it anew" in done.stderr
    assert " ".join(pod.verbs) == "create ssh scp ssh ssh ssh ssh delete create ssh scp ssh ssh ssh"
    assert pod.runs == 2
    assert pod.state == READY
    assert "--force" in next(call for call in pod.calls if call[3] == "delete")


def test_launch_adopts_a_run_that_goes_on(hosts: Cloud) -> None:
    hosts.ends("wait")
    hosts.fails({"ssh 0": ["cut"]})
    assert hosts(*RUN).returncode == 255
    with hosts.during(*COMMANDS["launch"]) as launching:
        assert launching.stdout
        assert launching.stdout.readline() == "run 1 on worker0\n"
        hosts.end()
        assert launching.wait(timeout=20) == 0
    assert hosts.runs == 1
    assert hosts.verbs.count("scp") == 0


def test_launch_makes_a_lost_slice_anew(cloud: Cloud) -> None:
    cloud.holds("ACTIVE", "PREEMPTED")
    assert cloud(*COMMANDS["launch"]).returncode == 0
    assert cloud.verbs[:2] == ["delete", "create"]
    assert cloud.state == READY


def test_a_request_that_is_never_filled_is_given_up(cloud: Cloud) -> None:
    cloud.holds(**MISSING, grants=[["WAITING_FOR_RESOURCES", "FAILED"]] * 9)
    done = cloud("--attempts", "2", "--restarts", "0", *COMMANDS["launch"])
    assert done.returncode == 1
    assert cloud.verbs == ["create", "delete", "create"]
    assert last_line(done).startswith("pod: queued resource FAILED, no slice: nothing is billed now")


def test_stop_ends_the_supervisor_too(hosts: Cloud) -> None:
    hosts.ends("wait")
    with hosts.during(*COMMANDS["launch"]) as launching:
        wait_for(hosts.home(0) / "ready")
        wait_for(hosts.home(1) / "ready")
        assert hosts("stop").returncode == 0
        err = launching.communicate(timeout=20)[1]
    assert launching.returncode == 2
    assert "\nthe run was ended with ./tpu_setup.sh stop" in err
    assert hosts.runs == 1
    assert hosts(*COMMANDS["launch"]).returncode == 0
    assert hosts.runs == 2


def test_what_is_left_of_a_run_is_ended_before_it_starts_again(hosts: Cloud) -> None:
    hosts.ends("wait", 0)
    with hosts.during(*COMMANDS["launch"]) as launching:
        for worker in range(2):
            wait_for(hosts.home(worker) / "ready")
        subprocess.run(["pkill", "-TERM", "-P", (hosts.home(0) / "run.pid").read_text().strip()], check=True)
        assert launching.wait(timeout=20) == 0
    assert (hosts.home(1) / "saved").exists()
    assert hosts.runs == 2


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("stop", "the run was ended with ./tpu_setup.sh stop"),
        ("delete", "tpu_setup: pod was deleted meanwhile; the same"),
    ],
)
def test_between_two_runs_the_supervisor_can_be_ended(hosts: Cloud, command: str, says: str) -> None:
    hosts.ends(1)
    pause = '#!/usr/bin/env bash\ntouch "$FAKE_CLOUD/paused"; until [[ -e $FAKE_CLOUD/go ]]; do /bin/sleep 0.02; done\n'
    executable(hosts.folder / "bin" / "sleep", pause)
    executable(hosts.folder / "worker-bin" / "sleep", '#!/usr/bin/env bash\nexec /bin/sleep "$@"\n')
    with hosts.during(*COMMANDS["launch"]) as launching:
        wait_for(hosts.folder / "paused")
        assert hosts(command).returncode == 0
        hosts.end()
        assert f"\n{says}" in launching.communicate(timeout=20)[1]
    assert launching.returncode == 2
    assert hosts.runs == 1
    assert hosts.verbs.count("create") == 0


def test_no_run_is_started_beside_one_that_does_not_end(idle: Cloud, tmp_path: Path) -> None:
    commands = printed(idle("--dry-run", *COMMANDS["launch"]).stdout)
    [again] = [w.partition("=")[2] for command in commands for w in command if "run.stopped ]" in w]
    (tmp_path / "dl_jax").mkdir()
    deaf = subprocess.Popen(["bash", "-c", ": run.sh; trap '' TERM; (read -r); :"], stdin=subprocess.PIPE)
    (tmp_path / "dl_jax" / "run.pid").write_text(str(deaf.pid))
    done = subprocess.run(["bash", "-c", f"sleep() {{ :; }}\n{again}"], cwd=tmp_path, capture_output=True, text=True)
    deaf.communicate()
    assert done.returncode == 1
    assert f"process {deaf.pid} is still running on " in done.stderr
    assert (tmp_path / "dl_jax" / "run.pid").exists()
