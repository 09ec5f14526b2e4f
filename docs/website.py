"""The pages of the site that are no files of docs/: what ProperDocs calls when it builds the site (properdocs.yml).

They are the README as the first page, CONTRIBUTING.md and CHANGELOG.md, the gallery of results/, a page of the API for
each package, which mkdocstrings fills from the docstrings, and the files of the repository that other pages link to.
A link leads to the same file on the site as in the repository.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Pages that lie elsewhere in the repository, by their place on the site.
FROM_ROOT = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
SHOWN = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}  # as pages with the text
FOREIGN = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\s(?:src|href)="((?:https?:)?//[^"]*)"')
LINK = re.compile(r"\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Lists the packages in the navigation."""
    pages = ["api/index.md", *(api_place(package) for package in packages())]
    for part in config.nav:
        if "API" in part:
            part["API"] = pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here, and the files that any page links to."""
    from properdocs.structure.files import File

    from dl_jax.harness.results.answers import sections
    from dl_jax.harness.results.gallery import gallery

    made = {name: (ROOT / origin).read_text(encoding="utf-8") for name, origin in FROM_ROOT.items()}
    made |= api()
    for path, text in gallery(sections(ROOT / "results", ROOT / "experiments")).items():
        made[path.relative_to("docs").as_posix()] = text
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for target in sorted({target for name, text in pages.items() for target in targets(name, text)}):
        file, name = ROOT / target, place_of(target)
        if files.get_file_from_path(name):
            continue
        if file.suffix in SHOWN:
            files.append(File.generated(config, name, content=shown(target)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files of the repository into links to their places on the site."""
    name = page.file.src_uri
    return relinked(name, markdown).replace("<details>", '<details markdown="1">')  # whose content is Markdown too


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuses a page that loads a script, style or image from another host."""
    from properdocs.exceptions import PluginError

    if found := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[1]}, expected a file of the site; copy it, or link to it")
    return output


def relinked(name: str, text: str) -> str:
    """The Markdown of the page `name` with links that are right on the site."""

    def new(match: re.Match[str]) -> str:
        target = target_of(name, match["path"])
        if target is None:
            return match[0]  # a strict build refuses it, if it is a link
        path = posixpath.relpath(place_of(target), posixpath.dirname(name) or ".")
        return f"]({path}{match['anchor'] or ''})"

    return LINK.sub(new, text)


def targets(name: str, text: str) -> Iterator[str]:
    """The files of the repository that the page `name` links to, relative to ROOT."""
    return (found for match in LINK.finditer(text) if (found := target_of(name, match["path"])))


def target_of(name: str, path: str) -> str | None:
    """The file that `path` on the page `name` leads to in the repository, relative to ROOT; None if it is none."""
    folder = posixpath.dirname(FROM_ROOT.get(name, f"docs/{name}"))
    found = posixpath.normpath(posixpath.join(folder, path))
    return found if not found.startswith("..") and (ROOT / found).is_file() else None


def place_of(target: str) -> str:
    """The place of a file of the repository among the pages of the site."""
    places = {origin: name for name, origin in FROM_ROOT.items()}
    if target in places:
        return places[target]
    if Path(target).suffix in SHOWN:
        return f"{target}.md"
    return target.removeprefix("docs/")


def shown(target: str) -> str:
    """A page with the text of a file, which the search leaves out."""
    text = (ROOT / target).read_text(encoding="utf-8")
    fence = "`" * 4  # docstrings may hold three
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {target}\n\n{fence}{SHOWN[Path(target).suffix]}\n{text}{fence}\n"


def packages() -> list[str]:
    """Every package of dl_jax, and every file that is in none of them, by its dotted name."""
    top = ROOT / "dl_jax"
    folders = [path.parent for path in top.rglob("__init__.py") if path.parent != top]
    single = [path.with_suffix("") for path in top.glob("*.py") if not path.name.startswith("_")]
    parts = {"core": 0, "harness": 2}  # as docs/design.md lists them, with the shelves between the two
    return sorted(
        (dotted(path) for path in (*folders, *single)), key=lambda name: (parts.get(name.split(".")[1], 1), name)
    )


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts)


def api_place(package: str) -> str:
    return f"api/{package.removeprefix('dl_jax.')}.md"


def api() -> dict[str, str]:
    """{page: text} of the API: a list of the packages, and a page for each with the functions of its files."""
    lines = []
    for package in packages():
        file = source(package)
        summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"| [{package}]({posixpath.basename(api_place(package))}) | {summary} |\n")
    head = "# API\n\n| package | what it has |\n|---|---|\n"
    return {"api/index.md": head + "".join(lines), **{api_place(package): page(package) for package in packages()}}


def source(package: str) -> Path:
    path = ROOT.joinpath(*package.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def page(package: str) -> str:
    """The page of a package, which mkdocstrings fills."""
    file = source(package)
    if file.name != "__init__.py":
        return (
            f"# {package}\n\n[Source]({from_api(file)})\n\n::: {package}\n    options: {{show_root_heading: false}}\n"
        )
    files = sorted(path for path in file.parent.glob("*.py") if not path.name.startswith("_"))
    parts = [f"# {package}\n", f"::: {package}\n    options: {{members: false, show_root_heading: false}}\n"]
    if names := reexported(file):
        parts.append(f"`{package}` itself has {', '.join(names)}.\n")
    for path in files:
        module = dotted(path.with_suffix(""))
        parts.append(f"## {module} {{#{module}}}\n\n[Source]({from_api(path)})\n")
        parts.append(f"::: {module}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n")
    return "\n".join(parts)


def from_api(file: Path) -> str:
    """The link from a page of the API to a file, as on a page that lies in docs/api/."""
    return f"../../{file.relative_to(ROOT).as_posix()}"


def reexported(file: Path) -> list[str]:
    """The names that a package imports from its files for its users, with links; constants are listed without."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    ours = [
        each for each in tree.body if isinstance(each, ast.ImportFrom) and (each.module or "").startswith("dl_jax.")
    ]
    names = [(each.module, name.name) for each in ours for name in each.names]
    return [f"`{name}`" if name.isupper() else f"[`{name}`][{module}.{name}]" for module, name in names]
