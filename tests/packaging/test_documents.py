"""README and docs say what is true: links resolve, commands are those of continuous integration."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tokenmill import _native
from tokenmill.sources import CATALOGUE, DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def links(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def readme_commands() -> list[str]:
    """The commands of the Start section."""
    section = (ROOT / "README.md").read_text().split("## Start")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)\n```", section, flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document):
    local = [link.split("#")[0] for link in links(document) if not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if link and not (document.parent / link).exists()]
    assert missing == []


def test_every_page_can_be_reached_from_the_readme():
    reached: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [
            (page.parent / link.split("#")[0]).resolve() for link in links(page) if not re.match(r"[a-z]+:", link)
        ]
        todo += [target for target in targets if target.suffix == ".md" and target.exists()]
    assert set(DOCUMENTS) <= reached


def test_readme_has_the_two_commands():
    run, test = readme_commands()
    assert "pip install '.[server]'" in run
    assert run.endswith(f"tokenmill serve {DEFAULT_MODEL}")
    assert "pip install '.[test]'" in test
    assert test.endswith("pytest")


def test_ci_does_what_the_second_command_does():
    ci = (ROOT / ".ci/run").read_text()
    installed = re.search(r"pip install .*'\.\[([\w,]+)\]'", ci)
    assert installed is not None
    assert "test" in installed[1].split(",")
    assert re.search(r"^pytest$", ci, re.MULTILINE)


def test_documented_scripts_exist():
    for document in DOCUMENTS:
        for script in re.findall(r"`((?:scripts|\.ci)/[\w./]+)", document.read_text()):
            assert (ROOT / script).exists(), f"{document.name} names {script}"


def test_catalogue_page_is_the_catalogue():
    page = (ROOT / "docs/models.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)`(?: \(default\))? \| (.+?) \| ([\d.,]+) MB \| (.+?) \|$", page, re.MULTILINE)
    expected = [(m.name, m.title, f"{m.size / 1e6:,.1f}", m.licence) for m in CATALOGUE.values()]
    assert rows == expected


def test_readme_names_every_verb_and_no_other():
    from tokenmill.cli import app

    verbs = {verb.name for verb in (*app.registered_commands, *app.registered_groups)}
    assert set(re.findall(r"^\| `tokenmill (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)) == verbs


def test_core_dependencies_hold_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if re.match(r"(torch|transformers)\b", name)]


def test_version_is_the_same_everywhere():
    import tokenmill

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == tokenmill.__version__


def test_the_type_stub_names_what_the_native_module_has():
    tree = ast.parse((ROOT / "src/tokenmill/_native.pyi").read_text())
    declared = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {name for name in declared if not name.startswith("_")} == {n for n in dir(_native) if not n.startswith("_")}
