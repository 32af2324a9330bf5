"""The numbers on docs/memory.md that a plan gives are those of the plan."""
import re
from pathlib import Path

import minipeft
import pytest

from minipeft.tools import plan
from tests.tools.planning.models import D64, D256, SMALL

PAGE = (Path(__file__).parents[3] / "docs" / "memory.md").read_text("utf-8")


@pytest.mark.parametrize("name, size", [("d64", D64), ("d256", D256), ("t5-small", SMALL)])
def test_the_table_has_the_plans_of_today(name, size):
    rows = re.findall(rf"^{name} +(LoRA|full) step +([\d.]+) .* ([\d.]+) +[\d.]+  [\d.]+$", PAGE, re.MULTILINE)
    assert [kind for kind, *_ in rows] == ["LoRA", "full"]
    for kind, step, load in rows:
        found = plan(size[0], "full" if kind == "full" else minipeft.LoRA(rank=8, alpha=16), others=False,
                     **size[1]).step
        assert f"{found.beside / 2 ** 20:.1f}" == step and f"{found.totals['load'] / 2 ** 20:.1f}" == load


def test_the_output_on_the_page_is_that_of_today():
    block = re.search(r"<!-- the plan of a T5-small -->\n```text\n(.*?)\n```", PAGE, re.DOTALL)[1]
    assert str(plan(minipeft.T5Config(), rank=8, others=False)).startswith(block) and "the peak is" in block


def test_the_bytes_for_each_parameter_are_those_of_the_plans():
    said = [float(n) for n in re.search(
        r"takes ([\d.]+) bytes a parameter beside the weights.*?takes ([\d.]+) bytes\. A LoRA step takes ([\d.]+) and "
        r"([\d.]+):", PAGE, re.DOTALL).groups()]
    found = []
    for method in ("full", "lora"):
        for sizes in ({"source": 128, "target": 64, "dropout": 0.0}, {"source": 512, "target": 128}):
            step = plan(minipeft.T5Config(), method, others=False, **sizes).step
            weights = step.phases[step.training]["weights"]
            found.append(round((step.totals[step.training] - weights) / step.base, 1))
    assert found == said
