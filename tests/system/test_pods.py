"""docs/pods.md and its examples: scripts run, manifests are read, commands are those of tpu_setup.sh."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl_jax.harness.flags import Common

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pods.md"
EXAMPLES = ROOT / "docs" / "examples"
SBATCH = EXAMPLES / "lenet.sbatch"
ENDS = [2, 3]  # besides 0, the statuses after which a run is not started again: docs/scale.md


def manifests(name: str) -> list[Any]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def jobs() -> dict[str, Any]:
    """The specification of the Job in each example."""
    [jobset], [_, job] = manifests("tpu-jobset.yaml"), manifests("gpu-job.yaml")
    return {"tpu-jobset": jobset["spec"]["replicatedJobs"][0]["template"]["spec"], "gpu-job": job["spec"]}


def test_every_example_is_on_the_page_and_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text())
    local = {link.partition("#")[0] for link in links if not link.startswith("http")} - {""}
    assert all((PAGE.parent / link).exists() for link in local)
    assert {f"examples/{path.name}" for path in EXAMPLES.iterdir()} <= local


def test_the_commands_on_the_page_are_those_of_the_script() -> None:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL))
    commands = re.findall(r"^\./tpu_setup\.sh (.*)$", blocks, re.MULTILINE)
    assert len(commands) > 8
    environment = {**os.environ, "TPU_NAME": "pod", "TPU_ZONE": "us-east1-d"}
    for command in commands:
        words = [str(ROOT / "tpu_setup.sh"), "--dry-run", *shlex.split(command)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("+ ")


def test_images_on_the_page_are_those_that_the_script_chooses() -> None:
    table = dict(re.findall(r"\| `([\w]+)-N` \| [N/2]+ \| `([\w-]+)` \|", PAGE.read_text()))
    assert set(table) == {"v4", "v5litepod", "v5p", "v6e"}
    for kind, image in table.items():
        words = [str(ROOT / "tpu_setup.sh"), "--dry-run", "create", f"{kind}-16"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert f" --runtime-version={image} " in done.stdout


def test_shellcheck_finds_nothing_in_the_sbatch_script() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, str(SBATCH)], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (143, 0, True), (75, 19, True), (137, 1, True), (143, 20, False)],
)
def test_the_sbatch_script_requeues_what_may_go_on(tmp_path: Path, status: int, restarts: int, requeued: bool) -> None:
    for name, ends in (("srun", status), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*"\nexit {ends}\n')
        program.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm}
    done = subprocess.run([SBATCH, "--dataset", "mnist"], env=environment, capture_output=True, text=True)
    run, *after = done.stdout.splitlines()
    assert run == "srun python experiments/vision/lenet.py --cluster --workdir /shared/lenet --dataset mnist"
    assert after == (["scontrol requeue 7"] if requeued else [])
    assert done.returncode == status


@pytest.mark.parametrize("name", ["tpu-jobset", "gpu-job"])
def test_a_job_runs_an_experiment_and_ends_after_the_right_statuses(name: str) -> None:
    spec = jobs()[name]
    [container] = spec["template"]["spec"]["containers"]
    ends, *_ = spec["podFailurePolicy"]["rules"]
    assert ends["action"] == "FailJob"
    assert ends["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": ENDS}
    assert spec["parallelism"] == spec["completions"]
    python, experiment, *flags = container["command"]
    assert python == "python"
    assert (ROOT / experiment).exists()
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Common)}
    assert {flag for flag in flags if flag.startswith("--")} <= known


def test_the_jobset_restarts_all_hosts_unless_the_run_has_ended() -> None:
    [jobset] = manifests("tpu-jobset.yaml")
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert jobs()["tpu-jobset"]["backoffLimit"] == 0


def test_the_pods_of_the_gpu_job_find_each_other() -> None:
    service, job = manifests("gpu-job.yaml")
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert set(variables) == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    host, _, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert port.isdecimal()
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(job["spec"]["completions"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_knows_every_field(version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "lenet"}, "spec": jobs()["tpu-jobset"]}
    for manifest in [*manifests("gpu-job.yaml"), inner]:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version
