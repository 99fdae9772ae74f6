"""The report: one page, nothing from outside, and names are text."""

import json
import re
from html.parser import HTMLParser

import pytest

from layerboost import pipeline, report
from layerboost.errors import UsageError
from layerboost.recipe import load_recipe
from tests.test_pipeline import SMALL
from tests.tiny import make_checkpoint

NAME = "<script>alert(1)<b>&amp;"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    pipeline.run(make_checkpoint(root / NAME, "llama"), load_recipe("default", SMALL), out=root / "run")
    return root / "run"


class Tags(HTMLParser):
    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page(run_folder):
    page = (run_folder / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert NAME in "".join(tags.text)
    for name, value in tags.attributes:
        assert name not in ("src", "srcset", "onclick", "onload"), value
        assert not (name in ("href", "xlink:href") and not value.startswith("#")), value
    assert not re.search(r"url\((?!#)", page)
    assert page.count("<svg") == 2
    result = json.loads((run_folder / "result.json").read_text())
    for section in (
        "Layers",
        "Quality",
        "Speed and memory",
        "Sensitivity",
        "Healing",
        "Completions",
        "How this was made",
    ):
        assert f"<h2>{section}</h2>" in page
    assert page.count('<div class="layer ') == result["model"]["num_layers"]
    assert f"{result['speed']['decode']['median']:.2f}x" in page
    assert f"{result['quality']['healed']['kl']:.3f}" in page
    for name, version in result["provenance"]["versions"].items():
        assert f"{name} {version}" in page


def test_the_same_artifacts_give_the_same_page(run_folder):
    before = (run_folder / "report.html").read_bytes()
    report.run(run_folder)
    assert (run_folder / "report.html").read_bytes() == before


def test_unfinished_runs_are_said(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        report.run(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"result.json is missing"):
        report.run(tmp_path)
