"""What README and docs show runs, what they link to is there, and what they say is tested is tested."""

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hf_rnn
from hf_rnn.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def blocks(language: str) -> dict[str, str]:
    """All code blocks in a language, by page and number."""
    return {
        f"{path.relative_to(ROOT)}, block {i}": block
        for path in TEXTS
        for i, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
    }


RUNNER = """
import json, os, sys, tempfile, traceback
import datasets, matplotlib.pyplot, numba, peft, transformers.trainer, hf_rnn_trainers  # once for all, takes long
for name, code in json.load(sys.stdin).items():
    sys.stdout.flush()
    if (child := os.fork()) == 0:  # each block for itself, in a folder of its own
        os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
        status = 1
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        print("FAILED", name, file=sys.stderr)
        sys.exit(1)
"""


def test_python_blocks_run(tmp_path):
    found = blocks("python")
    assert len(found) > 15
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path)],
        input=json.dumps(found),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-5000:]


def commands() -> list[tuple[str, list[str]]]:
    """Every `hf-rnn` command of the texts: where it stands, and its arguments."""
    found = []
    for name, block in blocks("bash").items():
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "hf-rnn" in words:
                found.append((name, words[words.index("hf-rnn") + 1 :]))
    return found


def test_commands_exist():
    """Each with all its options, as --help has them."""
    helps: dict[tuple[str, ...], str] = {}
    for name, (command, *words) in commands():
        assert command in COMMANDS, f"{name}: hf-rnn {command}"
        trainer = [*words[words.index("--trainer") :][:2]] if "--trainer" in words else []
        key = (command, *trainer)
        if key not in helps:
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
                main([command, *trainer, "--help"])
            helps[key] = output.getvalue()
        for word in words:
            option = word.partition("=")[0]
            assert not option.startswith("--") or re.search(rf"{option}\b", helps[key]), f"{name}: {command} {option}"
    assert len(helps) > 8


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(path, tmp_path):
    few = ["--steps", "5"] if '"--steps"' in path.read_text() else []
    result = subprocess.run(
        [sys.executable, str(path), *few], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "bench"} <= targets


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures(path):
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}"


def test_navigation_has_every_page():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES)
    assert {path.stem for path in PAGES if path.parent.name == "architectures"} == set(hf_rnn.ARCHITECTURES.values())


def test_the_reference_has_every_public_name():
    """Each once, with a docstring of its own."""
    reference = "\n".join(page.read_text() for page in PAGES if page.parent.name == "reference")
    named = re.findall(r"^::: (\S+)", reference, re.MULTILINE)
    assert len(named) == len(set(named))
    assert {f"hf_rnn.{name}" for name in hf_rnn.__all__ if name != "__version__"} - set(named) == set()
    for name in hf_rnn.__all__:
        thing = getattr(hf_rnn, name)
        documentation = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
        assert documentation, name


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Strictly: links between pages, and every name of the reference."""
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert "RecurrentCache" in (tmp_path / "site" / "reference" / "states" / "index.html").read_text()


def test_tests_that_the_docs_name_exist():
    """`tests/file.py` and `tests/file.py::test`; and each row of the table that claims something names one."""
    for path in TEXTS:
        for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", path.read_text()):
            assert (ROOT / file).is_file(), f"{path.name}: {file}"
            names = {x.name for x in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(x, ast.FunctionDef)}
            assert not test or test in names, f"{path.name}: {file}::{test}"
    (table,) = re.findall(
        r"^\| tool .*?\n\n", (ROOT / "docs" / "compatibility.md").read_text(), re.MULTILINE | re.DOTALL
    )
    rows = re.findall(r"^\| (.*) \|$", table, re.MULTILINE)
    cells = [re.split(r" \| ", row) for row in rows[2:]]
    assert len(cells) > 15
    for tool, status, _, *test in cells:
        said = status.startswith(("no", "not")) or "not tested" in status
        assert said != bool(test and test[0].startswith("`tests/")), tool
