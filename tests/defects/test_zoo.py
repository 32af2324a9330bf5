"""Defects found in peft 0.21.2 in methods of the zoo, and the tests that show that they are absent here.

    audit 2       two OFT adapters at once: merged in the reverse order, 10 to 60 % off
    audit 4       OFT: one file, two directions, by the switch between the exact form and the series
    note 3        OFT: the series is no rotation for large Q
    note 8        VeRA: the same key gives other projections under another default dtype
    note 12       LoKr: alpha / r also where r means nothing
    drift         unmerging subtracts, so that a cycle does not give the bits back (D7)
"""
from __future__ import annotations

from pathlib import Path

import numpy
import pytest

import minipeft
from minipeft.files import read_metadata
from minipeft.laws.models import batch_for, bits, logits, model_of, moved
from minipeft.methods.oft import CAYLEY
from minipeft.methods.vera import by_key

FIXTURES = Path(__file__).parents[1] / "fixtures" / "zoo"
VOCAB = 13
METHODS = [minipeft.VeRA(3), minipeft.LoHa(2), minipeft.LoKr(1), minipeft.HiRA(2), minipeft.OFT(4)]


def attached(model, method, seed, name):
    rng = numpy.random.default_rng(seed)
    return moved(minipeft.attach(model, method, rng, name), rng, 0.5)


def dense_rotations(attachment, slot):
    """R [12, 12] of an OFT at a slot, from its numbers alone."""
    q = attachment.parameters[next(n for n in attachment.parameters if n.startswith(slot))].data
    R = numpy.zeros((12, 12))
    for i, numbers in enumerate(q):
        Q = numpy.zeros((4, 4))
        Q[numpy.triu_indices(4, 1)] = numbers
        Q -= Q.T
        R[4 * i:4 * i + 4, 4 * i:4 * i + 4] = (numpy.eye(4) + Q) @ numpy.linalg.inv(numpy.eye(4) - Q)
    return R


def test_audit_2_two_active_ofts_merge_into_what_they_compute_with_the_first_one_below():
    """W = W0 R_a^T R_b^T, with a below b. Rotations do not commute: the other order is another model, and has its own
    name in a routing."""
    model, batch, slot = model_of("t5 v1.1", "float64", 0), batch_for(VOCAB, 0), "encoder.0.attn.q.weight"
    found = [attached(model, minipeft.OFT(4), seed, name) for seed, name in enumerate("ab")]
    W0, Ra, Rb = (model.slots[slot].base.data, *(dense_rotations(one, slot) for one in found))
    unmerged, swapped = logits(model, batch), logits(model, batch, adapter=("b", "a"))
    assert abs(unmerged - swapped).max() > 1e-2 * abs(unmerged).max()
    assert abs(model.slots[slot].fold(("b", "a")).dense().data - W0 @ Rb.T @ Ra.T).max() < 1e-13
    for one in found:
        assert abs(model.slots[slot].fold().dense().data - W0 @ Ra.T @ Rb.T).max() < 1e-13
        one.merge()
    assert abs(model.slots[slot].fold().dense().data - W0 @ Ra.T @ Rb.T).max() < 1e-13
    assert abs(logits(model, batch) - unmerged).max() < 1e-12 * abs(unmerged).max()


def test_audit_4_the_direction_of_a_rotation_is_a_field_of_its_own_and_travels_in_the_file(tmp_path):
    rotations = {}
    for cayley in CAYLEY:
        model = model_of("t5 v1.1", "float64", 0)
        attachment = moved(minipeft.attach(model, minipeft.OFT(4, cayley=cayley), numpy.random.default_rng(0), "a"),
                           numpy.random.default_rng(1), 0.05)
        attachment.save(tmp_path / cayley)
        assert cayley == "paper" or f'"{cayley}"' in str(read_metadata(tmp_path / cayley))
        fresh = model_of("t5 v1.1", "float64", 0)
        assert minipeft.load(fresh, tmp_path / cayley).method.cayley == cayley
        rotations[cayley] = model.slots["encoder.0.attn.q.weight"].attached["a"].rotation().data
        assert (fresh.slots["encoder.0.attn.q.weight"].attached["a"].rotation().data
                == rotations[cayley]).all()
    assert abs(rotations["paper"] @ rotations["transposed"] - numpy.eye(4)).max() < 1e-14
    off = {name: abs(R - rotations["neumann"]).max() for name, R in rotations.items()}
    assert off["paper"] < 1e-3 < 0.1 < off["transposed"], "the series turns as the paper's form does"


def test_peft_note_3_our_default_is_a_rotation_for_any_q_and_the_series_is_none():
    for cayley, least, most in (("paper", 0, 1e-13), ("transposed", 0, 1e-13), ("neumann", 1, numpy.inf)):
        model = model_of("t5 v1.1", "float64", 0)
        attachment = attached(model, minipeft.OFT(4, cayley=cayley), 0, "a")
        R = next(iter(attachment.places.values())).attached["a"].rotation().data
        assert least <= abs(R @ R.swapaxes(1, 2) - numpy.eye(4)).max() <= most
    assert minipeft.OFT().cayley == "paper"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_peft_note_8_the_projections_of_a_key_are_the_same_numbers_in_every_dtype(dtype):
    """Those of a peft adapter that was saved without them, bit for bit."""
    with numpy.load(FIXTURES / "vera_no_projection_llama" / "projections.npz") as golden:
        wanted = dict(golden)
    (rank, d_in), d_out = wanted["vera_A"].shape, wanted["vera_B"].shape[0]
    rng = numpy.random.default_rng(0)
    A = by_key(123, 0)((rank, d_in), numpy.dtype(dtype), rng)
    B = by_key(123, rank * d_in)((d_out, rank), numpy.dtype(dtype), rng)
    assert A.dtype == B.dtype == dtype
    assert (A == wanted["vera_A"]).all() and (B == wanted["vera_B"]).all()
    drawn = {}
    for kind in ("float64", "float32"):
        model = model_of("t5 v1.1", kind, 0)
        drawn[kind] = minipeft.attach(model, minipeft.VeRA(3, key=123), numpy.random.default_rng(0), "a").arrays
    assert all((drawn["float64"][f"vera@a.{leaf}"].data == drawn["float32"][f"vera@a.{leaf}"].data).all()
               for leaf in "AB")


def test_peft_note_12_the_scale_of_two_full_factors_is_1_unless_the_method_says_alpha_over_r():
    def change(**fields):
        model = model_of("t5 v1.1", "float64", 0)
        attachment = attached(model, minipeft.LoKr(alpha=36, **fields), 0, "a")
        slot = next(iter(attachment.places.values()))
        arrays = slot.attached["a"].arrays
        assert ({"w1", "w2"} == set(arrays)) == (fields["rank"] == 9)
        if "w2" not in arrays:
            return slot.fold().dense().data - slot.base.data, numpy.kron(
                arrays["w1"].data, arrays["w2_a"].data @ arrays["w2_b"].data)
        return slot.fold().dense().data - slot.base.data, numpy.kron(arrays["w1"].data, arrays["w2"].data)

    for fields, scale in ((dict(rank=9), 1), (dict(rank=9, full="alpha / r"), 4), (dict(rank=1), 36),
                          (dict(rank=1, full="alpha / r"), 36)):
        found, kron = change(**fields)
        assert abs(found - scale * kron).max() < 1e-12


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_drift_a_hundred_cycles_of_merge_and_unmerge_give_every_bit_back(method):
    model = model_of("t5 v1.1", "float32", 0)
    attachment, base = attached(model, method, 0, "a"), bits(model.base_parameters)
    before = {name: slot.fold().dense().data.tobytes() for name, slot in attachment.places.items()}
    for _ in range(100):
        attachment.merge()
        attachment.unmerge()
    assert bits(model.base_parameters) == base
    assert {name: slot.fold().dense().data.tobytes() for name, slot in attachment.places.items()} == before
