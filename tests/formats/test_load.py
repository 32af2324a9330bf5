"""`minipeft.load`: files and folders, alone and in lists, all or nothing."""
from __future__ import annotations

import inspect
import shutil
import warnings

import numpy
import pytest

import minipeft
from minipeft import T5
from minipeft.formats import adapterhub, peft
from tests.methods.golden import FIXTURES
from tests.models_under_test import bits

PEFT, HUB, OTHER = (FIXTURES / name for name in ("adapters/lora_qv", "bottleneck/seq_bn", "adapterhub/lora"))
IDS = numpy.array([[5, 6, 7, 1]])


@pytest.fixture
def model():
    return T5.from_pretrained(FIXTURES / "t5" / "v11")


def outputs(model):
    return model(IDS, IDS).data.tobytes()


def state(model):
    """What a refusal leaves as it was."""
    return model.attachments, model.plugged, bits(model.base_parameters)


def refused(model, path, message, error=ValueError, **options):
    before = state(model)
    with pytest.raises(error, match=message):
        minipeft.load(model, path, **options)
    assert state(model) == before


def test_a_folder_is_loaded_under_its_own_name_or_the_one_that_is_given(model, tmp_path):
    odd = shutil.copytree(PEFT, tmp_path / "my adapter (v2)")
    names = [minipeft.load(model, path).name for path in (PEFT, str(HUB), odd)]
    assert names == ["lora_qv", "seq_bn", "my_adapter__v2_"]
    assert minipeft.load(model, HUB, name="mine").name == "mine"
    refused(model, PEFT, f"{PEFT}: an attachment named 'lora_qv' is already on this model .*pass another name")
    refused(model, HUB, f"{HUB}: an attachment named 'seq_bn' is already on this model .*pass another name")
    refused(model, HUB, "expected letters", name="a.b")
    refused(model, HUB, "name is ''", name="")


def test_a_list_of_folders_is_plugged_in_its_order(model, tmp_path):
    one = minipeft.load(model, [PEFT, HUB, OTHER], name=["a", "b", "c"])
    assert [a.name for a in one] == list(model.plugged) == ["a", "b", "c"]
    stacked = outputs(model)
    for attachment in reversed(one):
        attachment.remove()
    for path in (PEFT, HUB, OTHER):
        minipeft.load(model, path)
    assert outputs(model) == stacked
    assert [type(a) for a in minipeft.load(model, (HUB,), name=["d"])] == [minipeft.Attachment]


def test_a_list_is_loaded_whole_or_not_at_all(model, tmp_path):
    refused(model, [PEFT, FIXTURES / "bottleneck" / "double_seq_bn"], "double_seq_bn: .*tensors of the file are not")
    refused(model, [PEFT, tmp_path / "nowhere"], "nowhere is not there. Nothing is downloaded", FileNotFoundError)
    refused(model, [PEFT, tmp_path], "is an empty folder", FileNotFoundError)
    refused(model, [PEFT, shutil.copytree(HUB, tmp_path / "lora_qv")],
            r"lora_qv, .*lora_qv: two of the folders are called 'lora_qv'; pass name=\[...\], one for each")
    refused(model, [PEFT, HUB], "2 folders and 1 names; expected a name for each", name=["a"])
    refused(model, [], "0 files and 0 names")


def test_a_list_of_files_and_folders_is_refused_and_files_alone_are_loaded_as_ever(model, tmp_path):
    for name in "ab":
        attachment = minipeft.attach(model, minipeft.LoRA(2), numpy.random.default_rng(0), name)
        attachment.save(tmp_path / name)
        attachment.remove()
    refused(model, [tmp_path / "a", PEFT], "lora_qv is a folder of another library's, and .*a is an adapter file of")
    assert [a.name for a in minipeft.load(model, [tmp_path / "a", tmp_path / "b"])] == ["a", "b"]
    refused(model, 5, "the path of a file is 5; expected a string or a Path", TypeError)
    refused(model, [PEFT, None], "lora_qv is a folder of another library's, and None is a file of an unknown kind")


def test_what_cannot_lie_above_what_is_plugged_is_refused_with_the_names_of_the_folders(model, monkeypatch):
    def impossible(model, attachments):
        raise ValueError("one cannot lie above the other")
    monkeypatch.setattr("minipeft.formats.load.put", impossible)
    refused(model, [PEFT, HUB], f"{PEFT}, {HUB}: one cannot lie above the other")


def test_what_was_changed_in_order_to_read_a_folder_is_said_where_load_was_called(model, tmp_path):
    path = shutil.copytree(PEFT, tmp_path / "a")
    arrays = minipeft.files.read_tensors(path / "adapter_model.safetensors")[0]
    minipeft.files.write_tensors(path / "adapter_model.safetensors", {f"_orig_mod.{k}": v for k, v in arrays.items()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        minipeft.load(model, [path, HUB])
    assert [(w.filename, str(path) in str(w.message)) for w in caught] == [(__file__, True)]


def test_as_peft_is_handed_to_the_reader_of_pefts_folders_and_says_nothing_about_others():
    tied, prefix = T5.from_pretrained(FIXTURES / "t5" / "v10"), FIXTURES / "adapters" / "prefix_tuning"
    refused(tied, prefix, "Pass as_peft=True to get the numbers of PEFT")
    hub = FIXTURES / "bottleneck" / "double_seq_bn"
    assert [a.name for a in minipeft.load(tied, [prefix, hub], as_peft=True)] == ["prefix_tuning", "double_seq_bn"]


def test_it_says_which_arguments_the_readers_of_folders_have():
    for reader in (peft.load, adapterhub.load):
        assert list(inspect.signature(reader).parameters)[:3] == ["model", "path", "name"]
        assert reader.__doc__ and "FileNotFoundError" in reader.__doc__
