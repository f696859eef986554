"""The site: it is built strictly, nothing in it is fetched from elsewhere, and all that selfgen says has an entry."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from selfgen import BSSConfig, RACConfig, cli
from tools.messages import PAGE, Message, Source, by_entry, entries, messages, told_by, told_by_cpp, unused

ROOT = Path(__file__).resolve().parents[1]
HANDED_ON = {
    "DataError(message_of(error))",
    "OSError(*error.args[:2], str(file))",
    "RuntimeError(str(failed))",
    "SystemExit(0)",
    "SystemExit(2)",
    "_not_utf8(file, number, error)",
    "fail(error, PROG)",
    "fail(message, self.prog)",
    "other(message)",
    "self.fail(str(error))",
    "steps.fail(error)",
    "super().log(logs, start_time)",
    "ValueError(parser.unknown)",
    "type(found)(*found.args)",
}
"""What makes an exception of a text that stands elsewhere in the source, or has none."""


@pytest.fixture(scope="module")
def said() -> list[Message]:
    return messages()


def test_every_message_has_an_entry_and_every_pattern_a_message(said):
    page = PAGE.read_text(encoding="utf-8")
    _, left = by_entry(page, said)
    assert not left, "docs/troubleshooting.md has no entry for these (tools/messages.py says how to add them)"
    assert not unused(page, said)
    titles = [one.title for one in entries(page)]
    assert len(titles) == len(set(titles))


def test_what_has_no_text_of_its_own_hands_on_what_was_said_elsewhere():
    """So nothing that is said goes unseen: a new way of making a message is to be understood, or listed here."""
    source = Source(ROOT)
    silent = {ast.unparse(call) for tree in source.trees.values() for call, texts in told_by(source, tree) if not texts}
    assert silent == HANDED_ON


def test_messages_are_found_however_they_are_made():
    code = """
def f(a, b):
    why = "it is small" if a else "it is large"
    raise ValueError(f"{a!r} is wrong, as {why}: " + "give another")

def g(a):
    a = "hidden"
    logger.warning("%d rows of %s are left: %s", 1, 2, a)
    logger.info("nothing that is asked for")
    raise Fault(WORDS) from None

class Fault(Exception): ...
class More(Fault): ...
WORDS = "a constant"

def h():
    error = More("made before it is raised")
    raise error
"""
    source = Source(ROOT)
    source.trees = {"one": ast.parse(code)}
    source.constants["WORDS"] = ast.Constant("a constant")
    assert {text for _, texts in told_by(source, source.trees["one"]) for text in texts} == {
        "… is wrong, as it is small: give another",
        "… is wrong, as it is large: give another",
        "%d rows of %s are left: %s",
        "a constant",
        "made before it is raised",
    }
    cpp = 'TORCH_CHECK_VALUE(0 <= n, "n=", n, " is not accepted; "\n"pass n >= 0");\nTORCH_CHECK(x, name, " is bad");'
    assert list(told_by_cpp(cpp)) == ["n=… is not accepted; pass n >= 0", "… is bad"]


def test_a_message_belongs_to_the_entry_with_the_longest_pattern():
    page = "## A\n\n<!-- messages\nis wrong\nin a/\n-->\n\n## B\n\n<!-- messages\nrow is wrong\nnever said\n-->\n"
    said = [
        Message("the row is wrong", "b.py"),
        Message("it is wrong", "b.py"),
        Message("x", "a/c.py"),
        Message("y", "b"),
    ]
    found, left = by_entry(page, said)
    assert found == {"A": ["it is wrong", "x"], "B": ["the row is wrong"]}
    assert left == [Message("y", "b")]
    assert unused(page, said) == ["never said"]


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert re.search(rf"[:-] {re.escape(name)}$", text, re.MULTILINE), f"mkdocs.yml has no {name} under nav"


# ---------------------------------------------------------------------------------------------------------------------
# The built site: minutes where the machine is busy; CI builds it by `make docs`


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` does; a warning, such as a link or an anchor that leads nowhere, is an error."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(ROOT))
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        assert config.strict
        warnings = counted_warnings()
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    assert not warnings.counts
    return folder


def counted_warnings():
    """What mkdocs itself counts with --strict."""
    import logging

    from mkdocs.utils import CountHandler

    counter = CountHandler()
    counter.setLevel(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(counter)
    return counter


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(\w+:)?//", text)
        assert not loaded, f"{page.relative_to(site)} loads something from the network"


@pytest.mark.slow
def test_search_works_without_a_server(site):
    """A file may load a script, but no JSON, and may start no worker."""
    script = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("var __index = "))
    places = {one["location"] for one in index["docs"]}
    assert "troubleshooting.html#rows-are-dropped" in places
    assert "options.html#self_prob" in places
    front = (site / "index.html").read_text(encoding="utf-8")
    assert front.index("assets/iframe-worker.js") < front.index("assets/javascripts/bundle")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_a_browser_finds_a_message_without_a_server(site, tmp_path):
    options = ["--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--virtual-time-budget=9000", "--dump-dom"]
    page = f"{(site / 'index.html').as_uri()}?q=weights+float16"
    shown = subprocess.run(["chromium", *options, page], capture_output=True, text=True, check=True).stdout
    assert "matching document" in shown
    assert "weights-that-cant-be-trained" in shown


@pytest.mark.slow
def test_every_message_stands_on_the_site(site, said):
    page = plain_text(site / "troubleshooting.html")
    for message in said:
        assert message.text in page


@pytest.mark.slow
def test_every_field_and_option_stands_on_the_site(site):
    page = (site / "options.html").read_text(encoding="utf-8")
    for field in (*fields(BSSConfig), *fields(RACConfig)):
        assert f'id="{field.name}"' in page
    for name in cli.COMMANDS:
        assert f"selfgen {name}" in plain_text(site / "commands" / f"{name}.html")
    assert "--self-prob" in plain_text(site / "commands" / "train.html")


@pytest.mark.slow
def test_the_exported_names_are_in_the_api(site):
    import selfgen
    import selfgen_kernels
    from tools.reference import ops

    page = (site / "api.html").read_text(encoding="utf-8")
    for package in (selfgen, selfgen_kernels):
        for name in package.__all__:
            assert f"{package.__name__}.{name}" in page
    families = {family: (site / "kernels" / f"{family}.html").read_text(encoding="utf-8") for family in ops()}
    for family, names in ops().items():
        assert all(f'id="selfgen_kernels.{name}"' in families[family] for name in names)
    for text in (page, *families.values()):
        assert "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL), "an example is no code"
        assert not re.search(r"<strong>[^<]*\d", text), "a power that Markdown has taken for bold text: write 2^64"


@pytest.mark.slow
def test_pages_outside_docs_and_what_they_link_to_are_there(site):
    for page in (
        "index",
        "ARCHITECTURE",
        "CONTRIBUTING",
        "CHANGELOG",
        "benchmarks/results/bench",
        "examples/launch/index",
    ):
        assert (site / f"{page}.html").is_file()
    assert "--nproc-per-node" in plain_text(site / "examples/launch/ddp.sh.html")
    assert (site / "figure.svg").is_file()


def test_the_configuration_is_plain_yaml():
    """Another program reads it, too, but for the one function that makes anchors as GitHub does."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    read = yaml.safe_load(re.sub(r"!!python/\S+", "", text))
    assert read["theme"]["font"] is False


def plain_text(page: Path) -> str:
    from html import unescape

    text = re.sub(r"<(script|style).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", "", text)).split())
