"""A gcloud of ours, for tests of tpu_setup.sh: a queue, a slice, and workers on which scripts really run.

It is strict where Google's is: a flag that is not in its reference is refused, ssh to several workers needs an agent
that holds the key, and a slice that is not READY cannot be reached. The folder $FAKE_CLOUD has `calls` (a line of JSON
each), `state` (of queue and slice), `faults` (what happens to the calls of a verb, one after the other), worker0,
worker1, ... (the workers' homes) and gs (the buckets). It starts hundreds of times in a test run; it imports little.
"""

import json
import os
import sys
from pathlib import Path

REFERENCE = "https://cloud.google.com/sdk/gcloud/reference"
WIDE = """--account= --billing-project= --configuration= --flags-file= --flatten= --format= --help
--impersonate-service-account= --log-http --project= --quiet --trace-token= --user-output-enabled --verbosity="""
SSH = """--dry-run --force-key-file-overwrite --internal-ip --plain --ssh-key-file= --strict-host-key-checking=
--worker= --zone= --ssh-key-expiration= --ssh-key-expire-after="""

# Per command: its page below REFERENCE, how many positional arguments it takes, and the flags that its synopsis there
# names, `=` for those with a value. Of `storage` only those in use.
TABLE = {
    "compute tpus queued-resources create": (
        "/compute/tpus/queued-resources/create",
        1,
        """--zone= --runtime-version= --accelerator-type= --topology= --type= --node-id= --node-count= --node-prefix=
        --async --boot-disk= --data-disk= --description= --guaranteed --internal-ips --labels= --metadata=
        --metadata-from-file= --network= --range= --reserved --scopes= --service-account= --shielded-secure-boot --spot
        --subnetwork= --tags= --valid-after-duration= --valid-after-time= --valid-until-duration= --valid-until-time=
        --reservation-host-folder= --reservation-host-organization= --reservation-host-project=""",
    ),
    "compute tpus queued-resources describe": ("/compute/tpus/queued-resources/describe", 1, "--zone="),
    "compute tpus queued-resources delete": ("/compute/tpus/queued-resources/delete", 1, "--zone= --async --force"),
    "compute tpus tpu-vm describe": ("/compute/tpus/tpu-vm/describe", 1, "--zone="),
    "compute tpus tpu-vm delete": ("/compute/tpus/tpu-vm/delete", 1, "--zone= --async"),
    "compute tpus tpu-vm ssh": (
        "/compute/tpus/tpu-vm/ssh",
        1,
        f"{SSH} --ssh-flag= --command= --output-directory=",
    ),
    "compute tpus tpu-vm scp": ("/compute/tpus/tpu-vm/scp", 2, f"{SSH} --scp-flag= --compress --recurse"),
    "storage cp": ("/storage/cp", 2, "--recursive"),
    "storage rsync": ("/storage/rsync", 2, "--recursive"),
}


def parse(arguments: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """(command, positional arguments, flags). Ends as gcloud does, with status 2, where its reference knows no such."""
    words = next((n for n in (2, 4) if " ".join(arguments[:n]) in TABLE), 0)
    if not words:
        fail(2, f"Invalid choice: {arguments}")
    command = " ".join(arguments[:words])
    page, count, known = TABLE[command]
    takes_value = {flag.rstrip("="): flag.endswith("=") for flag in f"{WIDE} {known}".split()}
    positional: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(arguments[words:])
    for word in rest:
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif flag not in takes_value or (equals and not takes_value[flag]):
            fail(2, f"unrecognized arguments: {word}; see {REFERENCE}{page}")
        else:
            flags[flag] = value if equals or not takes_value[flag] else next(rest)
    if len(positional) != count:
        fail(2, f"expected {count} arguments, not {positional}; see {REFERENCE}{page}")
    return command, positional, flags


def fail(status: int, message: str) -> None:
    """Ends as gcloud does."""
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(status)


class Cloud:
    """What is left from one call to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = json.loads((folder / "state").read_text())
        self.workers = sorted(folder.glob("worker[0-9]"))

    def write(self, name: str, value: dict) -> None:
        """Whole or not at all: a test may kill us at any time."""
        (self.folder / f"{name}.new").write_text(json.dumps(value))
        os.replace(self.folder / f"{name}.new", self.folder / name)

    def save(self) -> None:
        self.write("state", self.state)

    def fault(self, *verbs: str) -> object:
        """What is to happen to this call: None, [status, message], "drop", "cut" or "preempt"."""
        faults = json.loads((self.folder / "faults").read_text())
        verb = next((verb for verb in verbs if faults.get(verb)), None)
        if verb is None:
            return None
        found = faults[verb].pop(0)
        self.write("faults", faults)
        return found

    def end_workers(self) -> None:
        """Their machines are gone, with all that runs there; a host that is shut down first ends processes in order."""
        import signal
        import subprocess
        import time

        for pid in [int(path.read_text()) for path in self.folder.glob("worker*/dl_jax/run.pid") if path.read_text()]:
            subprocess.run(["pkill", "-TERM", "-P", str(pid)])
            deadline = time.monotonic() + 2
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            if Path(f"/proc/{pid}").exists():
                os.killpg(pid, signal.SIGKILL)

    def create(self, name: str, flags: dict[str, str]) -> None:
        for needed in ("--zone", "--node-id", "--accelerator-type", "--runtime-version"):
            if not flags.get(needed):
                fail(2, f"argument {needed}: Must be specified.")
        if self.state["queue"] != "MISSING":
            fail(1, f"ALREADY_EXISTS: Resource '{name}' already exists")
        grants = self.state["grants"]
        self.state |= {"queue": "WAITING_FOR_RESOURCES", "next": grants.pop(0) if grants else ["ACTIVE"]}
        self.save()

    def describe(self, what: str, name: str, flags: dict[str, str]) -> None:
        assert flags["--format"] == {"queue": "value(state.state)", "node": "value(state)"}[what]
        if what == "queue" and self.state["next"]:
            self.state["queue"], _, node = self.state["next"].pop(0).partition(" ")
            if self.state["queue"] == "ACTIVE":
                self.state["node"] = node or "READY"
            self.save()
        if self.state[what] == "MISSING":
            fail(1, f"NOT_FOUND: Resource '{name}' was not found")
        print(self.state[what])

    def delete(self, what: str, name: str, flags: dict[str, str]) -> None:
        import shutil

        if self.state[what] == "MISSING":
            fail(1, f"NOT_FOUND: Resource '{name}' was not found")
        if what == "queue" and self.state["node"] != "MISSING" and "--force" not in flags:
            fail(1, f"FAILED_PRECONDITION: '{name}' has running nodes")
        self.end_workers()
        for worker in self.workers:
            shutil.rmtree(worker)
            worker.mkdir()
        self.state |= {"queue": "MISSING", "node": "MISSING", "next": []}
        self.save()

    def reachable(self, flags: dict[str, str]) -> list[Path]:
        """The workers that --worker names."""
        import subprocess

        if self.state["node"] != "READY":
            fail(1, f'This TPU has terminal state "{self.state["node"]}", so it cannot be used anymore.')
        which = flags.get("--worker", "0")
        workers = self.workers if which == "all" else [self.workers[int(which)]]
        if len(workers) > 1:
            key = Path(os.environ["HOME"], ".ssh", "google_compute_engine")
            mine = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True).stdout.split()
            held = subprocess.run(["ssh-add", "-l"], capture_output=True, text=True).stdout.split()
            if not mine or mine[1] not in held:
                fail(1, f'SSH Key is not present in the SSH agent. Please run "ssh-add {key}" to add it.')
        return workers

    def ssh(self, flags: dict[str, str], fault: object) -> int:
        """As gcloud: the status of the first worker that failed; a command whose connection broke is sent again."""
        import subprocess
        import time

        workers = self.reachable(flags)
        statuses = []
        for worker in workers * 2 if fault == "drop" else workers:
            path = f"{self.folder / 'worker-bin'}:{os.environ['PATH']}"
            environment = {**os.environ, "HOME": str(worker), "PATH": path}
            process = subprocess.Popen(["bash", "-c", flags["--command"]], cwd=worker, env=environment)
            if fault in ("cut", "preempt"):
                deadline = time.monotonic() + 20
                while not (worker / "dl_jax" / "ready").exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                process.kill()
                if fault == "preempt":
                    self.state |= {"queue": "SUSPENDED", "node": "PREEMPTED"}
                    self.save()
                    self.end_workers()
                fail(255, "[/usr/bin/ssh] exited with return code [255].")
            statuses.append(process.wait())
        return next((status for status in statuses[-len(workers) :] if status), 0)

    def scp(self, source: str, target: str, flags: dict[str, str]) -> None:
        import shutil

        for worker in self.reachable(flags):
            if ":" in target:
                shutil.copy(source, worker / target.split(":")[1])
            else:
                self.copy(worker / source.split(":")[1], Path(target))

    def storage(self, source: str, target: str) -> None:
        self.copy(self.folder / "gs" / source.removeprefix("gs://"), Path(target))

    def copy(self, source: Path, target: Path) -> None:
        import shutil

        if not source.exists():
            fail(1, f"no such file: {source}")
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)


def main(arguments: list[str]) -> int:
    folder = Path(os.environ["FAKE_CLOUD"])
    assert sys.stdin.read() == ""
    with open(folder / "calls", "a") as log:
        print(json.dumps(arguments), file=log)
    command, positional, flags = parse(arguments)
    cloud = Cloud(folder)
    verb = command.split()[-1]
    fault = cloud.fault(f"{verb} {flags.get('--worker', '')}", verb)
    if isinstance(fault, list):
        fail(*fault)
    what = "queue" if "queued-resources" in command else "node"
    match verb:
        case "create":
            cloud.create(positional[0], flags)
        case "describe":
            cloud.describe(what, positional[0], flags)
        case "delete":
            cloud.delete(what, positional[0], flags)
        case "ssh":
            return cloud.ssh(flags, fault)
        case "scp":
            cloud.scp(*positional, flags)
        case "cp" | "rsync":
            cloud.storage(*positional)
    return 0


def run(arguments: list[str]) -> None:
    """Ends the process with a status, also at Ctrl-C: its caller cannot tell this from another failure."""
    try:
        sys.exit(main(arguments))
    except KeyboardInterrupt:
        sys.exit(1)
