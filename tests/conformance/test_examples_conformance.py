"""The plug-ins of real implementations: that their pages and what a run finds agree, where a library is installed."""
import importlib
import re
from pathlib import Path

import pytest

from minipeft.conformance import check
from minipeft.conformance.methods import all_methods
from minipeft.conformance.outputs import property_named

FOLDER = Path(__file__).parents[2] / "examples" / "conformance"
NAMES = sorted(path.stem for path in (FOLDER / "reports").glob("*.md"))
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


@pytest.fixture
def plugins(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("remarks").PLUGINS


def test_every_plug_in_has_a_page_and_stands_in_the_table(plugins):
    table = (FOLDER / "README.md").read_text()
    assert NAMES == sorted(plugins)
    for name, plugin in plugins.items():
        assert f"[{name}.py]({name}.py)" in table and f"reports/{name}.md" in table
        assert f"pip install {plugin.install}" in table.replace("`", "")


def test_every_remark_is_about_properties_that_exist(plugins):
    for plugin in plugins.values():
        for remark in plugin.remarks:
            method = all_methods()[remark.method]
            known = [*(prop.id for prop in method.properties), *(f"V {name}" for name in method.outputs), "X1"]
            assert any(re.fullmatch(remark.ids, id) for id in known), remark.title
            assert all(property_named(method, id) for id in known)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_what_it_is_and_is_not(plugins, name):
    text = (FOLDER / "reports" / f"{name}.md").read_text()
    assert text.startswith(f"# {plugins[name].title}\n") and "not a verdict on the library" in text
    assert "not judged yet" not in text
    for remark in plugins[name].remarks:
        assert f"{remark.method}: {remark.kind}: {remark.title}\n" in text and remark.text in text


@pytest.mark.parametrize("name", NAMES)
def test_a_run_fails_where_the_page_says_so_and_finds_every_defect(plugins, name):
    plugin = plugins[name]
    for package in plugin.imports:
        pytest.importorskip(package)
    report = check(name, plugin.methods, ["bfloat16"], cases=4, limit=60.0)
    assert report.results
    for result in report.failures:
        assert failed_on_the_page(name, result), f"{result.method} {result.id}: {result.failure}"
    for defect in (remark for remark in plugin.remarks if remark.kind == "defect"):
        assert any(r.method == defect.method and re.fullmatch(defect.ids, r.id) for r in report.failures), defect.title


def failed_on_the_page(name: str, result) -> bool:
    """Whether the table of its method has FAIL for this property in this dtype."""
    section = (FOLDER / "reports" / f"{name}.md").read_text().split(f"## {result.method}: ")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    column = len(rows[0]) - rows[0].index(result.dtype)
    return any(row[0] == result.id and row[-column].startswith("FAIL") for row in rows)
