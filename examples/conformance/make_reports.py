"""One page per implementation, reports/<name>.md: what the kit found when it was run here.

    python examples/conformance/make_reports.py [NAME ...] [--cases 25]

Runs every plug-in whose library can be imported and leaves the pages of the others as they are, so that libraries that
do not go together can each be run in an environment of their own. Of a page nothing is written by hand but the remarks
in `remarks.py`, which say of each failure whether it is a defect or a convention. A failure without a remark, or a
remark without a failure, makes the exit status 1.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from minipeft.conformance import check  # noqa: E402
from minipeft.conformance.methods import all_methods  # noqa: E402
from minipeft.conformance.report import LEGEND, Report, cell  # noqa: E402
from remarks import PLUGINS, Plugin, Remark  # noqa: E402

VERDICT = ("This page says what one program found in one version on one machine. It is not a verdict on the library: "
           "it looks at a few functions through a plug-in that we wrote, and the plug-in may be at fault.")

KINDS = ("not judged yet", "defect", "convention", "limitation", "strictness")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(PLUGINS)}; default: all")
    parser.add_argument("--cases", type=int, help="drawn cases per method, dtype and kind; default: each plug-in's own")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(PLUGINS))
    if unknown:
        parser.error(f"no plug-in {unknown[0]!r}; there are {', '.join(PLUGINS)}")
    open_questions = []
    for name in args.names or PLUGINS:
        plugin = PLUGINS[name]
        missing = [package for package in plugin.imports if importlib.util.find_spec(package) is None]
        if missing:
            print(f"{name}: skipped, {', '.join(missing)} cannot be imported")
            continue
        cases = args.cases or plugin.cases
        report = check(name, plugin.methods, cases=cases, limit=60.0)
        text, questions = page(name, plugin, report, cases)
        (HERE / "reports").mkdir(exist_ok=True)
        (HERE / "reports" / f"{name}.md").write_text(text)
        print(f"{name}: {report.verdict}")
        open_questions += [f"{name}: {question}" for question in questions]
    print(*open_questions, sep="\n")
    return 1 if open_questions else 0


def page(name: str, plugin: Plugin, report: Report, cases: int) -> tuple[str, list[str]]:
    """The page, and what needs a remark, or has one that nothing bears out."""
    about, env = report.about, report.as_json()
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in plugin.packages)
    bad, questions = failures(plugin, report)
    lines = [f"# {plugin.title}", "",
             f"{datetime.date.today().isoformat()}. {versions}; Python {platform.python_version()}, "
             f"{platform.system()}, CPU. Plug-in: [{name}.py](../{name}.py).", "", VERDICT, "", plugin.about, "",
             "```", f"pip install {plugin.install}",
             f"python -m minipeft.conformance --impl examples.conformance.{name}", "```", "",
             f"Spec {env['spec']}, vectors {env['pack']}, and {cases} drawn cases per method, dtype and kind, seed 0.",
             *conventions(about), "", report.verdict, ""]
    for method in plugin.methods:
        lines += table(method, report)
    lines += [" ".join(LEGEND.split("\n")).replace("see --skips", "see below"), ""]
    lines += ["## What conforms", "", *conforming(plugin, report), "", *survival(report)]
    lines += ["## What does not", "", *(bad or ["Nothing was found.", ""])]
    lines += ["## What was not run", "", *(skipped(report) or ["Everything was run."]), ""]
    return "\n".join(lines), questions


def conventions(about: dict[str, Any]) -> list[str]:
    """What the plug-in declares, where it is not the default."""
    found = [f"{method}: {key} = {value}" for method, chosen in about.get("conventions", {}).items()
             for key, value in chosen.items() if value != all_methods()[method].default()[key]]
    return ["Declared conventions: " + ("; ".join(found) if found else "the defaults, those of the papers") + "."]


def table(method: str, report: Report) -> list[str]:
    """rho by property and dtype, in Markdown."""
    dtypes, kind = list(report.about["dtypes"]), all_methods()[method]
    mine = [r for r in report.results if r.method == method]
    lines = [f"## {method}: {kind.title}", "", f"| property | | {' | '.join(dtypes)} |",
             f"|---|---|{'---|' * len(dtypes)}"]
    for id in dict.fromkeys(r.id for r in mine if r.status != "skip"):
        by = {r.dtype: r for r in mine if r.id == id}
        title = next((r.title for r in by.values() if r.title), "")
        lines.append(f"| {id} | {title} | {' | '.join(cell(by.get(dtype)) for dtype in dtypes)} |")
    return [*lines, ""]


def conforming(plugin: Plugin, report: Report) -> list[str]:
    """A line per method."""
    lines = []
    for method in plugin.methods:
        by: dict[str, set[str]] = {}
        for r in report.results:
            if r.method == method and r.status != "skip":
                by.setdefault(r.id, set()).add(r.status)
        good = [id for id, status in by.items() if status == {"pass"}]
        lines.append(f"- {method}, in every dtype that was run: {len(good)} of {len(by)} properties"
                     + (f" ({', '.join(good)})." if good and len(good) < len(by) else "."))
    return lines


def survival(report: Report) -> list[str]:
    """What a merge in half precision keeps of a small update, beside what one correct rounding keeps."""
    lines = report.as_json()["merge_survival"]
    if not lines:
        return []
    ratios, dtypes = (list(dict.fromkeys(line[key] for line in lines)) for key in ("ratio", "dtype"))
    table = {(line["dtype"], line["ratio"]): f"{line['share']:.0%} ({line['best']:.0%})" for line in lines}
    return ["Of an update D, a merge keeps (in brackets: one correct rounding):", "",
            f"| abs(D) / abs(W) | {' | '.join(f'{ratio:g}' for ratio in ratios)} |", f"|---|{'---|' * len(ratios)}",
            *(f"| {dtype} | {' | '.join(table[dtype, ratio] for ratio in ratios)} |" for dtype in dtypes), ""]


def failures(plugin: Plugin, report: Report) -> tuple[list[str], list[str]]:
    """The lines about failures, those with the same remark together; and what has no remark, or no failure."""
    groups: dict[tuple[str, Remark | None], list[Any]] = {}
    for r in report.failures:
        groups.setdefault((r.method, remark_of(plugin, r)), []).append(r)
    lines, questions = [], []
    for (method, remark), group in sorted(groups.items(), key=lambda item: KINDS.index(kind_of(item[0][1]))):
        if remark is None:
            questions += [f"{r.method} {r.id} {r.dtype} has no remark: {r.failure}" for r in group]
        lines += failure(method, remark, group)
    seen = {remark for _, remark in groups}
    questions += [f"nothing bears out the remark {remark.title!r}" for remark in plugin.remarks if remark not in seen]
    return lines, questions


def failure(method: str, remark: Remark | None, group: list[Any]) -> list[str]:
    """A failure in full: which properties saw it, the smallest case, the kit's words."""
    found: dict[str, list[str]] = {}
    for r in group:
        found.setdefault(f"{r.id}", []).append(r.dtype)
    seen_by = "; ".join(f"{id} ({', '.join(dict.fromkeys(dtypes))})" for id, dtypes in found.items())
    first = min(group, key=lambda r: (len(r.minimal or r.failure), r.id))
    links = sorted({link for r in group for link in r.links})
    diagnoses = dict.fromkeys(r.diagnosis for r in group if r.diagnosis)
    smallest = first.failure if first.id == "X1" else first.minimal or first.failure
    heading = f"{kind_of(remark)}: {remark.title}" if remark else kind_of(remark)
    lines = [f"### {method}: {heading}", "", *([remark.text, ""] if remark else []), f"- found by: {seen_by}",
             f"- smallest case ({first.id}): `{clean(smallest)}`"]
    lines += [f"- the kit's words: {clean(words)}" for words in diagnoses]
    return [*lines, *([f"- known: {', '.join(links)}"] if links else []), ""]


def kind_of(remark: Remark | None) -> str:
    return remark.kind if remark else KINDS[0]


def remark_of(plugin: Plugin, result: Any) -> Remark | None:
    """The first that is meant for it."""
    return next((remark for remark in plugin.remarks if remark.method == result.method
                 and re.fullmatch(remark.ids, result.id) and result.dtype in (remark.dtypes or (result.dtype,))), None)


def clean(text: str) -> str:
    return text.replace("`", "'").replace(os.fspath(HERE.parents[1]) + "/", "")


def skipped(report: Report) -> list[str]:
    return ["-" + line[1:] for line in report.skips()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
