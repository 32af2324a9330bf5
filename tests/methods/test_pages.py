"""The page of a method: its parts in their order, its numbers, and a use that works."""
from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import numpy
import pytest

import minipeft
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.method import METHODS
from minipeft.methods.bias import AddedBias
from minipeft.methods.bottleneck import Bottleneck
from minipeft.methods.dora import DoRA
from minipeft.methods.hira import HiRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.loha import LoHa
from minipeft.methods.lokr import LoKr
from minipeft.methods.lora import LoRA
from minipeft.methods.oft import OFT
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.qalora import QALoRA
from minipeft.methods.selective import Selective
from minipeft.methods.union import Union
from minipeft.methods.vera import VeRA
from minipeft.models.t5 import T5, T5Config

PACKAGE = Path(minipeft.__file__).parent
# {page: the method that its docstring counts}
PAGES = {"lora": LoRA(), "bottleneck": Bottleneck("houlsby"), "prompt": PromptTuning(20, init="random"),
         "selective": Selective(component="norm"), "dora": DoRA(), "ia3": IA3(), "bias": AddedBias(),
         "prefix": PrefixTuning(20),
         "vera": VeRA(), "loha": LoHa(), "lokr": LoKr(), "hira": HiRA(), "oft": OFT(),
         "qalora": QALoRA(),
         "union": Union(LoRA(8), Selective(component="norm"))}
ZOO = {"vera": 60, "loha": 60, "hira": 60, "lokr": 90, "oft": 90, "qalora": 90}  # lines of code that a page may have
IN_THE_KIT = ("lora", "bottleneck", "prompt", "selective")  # pages of methods that `minipeft.conformance` checks
T5_SMALL = T5Config(vocab_size=32128, d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=6, num_decoder_layers=6)
# From LoRA down to routing, in the order in which a newcomer reads them.
READING_PATH = ("methods/lora.py", "nn/weight.py", "nn/slot.py", "attaching/attach.py", "nn/layers.py",
                "nn/attention.py", "engine/ops/definitions.py", "engine/ops/primitives.py", "engine/tensor.py",
                "nn/routing.py")


def source(page: str) -> str:
    return (PACKAGE / "methods" / f"{page}.py").read_text("utf-8")


def opening(page: str) -> list[str]:
    """The paragraphs of a page's docstring."""
    return (ast.get_docstring(ast.parse(source(page))) or "").split("\n\n")


def the_use(page: str) -> str:
    """The three lines that begin with `adapter = attach(`."""
    found = [p for p in opening(page) if p.lstrip().startswith("adapter = attach(")]
    assert len(found) == 1, f"{page}.py: {len(found)} uses"
    return "\n".join(line.strip() for line in found[0].splitlines())


def sentences(paragraph: str) -> list[str]:
    return re.findall(r"\S.*?[.:](?=\s|$)", " ".join(paragraph.split()), flags=re.S)


@pytest.fixture(scope="module")
def t5_small():
    return T5(T5_SMALL, None)  # zeros, which cost nothing


def test_each_registered_method_of_the_package_has_a_page():
    there = {type(method) for method in PAGES.values()}
    assert {kind for kind in METHODS.values() if kind.__module__.startswith("minipeft.methods.")} == there
    assert all(type(method).__module__ == f"minipeft.methods.{page}" for page, method in PAGES.items())


@pytest.mark.parametrize("page", PAGES)
def test_a_page_counts_the_parameters_that_it_trains_on_t5_small(page, t5_small):
    said = re.findall(r"^On T5-small, .*: ([\d,]+) parameters of ([\d,]+)\.$", "\n".join(opening(page)), flags=re.M)
    assert len(said) == 1
    trainable, base = (int(n.replace(",", "")) for n in said[0])
    assert minipeft.report(t5_small).all == base
    attachment = minipeft.attach(t5_small, PAGES[page], numpy.random.default_rng(0))
    found = minipeft.report(t5_small).trainable
    attachment.remove()
    assert found == trainable


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_equation_source_and_shapes_and_says_why_it_works_in_two_sentences(page):
    paragraphs = opening(page)
    assert re.fullmatch(r"[A-Z(][\w ()^-]+: .*\.", " ".join(paragraphs[0].split()))     # its name, and what it is
    assert paragraphs[1].startswith("    "), "the equation comes second"
    source = r"arXiv:\d{4}\.\d{5}|openreview\.net/forum\?id=\w+"  # a paper that is not on arXiv has a page of reviews
    assert re.search(source, "\n\n".join(paragraphs))
    use = next(i for i, p in enumerate(paragraphs) if p.lstrip().startswith("adapter = attach("))
    assert any("--" in p and "[" in p for p in paragraphs[1:use]), "a sketch of the shapes stands before the use"
    assert len(sentences(paragraphs[use - 1])[:2]) == 2 and not paragraphs[use - 1].startswith(" ")


@pytest.mark.parametrize("page", PAGES)
def test_the_use_is_three_lines_of_python_with_names_that_exist(page):
    lines = the_use(page).splitlines()
    assert len(lines) == 3
    tree = ast.parse(the_use(page))
    given, owners = {"model", "batches", "ids", "mask", "numpy"}, {"adapter": Attachment, "model": T5, "numpy": numpy}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in given | {"adapter"}:
            assert hasattr(minipeft, node.id), node.id
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
            assert hasattr(owners[node.value.id], node.attr), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (type(PAGES[page]).__name__, "AdamW"):
            eval(ast.unparse(node), vars(minipeft))  # accepts these arguments


@pytest.mark.parametrize("page", PAGES)
def test_a_page_ends_with_the_mistakes_people_make_and_with_where_to_go_next(page):
    tail = source(page).splitlines()
    comments = tail[max(i for i, line in enumerate(tail) if not line.startswith("#")) + 1:]
    text = " ".join(line.lstrip("# ") for line in comments)
    assert comments[0].startswith("# Mistakes that people make")
    assert sum(line.startswith("# * ") for line in comments) >= 3
    following = re.findall(r"`([\w/]+\.py)`", text[text.index("Next: "):])
    assert following and all((PACKAGE / path).exists() for path in following)
    method = re.findall(r"--method (\w+)", comments[0])
    assert method or page not in IN_THE_KIT, "its mistakes are in the kit's catalogue"
    assert all(any(m in path.stem for path in (PACKAGE / "conformance" / "methods").rglob("*")) for m in method), method


def code_lines(text: str) -> int:
    """The lines that hold more than a comment or a part of a docstring."""
    docstrings = {line for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)
                  and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
                  for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    return len({line for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                                      tokenize.ENDMARKER)
                for line in range(token.start[0], token.end[0] + 1)} - docstrings)


@pytest.mark.parametrize("page", ZOO)
def test_a_page_of_the_zoo_is_short(page):
    assert code_lines('"""Of\ntwo lines."""\n\nx = (1,  # one\n     # and\n     2)\n') == 2
    assert code_lines(source(page)) <= ZOO[page]


def test_the_class_that_is_lora_begins_before_line_40():
    lines = source("lora").splitlines()
    assert lines.index("class LowRank(Reparam):") + 1 < 40


def test_the_reading_path_is_ten_files_and_at_most_1300_lines():
    lines = {path: len((PACKAGE / path).read_text("utf-8").splitlines()) for path in READING_PATH}
    assert len(lines) == 10 and sum(lines.values()) <= 1300, lines
