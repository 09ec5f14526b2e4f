"""The checklist of a release, in two commands.

    python .ci/release.py prepare 0.2.0

sets the version, dates the section of CHANGELOG.md that is "unreleased", and writes to tests/golden/0.2.0 what later
releases have to read. Commit what it changed. Then

    python .ci/release.py check

looks whether these agree, runs `.ci/run --all` (the whole suite on both rows of versions with slow tests, plans, golden
files, the source distribution, the wheel and the Dockerfile's lines; style, types, the results page), and ends with the
one command that is left, `git tag`. Neither commits, tags or sends anything.
"""

import argparse
import datetime
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dl_jax" / "__init__.py"
CHANGELOG = ROOT / "CHANGELOG.md"
CITATION = ROOT / "CITATION.cff"
GOLDEN = ROOT / "tests" / "golden"
VERSION = re.compile(r"\d+\.\d+\.\d+")
HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\] - (?P<date>.+)$", re.M)
UNRELEASED = "unreleased"


class Refused(Exception):
    """What is not ready for a release: what was found, what was expected, what to do."""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def require_clean() -> None:
    """Raises Refused where a file is changed or not committed."""
    if changed := git("status", "--porcelain").splitlines():
        raise Refused(f"{len(changed)} files are not committed, such as {changed[0][3:]}; commit or remove them")


def require_newer(version: str) -> None:
    """Raises Refused unless `version` is MAJOR.MINOR.PATCH, and newer than every tag."""
    if not VERSION.fullmatch(version):
        raise Refused(f"the version is {version!r}, expected MAJOR.MINOR.PATCH; give another")
    tags = [tag[1:] for tag in git("tag", "--list", "v*").split() if VERSION.fullmatch(tag[1:])]
    last = max(tags, key=order, default=None)
    if last and order(version) <= order(last):
        raise Refused(f"the version is {version}, expected one after v{last}, the last tag; give a newer one")


def top_section() -> re.Match[str]:
    """The heading of the first section of the changelog. Raises Refused where nothing is below it."""
    text = CHANGELOG.read_text()
    first, *others = [*HEADING.finditer(text), None]
    if first is None:
        raise Refused(f"CHANGELOG.md has no section, expected '## [VERSION] - {UNRELEASED}'; write one")
    end = others[0].start() if others[0] else len(text)
    if not re.search(r"^- ", text[first.end() : end], re.M):
        raise Refused(f"the section {first['version']} of CHANGELOG.md is empty, expected what changed; write it")
    return first


def package_version() -> str:
    [found] = re.findall(r'^__version__ = "(.+)"$', PACKAGE.read_text(), re.M)
    return found


def cited_version() -> str | None:
    """The version in CITATION.cff, if there is one."""
    found = re.search(r"^version: (.+)$", CITATION.read_text(), re.M)
    return found[1] if found else None


def prepare(version: str) -> None:
    """Writes what a release changes. Raises Refused before anything is written."""
    require_clean()
    require_newer(version)
    section = top_section()
    if section["date"] != UNRELEASED:
        raise Refused(f"the section {section['version']} of CHANGELOG.md has a date, expected '{UNRELEASED}'; add one")
    if (GOLDEN / version).exists():
        raise Refused(f"tests/golden/{version} is there already, expected none; a release is written once")
    began = time.monotonic()
    today = datetime.date.today().isoformat()
    replaced = {PACKAGE: (r'^__version__ = ".+"$', f'__version__ = "{version}"')}
    replaced[CHANGELOG] = (re.escape(section[0]), f"## [{version}] - {today}")
    for path, (pattern, line) in replaced.items():
        path.write_text(re.sub(pattern, line, path.read_text(), count=1, flags=re.M))
    text = re.sub(r"^version: .+$", f"version: {version}", CITATION.read_text(), flags=re.M)
    CITATION.write_text(re.sub(r"^date-released: .+$", f"date-released: {today}", text, flags=re.M))
    writer = [sys.executable, "tests/unit/golden_files.py", f"tests/golden/{version}"]
    subprocess.run(writer, cwd=ROOT, check=True)
    print(f"version, changelog and tests/golden/{version} are written ({time.monotonic() - began:.0f} s)")
    print(f"git add -A && git commit -m 'Version {version}'")


def check() -> None:
    """Raises Refused where something is not ready."""
    require_clean()
    version = package_version()
    require_newer(version)
    section = top_section()
    if section["version"] != version:
        raise Refused(f"CHANGELOG.md begins with {section['version']}, expected {version}, the package's; run prepare")
    if section["date"] == UNRELEASED:
        raise Refused(f"the section {version} of CHANGELOG.md is {UNRELEASED}, expected its date; run prepare")
    if (cited := cited_version()) != version:
        raise Refused(f"CITATION.cff has version {cited}, expected {version}, the package's; run prepare")
    if not (GOLDEN / version).is_dir():
        raise Refused(f"tests/golden/{version} is not there, expected the files of this release; run prepare")
    commit = git("rev-parse", "HEAD")
    if subprocess.run([".ci/run", "--all"], cwd=ROOT).returncode:
        raise Refused("`.ci/run --all` failed, expected all of it to pass; see its summary")
    require_clean()
    if git("rev-parse", "HEAD") != commit:
        raise Refused(f"the commit is no longer {commit[:10]}, which was checked; run it again")
    print(f"all passed; what is left:\ngit tag -a v{version} -m 'dl_jax {version}' {commit}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="writes version, changelog and golden files").add_argument("version")
    commands.add_parser("check", help="runs every check, and says how to tag")
    given = parser.parse_args()
    try:
        prepare(given.version) if given.command == "prepare" else check()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
