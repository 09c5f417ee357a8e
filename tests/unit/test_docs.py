"""Protects what the documentation says: its links, commands, paths, module list, tables and examples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.helpers.pages import blocks, our_commands
from theworld_train.accounting.tokens import world_tokens
from theworld_train.cli.app import COMMANDS, app, load_command
from theworld_train.config import (
    PipelineConfig,
    RunConfig,
    config_kind,
    load_pipeline_config,
    load_run_config,
    parse_run_config,
)
from theworld_train.config.outline import outline_of
from theworld_train.data.conversation import parse_row
from theworld_train.starter.write import Project, project_files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "theworld_train"
README = ROOT / "README.md"
DATA = ROOT / "docs" / "data.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
#: About the configs of a project that `init` writes, which tests/integration/test_own_data.py walks.
OWN_DATA = ROOT / "docs" / "own-data.md"
#: The pages that users read.
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:theworld-train|-m theworld_train) +([a-z][a-z-]*)")
CONFIG = re.compile(r"(?<![\w/.])configs(?:/[\w.*-]+)+")


def in_code(text: str) -> str:
    """Returns the fenced blocks and code spans of a page: where commands and paths stand."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", rest)])


def rows(page: Path) -> Iterator[dict[str, object]]:
    """Yields the JSON values of a page; a block may hold several, one after the other."""
    for block in blocks(page, "json"):
        rest = block.strip()
        while rest:
            row, end = json.JSONDecoder().raw_decode(rest)
            yield row
            rest = rest[end:].lstrip()


def documented_modules() -> set[str]:
    """Returns the modules that docs/architecture.md gives a line, by their paths in the package."""
    folder, modules = None, set()
    section = ARCHITECTURE.read_text().split("\n## Modules\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if heading := re.match(r"### (?:`(\w+/)`|Top level)$", line):
            folder = heading[1] or ""
        elif item := re.match(r"- `(\w+\.py)`: \S", line):
            modules.add(f"{folder}{item[1]}")
    return modules


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- docs/architecture.md -----------------------------------------------------------------------------------------


def test_every_module_has_its_line_and_every_line_its_module():
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    documented = documented_modules()
    needed = {module for module in modules if Path(module).name != "__init__.py"}
    assert len(needed) > 0
    assert needed - documented == set(), "modules without a line"
    assert documented - modules == set(), "lines without a module"


def test_the_layer_table_names_every_top_level_module():
    table = ARCHITECTURE.read_text().split("\n## Layers\n")[1].split("\n## ")[0]
    for path in PACKAGE.iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            assert f"`{path.name}/`" in table
        elif path.suffix == ".py" and path.name != "__init__.py":
            assert f"`{path.name}`" in table


# -- every page ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page: Path):
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith(("http", "mailto:"))]
    missing = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page: Path):
    unknown = sorted({command for command in COMMAND.findall(in_code(page.read_text())) if command not in COMMANDS})
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse_and_their_keys_exist(page: Path):
    for words in our_commands(page):
        command = load_command(words[0])
        command.make_context(words[0], list(words[1:]))  # a wrong option or a missing argument raises
        metavar = next((p.metavar or "" for p in command.params if p.param_type_name == "argument"), "")
        model = {"CONFIG": RunConfig, "CHECKPOINT": RunConfig, "PIPELINE": PipelineConfig}.get(
            re.match(r"\W*(\w*)", metavar)[1]
        )
        overrides = [word for word in words[1:] if re.match(r"[a-z_.]+=", word)]
        keys = [word.partition("=")[0] for word in overrides]
        unknown = [key for key in keys if model and not outline_of(model).knows(tuple(key.split(".")))]
        assert unknown == [], words
        if model and page != OWN_DATA and (ROOT / words[1]).is_file():
            load = load_pipeline_config if config_kind(ROOT / words[1]) == "pipeline" else load_run_config
            load(ROOT / words[1], overrides)  # what contradicts the file raises


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_paths_exist(page: Path):
    paths = {path.rstrip(".") for path in CONFIG.findall(page.read_text())}
    ours = project_files(Project(Path("project")))
    missing = sorted(path for path in paths if not any(ROOT.glob(path)) and not in_project(path, ours))
    assert missing == []


def in_project(path: str, files: dict[str, bytes]) -> bool:
    """Says whether `init` writes a path, for pages that are about a project."""
    return any(file == path or file.startswith(f"{path.rstrip('/')}/") for file in files)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_and_make_targets_exist(page: Path):
    text = in_code(page.read_text())
    scripts = re.findall(
        r"(?<![\w/.])(?:benchmarks|docker|docs|launch|tests)/[\w./-]*\w\.(?:py|sh|sbatch|yaml|txt)\b", text
    )
    assert [path for path in scripts if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    called = set(re.findall(r"(?:^|`|\n)make ([a-z][a-z-]*)", page.read_text()))
    assert called - targets == set()


#: Commands that answer at once and need nothing but the repository.
CHEAP = ("validate", "size", "schema", "figures")


def cheap_calls() -> list[tuple[str, ...]]:
    called = (words for page in PAGES for words in our_commands(page) if words[0] in CHEAP)
    return sorted(
        {tuple(words) for words in called if not any(word.isupper() for word in words)}
    )  # CONFIG stands for any


@pytest.mark.parametrize("words", cheap_calls(), ids=" ".join)
def test_cheap_commands_run(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    project = project_files(Project(Path("project")))
    if any(in_project(word, project) and not Path(word).exists() for word in words):
        for path, content in project.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        monkeypatch.chdir(tmp_path)
    expanded = [str(path) for word in words for path in (sorted(Path().glob(word)) if "*" in word else [word])]
    result = CliRunner().invoke(app, expanded)
    assert result.exit_code == 0, result.output


def test_cheap_commands_are_there():
    assert {words[0] for words in cheap_calls()} == set(CHEAP)


def anchors(page: Path) -> set[str]:
    """Returns what links to a page's headings end with, as GitHub makes it of their words."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


# -- docs/troubleshooting.md --------------------------------------------------------------------------------------


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    code = re.sub(r'"\s*\n\s*(?:\+\s*)?f?"', "", code)  # literals that go on in the next line
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+ [^`]+)`", row)]
    assert len(messages) > 10
    assert [message for message in messages if message not in code] == []


def test_every_symptom_has_a_cause_and_a_cure():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("|---", "| symptom"))]
    assert len(rows) > 30
    assert [row for row in rows if len([cell for cell in row.strip("|").split(" | ") if cell.strip()]) != 3] == []


def test_the_readme_is_looked_at():
    text = README.read_text()
    assert LINK.findall(text)
    assert COMMAND.findall(in_code(text))
    assert CONFIG.findall(text)


# -- the examples of the data format ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, DATA], ids=name)
def test_json_examples_are_rows(page: Path):
    examples = list(rows(page))
    assert examples
    for number, row in enumerate(examples):
        conversation, problems = parse_row(row, f"{page.name}:{number}")
        assert problems == []
        assert conversation is not None


def test_examples_pass_the_check_of_a_file(tmp_path: Path):
    from PIL import Image

    from theworld_train.config.sources import JsonlSource
    from theworld_train.data import open_source
    from theworld_train.data.video import missing_decoder

    examples = list(rows(DATA))
    for media in {path for row in examples for path in media_paths(row)}:
        path = tmp_path / media
        files = [path] if path.suffix else [path / f"{number}.png" for number in range(5)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".mp4":
                file.touch()
            else:
                Image.new("RGB", (8, 8)).save(file)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in examples))

    source = open_source(JsonlSource(source="jsonl", path=str(data)))

    decoder = missing_decoder(str(data))
    assert [found for found in source.check() if found.problems != (decoder,)] == []
    for index, row in enumerate(examples):
        if not any(path.endswith(".mp4") for path in media_paths(row)):
            assert source[index].messages


def media_paths(row: dict[str, object]) -> list[str]:
    """Returns the media that a row names, in parts and in `images`."""
    conversation, _ = parse_row(row, "row")
    assert conversation is not None
    parts = conversation.media()
    paths = [part.path for part in parts if part.path is not None]
    frames = [frame for part in parts for frame in getattr(part, "frames", ())]
    return [*paths, *frames, *conversation.images]


def test_two_ways_to_name_images_mean_the_same():
    by_list, by_path = (row for row in rows(DATA) if row.get("id") in (1, 2))
    assert media_paths(by_list) == media_paths(by_path)


def test_yaml_examples_are_data_sections():
    examples = blocks(DATA, "yaml")
    assert examples
    for example in examples:
        config = {
            "name": "example",
            "output_dir": "runs/example",
            "trainable": {"world_projector": {}},
            "training": {"max_steps": 1},
            **yaml.safe_load(example),
        }
        assert parse_run_config(config, source=DATA.name).data.train is not None


def test_numbers_of_world_tokens():
    text = DATA.read_text()
    for layout in ("spatial", "channel"):
        for resolution in (224, 512):
            numbers = [f"{world_tokens(layout, resolution, 16, frames, pool=1):,}" for frames in (1, 5, 9)]
            assert f"| {layout} | {resolution} | {' | '.join(numbers)} |" in text
    for resolution, total in ((512, "4,358"), (224, "1,046")):
        assert total == f"{world_tokens('spatial', resolution, 16, 1, pool=1) + 2 + 260:,}"
        assert total in text


def test_numbers_of_world_tokens_by_steps_and_pool():
    text = (ROOT / "docs" / "world-steps.md").read_text()
    for resolution in (224, 512):
        for pool in (1, 2, 4):
            numbers = [f"{world_tokens('spatial', resolution, 16, 1 + 4 * k, pool=pool):,}" for k in range(5)]
            assert f"| {resolution} | {pool} | {' | '.join(numbers)} |" in text


def test_frames_taken_from_a_clip():
    from theworld_train.data.video import select_frames

    lines = re.findall(r"^\| (\d+) \| (\d+) \| ([\d, ]+) \|$", DATA.read_text(), flags=re.MULTILINE)
    assert lines
    for available, most, taken in lines:
        assert select_frames(int(available), int(most)) == [int(frame) for frame in taken.split(", ")]
