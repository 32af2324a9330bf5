"""Counts of parameters, equal to those of the papers, of the published models, and of their tables."""

import minipeft
import pytest

from minipeft.tools.planning.configs import of_values
from minipeft.tools.planning.methods import chosen, known, made
from minipeft.tools.planning.settings import Settings
from minipeft.tools.planning.step import planned
from tests.tools.planning.models import LLAMA_3_8B, LLAMAS, llama, t5

TINY = {"batch": 1, "source": 1, "target": 1}


def counted(values, name="lora", where="all-linear", **fields):
    config = values if isinstance(values, minipeft.T5Config) else of_values(values)
    return planned(config, made(name, config, fields.get("rank"), chosen(where, config, None)), Settings(**TINY))


@pytest.mark.parametrize("name, parameters, lora", [
    ("7B", 6_738_415_616, 159_907_840), ("13B", 13_015_864_320, 250_347_520), ("33B", 32_528_943_616, 487_587_840),
    ("65B", 65_285_660_672, 799_539_200)])
def test_llamas_parameters_and_those_of_a_lora_of_rank_64_on_all_linear_layers(name, parameters, lora):
    """Xu et al., 2023, arXiv:2309.14717, table 2: 160M, 250M, 488M, 800M."""
    step = counted(LLAMAS[name], rank=64)
    assert (step.base, step.trained) == (parameters, lora)


def test_llama_3_8b_shares_its_keys_and_values_among_four_heads():
    step = counted(LLAMA_3_8B, rank=64)
    assert (step.base, step.trained) == (8_030_261_248, 167_772_160)


@pytest.mark.parametrize("rank, millions", [(1, 4_718_592), (8, 37_748_736)])
def test_gpt_3_with_a_lora_on_q_and_v(rank, millions):
    """Hu et al., 2021, arXiv:2106.09685, table 4: 4.7M and 37.7M. Its attention is as wide as the model."""
    assert counted(llama(12288, 49152, 96, 96, 50257), where=None, rank=rank).trained == millions


def test_ia3_on_t0_of_11_billion():
    """Liu et al., 2022, arXiv:2205.05638: 1,081,344 on T5 v1.1 XXL."""
    config = t5(4096, 64, 64, 10240, 24, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    assert counted(config, "ia3", where=None).trained == 1_081_344


@pytest.mark.parametrize("sizes, v1_1, parameters", [
    ((512, 64, 8, 2048, 6), False, 60_506_624), ((768, 64, 12, 3072, 12), False, 222_903_552),
    ((1024, 64, 16, 4096, 24), False, 737_668_096), ((1024, 128, 32, 16384, 24), False, 2_851_598_336),
    ((1024, 128, 128, 65536, 24), False, 11_307_321_344), ((512, 64, 6, 1024, 8), True, 76_961_152),
    ((768, 64, 12, 2048, 12), True, 247_577_856), ((1024, 64, 16, 2816, 24), True, 783_150_080),
    ((2048, 64, 32, 5120, 24), True, 2_849_757_184), ((4096, 64, 64, 10240, 24), True, 11_135_332_352)])
def test_t5_of_both_versions_at_all_sizes(sizes, v1_1, parameters):
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if v1_1 else {}
    assert counted(t5(*sizes, **options), "norms", where=None).base == parameters


@pytest.mark.skipif("qalora" not in known(), reason="this version of the library has no QA-LoRA")
@pytest.mark.parametrize("name, lora", [("7B", 89_309_184), ("13B", 139_878_400), ("33B", 272_363_520),
                                        ("65B", 446_545_920)])
def test_qa_lora_of_rank_64_in_groups_of_32(name, lora):
    """Xu et al., 2023, arXiv:2309.14717, table 2: 89M, 140M, 272M, 447M."""
    assert counted(LLAMAS[name], "qalora", rank=64).trained == lora


@pytest.mark.parametrize("name, gigabytes", [("7B", 3.87), ("13B", 7.20), ("33B", 17.41), ("65B", 34.46)])
def test_llama_in_nf4_with_double_quantization_and_the_rest_in_16_bits(name, gigabytes):
    """The weights alone, recounted from Dettmers et al., 2023, arXiv:2305.14314, fig. 6, whose bars are 1.2 to 2.6 GB
    higher."""
    step = planned(of_values(LLAMAS[name]), minipeft.LoRA(8), Settings(
        **TINY, dtype="bfloat16", quantize="nf4", double=True))
    assert step.phases["forward"]["weights"] / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_full_fine_tuning_of_65b_in_16_bits_takes_the_papers_780_gb():
    """arXiv:2305.14314, abstract: more than 780 GB. Weights and gradients in 16 bits, moments in 32."""
    step = planned(of_values(LLAMAS["65B"]), None, Settings(**TINY, dtype="bfloat16"))
    assert step.totals["optimizer"] / 1e9 == pytest.approx(783.4, abs=0.1)


@pytest.mark.parametrize("name, trained", [
    ("lora", 294_912), ("dora", 313_344), ("vera", 27_648), ("loha", 589_824), ("lokr", 27_648), ("hira", 294_912),
    ("oft", 285_696), ("ia3", 43_008), ("norms", 16_384), ("addedbias", 58_368), ("bottleneck", 799_488),
    ("prompt", 10_240), ("prefix", 368_640), ("full", 60_506_624)])
def test_every_method_trains_on_t5_small_what_its_page_says(name, trained):
    assert counted(minipeft.T5Config(), name, where=None).trained == trained
