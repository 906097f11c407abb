"""Plan only: documents say what is true of the code. Links, the README's tree and example, config keys, options, JSON keys."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import distattn
from distattn.cli.plan import Choice, MaskArguments, make_plan, report
from distattn.cli.plan import app as plan_app
from distattn.config import MAY_CHANGE, Config

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ATTENTION = ROOT / "docs" / "attention.md"
TRAINING = ROOT / "docs" / "training.md"
PLANNING = ROOT / "docs" / "planning.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

every_document = pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in DOCUMENTS])


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_cells(path: Path, heading: str) -> list[str]:
    """First cells of the tables under a heading, up to the next heading of its level."""
    level = heading.split(" ")[0]
    section = prose(path).split(f"\n{heading}\n")[1].split(f"\n{level} ")[0]
    return re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)


def defaults(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → default of every key of a run's configuration."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(defaults(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


@every_document
def test_links(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{path.name} links to {link}, and no heading has that anchor"


@every_document
def test_no_placeholder_is_left(path: Path) -> None:
    assert re.findall(r"\{\{.*?\}\}", path.read_text(encoding="utf-8")) == []


def test_tree() -> None:
    """Every file of the tree exists, and every module is in it; a folder's line stands for its __init__.py."""
    (tree,) = blocks(README, "text")
    folders: list[str] = []
    listed = set()
    for line in tree.splitlines():
        match = re.fullmatch(r"( *)(\S+) {2,}\S.*", line)
        assert match, f"a line of the tree has no comment: {line}"
        folders[len(match[1]) // 2 :] = [match[2].rstrip("/")]
        path = Path(*folders)
        assert (ROOT / path).exists(), f"{path} is in the README's tree and does not exist"
        assert (ROOT / path).is_dir() == match[2].endswith("/"), f"{path}: folders, and they alone, end with a slash"
        listed.add(path)
    modules = {path.relative_to(ROOT) for path in (ROOT / "distattn").rglob("*.py")}
    missing = {path.parent if path.name == "__init__.py" else path for path in modules} - listed
    assert sorted(map(str, missing)) == []


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    (example,) = blocks(README, "python")
    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["out"].shape == (1, 1024, 8, 32)
    assert all(names[name].grad.isfinite().all() for name in "qkv")
    assert "strategy   ring" in capsys.readouterr().out


def test_config_keys_and_defaults() -> None:
    table = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", prose(TRAINING), flags=re.MULTILINE)
    described = {key: yaml.safe_load(default) for key, default in table}
    assert len(described) == len(table), "a key is described twice"
    assert described == defaults(dataclasses.asdict(Config()))


@every_document
def test_config_keys_in_text(path: Path) -> None:
    """Keys that are named anywhere, as key or key=value, exist."""
    sections = [field.name for field in dataclasses.fields(Config)]
    known = defaults(dataclasses.asdict(Config()))
    text = path.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z][\w.]*)(?:=[^`\s]*)?`", prose(path))
    named += re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z]\w*)=", text)
    assert [key for key in named if key not in known and not key.endswith((".py", ".md"))] == []


def test_what_may_change() -> None:
    paragraph = next(p for p in prose(TRAINING).split("\n\n") if p.startswith("What may differ"))
    listed = paragraph.split("These say")[0]
    assert re.findall(r"`([\w.*]+)`", listed) == list(dict.fromkeys(re.findall(r"`([\w.*]+)`", listed)))
    assert set(re.findall(r"`([\w.*]+)`", listed)) == set(MAY_CHANGE)


@pytest.mark.parametrize("kind", [distattn.Mask, distattn.Layout])
def test_constructors(kind: type) -> None:
    """Each is in the table, with its arguments."""
    written = dict(re.findall(rf"^\| `{kind.__name__}\.(\w+)\((.*?)\)` \|", prose(ATTENTION), flags=re.MULTILINE))
    made = [name for name, member in vars(kind).items() if isinstance(member, classmethod)]
    assert set(written) == set(made)
    for name, arguments in written.items():
        count = sum(p.name != "name" for p in inspect.signature(getattr(kind, name)).parameters.values())
        shown = len(arguments.split(", "))
        assert shown == count, f"{kind.__name__}.{name} takes {count} arguments, shown are {shown}"


def test_signatures() -> None:
    text = ATTENTION.read_text(encoding="utf-8")
    for function in (distattn.plan, distattn.attention):
        shown = re.search(rf"^{function.__name__}\((.*?)\) ->", text, flags=re.MULTILINE | re.DOTALL)
        assert shown, f"{function.__name__} has no signature in {ATTENTION.name}"
        parameters = inspect.signature(function).parameters.values()
        assert re.findall(r"(\w+)(?:=[^,]*)?(?:,|$)", shown[1]) == [p.name for p in parameters]
        assert dict(re.findall(r"(\w+)=\"?(\w+)\"?", shown[1])) == {
            p.name: str(p.default) for p in parameters if p.default is not p.empty
        }


def test_errors() -> None:
    named = {name for cell in first_cells(ATTENTION, "## Errors") for name in re.findall(r"`(\w+Error)`", cell)}
    raised = {name for name, value in vars(distattn.errors).items() if isinstance(value, type)}
    assert named | {"DistattnError"} == raised


def test_plan_options() -> None:
    described = {name for cell in first_cells(PLANNING, "## Options") for name in re.findall(r"--[\w-]+", cell)}
    parameters = typer.main.get_command(plan_app).params
    assert described == {name for p in parameters for name in (*p.opts, *p.secondary_opts)}


def test_plan_json_keys() -> None:
    described = {name for cell in first_cells(PLANNING, "## JSON") for name in re.findall(r"`(\w+)`", cell)}
    arguments = MaskArguments("causal", seq_len=12)
    numbers = report(make_plan(arguments, 2, Choice("ring"), (4, 2), (8, None, "bfloat16"), "cpu"), arguments)
    assert described == set(numbers)
