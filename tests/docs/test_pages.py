"""The Markdown pages: their links, paths, commands, examples and quoted messages are those of the project."""

import ast
import json
import re
import shlex
from functools import cache

import pytest

import argparser
import methods
from scripts import make_subset, masks, predict, study, tune
from scripts.benchmark import __main__ as benchmark
from tests.stress import fault_injection
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
FOLDERS = "dataset|docs|methods|metrics|modules|scripts|tests|utils"
#: Options of programs that are not the project's: torchrun, torch.distributed.launch.
FOREIGN_OPTIONS = {"--nproc_per_node", "--master_port"}


def name_of(path):
    return str(path.relative_to(ROOT))


def each(found):
    """Parameters (page, item) with readable names."""
    return [pytest.param(page, item, id=f"{name_of(page)}-{item}") for page in PAGES for item in found(page)]


# --------------------------------------------------------------- links and paths


def links(page):
    """Targets of the links and pictures of a page that are not on the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text()))
    return sorted({target for target in targets if not re.match(r"[a-z]+:", target)})


def anchors(page):
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "target"), each(links))
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    linked = (page.parent / path).resolve() if path else page
    assert linked.exists(), f"{name_of(page)} links to {target}, which does not exist"
    assert not anchor or anchor in anchors(linked), f"{target} has no heading for #{anchor}: {sorted(anchors(linked))}"


def paths(page):
    """Paths of the project that a page names anywhere in its text."""
    named = re.findall(
        rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*{{}},-]*\w[*/]?|[\w-]+\.(?:py|toml|cff|txt))", page.read_text()
    )
    outputs = ("splits/", "classes.txt")
    return sorted({path for path in named if not path.startswith(outputs)})


@cache
def files():
    """Names of the files of the project, without their folders."""
    folders = [ROOT / name for name in FOLDERS.split("|")]
    return {path.name for path in [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]}


@pytest.mark.parametrize(("page", "path"), each(paths))
def test_named_paths_exist(page, path):
    if "/" in path:
        assert list(ROOT.glob(path.rstrip("/"))), f"{name_of(page)} names {path}"
    else:  # a file without its folder, as in the layout
        assert path in files(), f"{name_of(page)} names {path}"


# -------------------------------------------------------------------- commands


def options(page):
    """Options that a page names, without those of the table of options, which has a test of its own."""
    return sorted(set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*\w", page.read_text())))


@cache
def known_options():
    """Every string of the project's programs that looks like an option."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "methods").glob("*.py")]
    sources += [
        path for folder in ("scripts", "tests/stress", "tests/examples") for path in (ROOT / folder).rglob("*.py")
    ]
    strings = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return strings | set(argparser.build_parser()._option_string_actions)


@pytest.mark.parametrize(("page", "option"), each(options))
def test_named_options_exist(page, option):
    assert option in known_options() | FOREIGN_OPTIONS, f"{name_of(page)} names {option}"


def commands(page):
    """Commands in the shell examples of a page and between backticks, as lists of words."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", CODE.sub("", text))
    for placeholder, value in {"$e": "1", " METHOD ": " LSKD ", "OPTIONS": "--task 6-2", "/RUN.": "/*."}.items():
        lines = [line.replace(placeholder, value) for line in lines]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


#: What reads the words after a program's name.
PARSERS = {
    "run.py": argparser.parse,
    "scripts/study.py": lambda words: argparser.parse(study.parse(words).words),
    "scripts/tune.py": lambda words: argparser.parse(tune.parse(words).words),
    "scripts/masks.py": masks.parse,
    "scripts/benchmark": benchmark.parse,
    "scripts/predict.py": predict.parse,
    "scripts/make_subset.py": make_subset.parse,
    "tests/stress/fault_injection.py": fault_injection.parse,
}


#: Without the page whose commands tests/docs/test_own_data.py runs, on files that its first commands write.
PARSED_PAGES = [page for page in PAGES if page.name != "own_data.md"]


@pytest.mark.parametrize("page", PARSED_PAGES, ids=name_of)
def test_commands_can_be_parsed(page):
    for words in commands(page):
        for program in PARSERS.keys() & set(words):
            given = words[words.index(program) + 1 :]
            if "--help" not in given:
                PARSERS[program](given)


def test_commands_are_found():
    programs = [word for page in PAGES for words in commands(page) for word in words if word in PARSERS]
    assert {program: programs.count(program) > 0 for program in PARSERS} == dict.fromkeys(PARSERS, True)
    assert programs.count("run.py") > 8


# -------------------------------------------------------------------- messages


@cache
def messages():
    """Every string of the product code, values replaced by "…", without whitespace that only breaks lines."""
    found = set()
    for path in [
        *ROOT.glob("*.py"),
        *(p for f in ("dataset", "methods", "modules", "utils") for p in (ROOT / f).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def quoted(page):
    """The messages in the first column of the table of docs/troubles.md."""
    return re.findall(r"^\| `([^`]+)` \|", page.read_text(), flags=re.MULTILINE)


TROUBLES = ROOT / "docs" / "troubles.md"


def test_troubles_quotes_messages():
    assert len(quoted(TROUBLES)) > 20


@pytest.mark.parametrize("message", quoted(TROUBLES))
def test_quoted_messages_are_in_the_code(message):
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), flags=re.DOTALL)
    assert any(pattern.search(text) for text in messages()), f"docs/troubles.md quotes {message!r}"


# ------------------------------------------------------------- the pages themselves


def test_the_readme_is_short_and_says_where_it_was_tested():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert any("GPU" in line for line in lines[:12])


@pytest.mark.parametrize("example", ["feature_norm.py", "pets.py", "four_stages.py"])
def test_examples_are_the_files_that_the_tests_run(example):
    text = (ROOT / "tests" / "examples" / example).read_text().rstrip()
    assert f"```python\n{text}\n```" in (ROOT / "docs" / "extending.md").read_text()


def test_excerpts_of_the_hooks_are_in_the_example():
    example = (ROOT / "tests" / "examples" / "every_hook.py").read_text()
    section = (ROOT / "docs" / "extending.md").read_text().partition("### Phases")[2].partition("Losses themselves")[0]
    excerpts = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(excerpts) == 3 and all(excerpt in example for excerpt in excerpts)


def test_the_table_of_rules_has_every_field():
    table = (ROOT / "docs" / "extending.md").read_text().partition("| field of `Rules` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(methods.base.Rules._fields)


def test_the_table_of_hooks_is_that_of_the_code():
    """Names, order, times and what a resume does, as methods/base.py has them; and no hook is missing."""
    hooks = re.findall(r"^    (\w+) {2,}(.+?) {2,}(.+)$", methods.base.__doc__, flags=re.MULTILINE)[1:]
    table = (ROOT / "docs" / "extending.md").read_text().partition("| hook | when |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|", table, flags=re.MULTILINE)
    assert rows == [
        (name, when, resumed.replace("-", "–") if resumed == "-" else resumed) for name, when, resumed in hooks
    ]
    own = {
        name
        for name, value in (vars(methods.Part) | vars(methods.part_types.GatedHooks)).items()
        if callable(value) or isinstance(value, classmethod | staticmethod)
    }
    assert {name for name, _, _ in rows} == {name for name in own if not name.startswith("_")}


@pytest.mark.parametrize("method", ["LSKD", "PLOP", "MiB"])
@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_figures_beside_the_official_programs_are_those_of_the_file(method, page):
    found = json.loads((ROOT / "docs/results/official_programs.json").read_text())["same_batches"]
    official, here = found[method]["official"], found[method]["ours"]
    assert max(abs(a - b) for a, b in zip(official, here)) < 0.08
    cells = [", ".join(f"{value:.2f}" for value in values) for values in (official, here)]
    assert f"| {method} | {cells[0]} | {cells[1]} |" in (ROOT / page).read_text()


def test_no_page_names_a_folder_of_somebodys_machine():
    for page in PAGES:
        assert not re.findall(r"(?<![\w.])/(?:home|work|root|tmp|Users)/", page.read_text()), name_of(page)
