"""What README, docs and examples tell a reader to type: it parses, names what exists, and runs."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer

from visling import config as configs
from visling import models
from visling.checkpoints import catalog
from visling.cli.app import app
from visling.errors import RunError
from visling.recipes.detectors import detect_config
from visling.recipes.tables import FINETUNING, MULTITASK, PRETRAINING
from visling.runs import demo
from visling.scenes.clear_questions import ClearQuestion

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
)
TABLES: dict[str, Any] = {"pretrain": PRETRAINING, "finetune": FINETUNING, "multitask": MULTITASK}

NOT_IN_THE_TESTED_SET = {"trackio"}
"""Extras that cannot be installed with the pinned versions: trackio wants an older Pillow."""


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def typed(text: str, program: str) -> list[list[str]]:
    """Words after the program of every command in a page's fenced blocks; continued lines are joined, comments
    dropped."""
    lines = [line for _, block in fenced(text) for line in block.replace("\\\n", " ").splitlines()]
    words = [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in lines
        if line.removeprefix("$ ").startswith(f"{program} ")
    ]
    return [one[1:] for one in words]


def check(words: list[str]) -> None:
    """Fail unless the verb and every option exist, and recipes, presets and settings are real."""
    command, rest = typer.main.get_command(app), words
    while hasattr(command, "commands"):
        assert rest, f"visling {' '.join(words)}: a verb is missing"
        assert rest[0] in command.commands, f"visling {' '.join(words)}: no verb {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    given = command.make_context("visling", rest).params
    if words[0] == "catalog" and given["name"] is not None:
        catalog.find_entry(given["name"])
        return
    name = given.get("recipe", given.get("name"))
    if name is not None:
        tables = [TABLES[words[0]]] if words[0] in TABLES else list(TABLES.values())
        recipes = [table[name]() for table in tables if name in table]
        assert recipes, f"visling {' '.join(words)}: no recipe {name!r}"
        configs.override(recipes[0], given.get("set_") or [])
    elif words[:2] == ["detect", "train"]:
        detect_config(given.get("set_") or [], given["preset"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_pages_are_true(page: Path) -> None:
    if not page.exists():
        pytest.skip(f"{page.name} is not written yet")
    text = page.read_text(encoding="utf-8")
    for words in typed(text, "visling"):
        check(words)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in typed(text, "make"):
        assert re.search(rf"^{re.escape(words[0])}:", makefile, flags=re.MULTILINE), (
            f"the Makefile has no target {words[0]!r}"
        )


def test_the_check_can_fail() -> None:
    block = "visling scenes --out scenes \\\n  --imags 3\n$ visling evaluat vqa  # scores\n"
    text = f"```\n{block}```\nvisling outside of a block\n"
    assert typed(text, "visling") == [["scenes", "--out", "scenes", "--imags", "3"], ["evaluat", "vqa"]]
    for words in typed(text, "visling"):
        with pytest.raises((AssertionError, Exception), match=r"imags|evaluat"):
            check(words)
    with pytest.raises(AssertionError, match="no recipe 'no-such'"):
        check(["finetune", "--recipe", "no-such", "--data", "d", "--out", "o"])


@pytest.mark.skipif(
    not (ROOT / "README.md").exists() or not (ROOT / "README.md").read_text(encoding="utf-8").strip(),
    reason="no README yet",
)
def test_the_readme_shows_the_way_and_its_python_runs(world: Any, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = {words[0] for words in typed(text, "visling")}
    assert {
        "scenes", "detect", "regions", "pretrain", "finetune", "evaluate", "predict", "compare", "recipes", "catalog",
        "convert", "verify",
    } <= verbs  # fmt: skip
    for family in models.names():
        assert f"](docs/models/{family}.md)" in text
    blocks = [block for language, block in fenced(text) if language == "python"]
    assert len(blocks) >= 2
    order = ("## Install", "## First steps", "## Two commands", "## Results", "## Read next")
    assert sorted(order, key=text.index) == list(order)
    for block in blocks:
        stand_in_for_the_demo(world, block, tmp_path)
        assert run_python(block, tmp_path).strip()


def stand_in_for_the_demo(world: Any, program: str, folder: Path) -> None:
    """The paths that `make demo` leaves and a program names, with the tiny world behind them."""
    for path in re.findall(r'"(demo/[^"]+)"', program):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(world.picture() if target.suffix == ".png" else world.vqa)


def test_the_snippet_about_looking_inside_runs(world: Any, tmp_path: Path) -> None:
    ((_, program),) = (
        block for block in fenced((ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")) if block[0] == "python"
    )
    stand_in_for_the_demo(world, program, tmp_path)
    shown = run_python(program, tmp_path)
    assert shown.startswith("Answer(")
    assert {"answer.png", "relevance.png", "inspection.html"} <= {file.name for file in tmp_path.iterdir()}


def run_python(program: str, folder: Path) -> str:
    """Output of a program on one thread, in a folder."""
    program = "import torch; torch.set_num_threads(1)\n" + program
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_first_snippet_needs_no_file_and_prints_what_the_page_says(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## First steps")[2].partition("\n## ")[0]
    (_, program), (_, shown) = fenced(section)
    assert run_python(program, tmp_path) == shown
    assert list(tmp_path.iterdir()) == []
    for family in models.names():
        assert run_python(program.replace('"lxmert"', f'"{family}"'), tmp_path).count("torch.Size([2, ") == 3


def test_the_snippets_of_the_tour_run_one_after_another(world: Any, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    blocks = [block for language, block in fenced(text) if language == "python"]
    assert len(blocks) > 9
    (tmp_path / "vqa").symlink_to(world.vqa)  # the run of the commands between the snippets
    shown = run_python("\n".join(blocks), tmp_path)
    assert "torch.Size([4, 5, 16])" in shown
    assert "masked_lm_accuracy" in shown


def test_the_snippet_about_the_store_runs(world: Any, tmp_path: Path) -> None:
    ((_, program),) = (
        block
        for block in fenced((ROOT / "docs" / "formats" / "store.md").read_text(encoding="utf-8"))
        if block[0] == "python"
    )
    (tmp_path / "regions").symlink_to(world.regions)
    assert run_python(program, tmp_path).startswith("78 16 ")


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links {target}, which does not exist"


def test_a_source_archive_holds_what_the_makefile_and_the_tests_use() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"visling", "tests", "docs", "examples", "benchmarks", "Makefile", "constraints.txt"} <= set(included)
    for name in included:
        assert (ROOT / name).exists(), name


def test_the_tested_set_pins_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].replace("_", "-") for line in lines if "==" in line}
    missing = {name for one in wanted if (name := re.split(r"[^\w-]", one)[0].replace("_", "-")) not in pinned}
    missing -= NOT_IN_THE_TESTED_SET
    assert not missing, f"constraints.txt does not pin {', '.join(sorted(missing))}"


def test_every_extra_is_used_and_shown_by_the_doctor() -> None:
    """An extra that nothing imports would promise what does not exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    # transformers loads what we export, in benchmarks and tests alone
    folders = ("visling", "benchmarks")
    sources = "\n".join(file.read_text(encoding="utf-8") for name in folders for file in (ROOT / name).rglob("*.py"))
    for extra in extras.keys() - {"dev"}:
        packages = [re.split(r"[^\w-]", one)[0].replace("-", "_") for one in extras[extra]]
        assert any(re.search(rf"(from|import) (torch\.utils\.)?{package}\b", sources) for package in packages), extra
    ended = subprocess.run(
        [sys.executable, "-m", "visling", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    shown = {name.removeprefix("extra ") for name in json.loads(ended.stdout) if name.startswith("extra ")}
    assert shown == extras.keys() - {"dev"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo_extras, installed = re.findall(r"-e '\.\[([\w,]+)\]'", makefile)
    assert demo_extras == "serve", "the last line that the demo prints can be typed as it stands"
    assert set(installed.split(",")) == extras.keys() - NOT_IN_THE_TESTED_SET


@pytest.mark.parametrize(
    ("size", "model"),
    [("tiny", "visualbert"), ("large", "visualbert"), *(("small", name) for name in models.names())],
)
def test_every_stage_of_the_demo_parses(
    size: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[list[str]] = []
    monkeypatch.setattr(demo, "stage", lambda title, done, *words, **_: stages.append([str(word) for word in words]))
    question = ClearQuestion(image=Path("a b.png"), text="what color is the cross?", answer="red")
    monkeypatch.setattr(demo, "choose_questions", lambda scenes: [question])
    asked: list[ClearQuestion] = []
    monkeypatch.setattr(demo, "ask", lambda question, run: asked.append(question))
    monkeypatch.setattr(demo, "print_table", lambda full, blind: 20.0)
    script = ROOT / "examples" / "demo.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--size", size, "--model", model])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    monkeypatch.setattr(sys, "argv", [str(script), "--size", size, "--at-least", "21"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert "should be 21 points above the question-only model; it is 20.0" in capsys.readouterr().err
    assert len(stages) >= 10
    assert asked == [question] * 2  # in each of the two runs
    for words in stages:
        check(words)
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).parts[:2] == ("demo", size)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("on_path", [True, False])
def test_the_demo_ends_with_the_lines_that_look_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, on_path: bool
) -> None:
    """As they can be typed in the folder where the demo was started."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "visling").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs) if on_path else "/nowhere")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: object() if installed else None)
    question = ClearQuestion(image=Path("scenes/a b.png"), text="what color is the cross?", answer="red")
    lines = demo.list_next_steps(Path("demo/small/visualbert/vqa"), [question])
    program = "visling" if on_path else os.path.join(".venv", "bin", "visling")
    for line in lines[-2:]:
        assert line.startswith(f"$ {program} ")
        check(shlex.split(line)[2:])
    assert lines[-1] == f"$ {program} serve --run demo/small/visualbert/vqa"
    assert (f"{programs / 'python'} -m pip install fastapi uvicorn" in "".join(lines)) is not installed
    (programs / "visling").unlink()
    assert demo.list_next_steps(Path("run"), [])[-1].startswith(f"$ {programs / 'python'} -m visling serve ")


def test_an_interrupted_stage_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[list[str]] = []
    monkeypatch.setattr(demo._children, "call", lambda command, mark: run.append(command[3:]) or 0)
    out = tmp_path / "run"
    demo.stage("first", False, "pretrain", "--out", out)
    out.mkdir()
    (out / "run.json").write_text('{"status": "running"}')
    demo.stage("again", False, "pretrain", "--out", out)
    demo.stage("done", True, "pretrain", "--out", out)
    assert run == [["pretrain", "--out", str(out)], ["pretrain", "--out", str(out), "--resume"]]
    assert not demo.finished(out)


def test_a_stage_that_fails_stops_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo._children, "call", lambda command, mark: 2)
    with pytest.raises(RunError, match="`visling pretrain` ended with status 2"):
        demo.stage("fails", False, "pretrain", "--out", tmp_path / "run")


def test_the_demo_shows_an_answer_next_to_the_truth(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command[3:])
        row = {"top": [["red", 0.75], ["blue", 0.25]]}
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(row))

    monkeypatch.setattr(demo.subprocess, "run", run)
    question = demo.choose_questions(world.scenes, "train")[0]
    demo.ask(question, tmp_path)
    out = capsys.readouterr().out
    assert f"'{question.text}'" in out, "the printed command can be typed"
    assert f"red 75%, blue 25%; truth: {question.answer} (" in out
    check(commands[0])
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / f"{question.image.stem}.png").touch()
    demo.ask(question, tmp_path)
    assert "(done before)" in capsys.readouterr().out
    assert len(commands) == 1


def test_stages_side_by_side_mark_their_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo.stage("shown", False, "--version", label="vqa")
    with pytest.raises(RunError, match="`visling finetune` ended with status 2"):
        demo.stage(
            "fails", False, "finetune", "--recipe", "no-such", "--data", tmp_path, "--out", "o", label="question-only"
        )
    demo.stage("done", True, "--version", label="vqa")
    lines = capfd.readouterr().out.splitlines()
    assert f"[vqa] visling {metadata.version('visling')}" in lines
    assert any(line.startswith("[question-only] visling: no recipe 'no-such'") for line in lines)
    assert any(re.fullmatch(r"\[vqa\] \(\d+ s\)", line) for line in lines)
    assert lines[-1] == "[vqa] (done before)"


def test_examples_import_nothing_that_is_not_installed_with_the_package() -> None:
    for file in (ROOT / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert str(name).split(".")[0] in sys.stdlib_module_names | {"__future__", "visling", "numpy", "PIL"}, (
                    f"{file.name} imports {name}"
                )


@pytest.mark.slow
def test_the_tiny_demo_runs_twice(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--size", "tiny", "--out", str(tmp_path / "demo")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "The full model is" in first.stdout
    assert json.loads((tmp_path / "demo" / "visualbert" / "vqa" / "run.json").read_text())["status"] == "finished"
    assert (tmp_path / "demo" / "visualbert" / "vqa" / "report.html").exists()
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("(done before)") == second.stdout.count("\n== ")
