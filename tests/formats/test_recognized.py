"""Every kind of path is recognized without reading a tensor, and refused by its name where nothing reads it."""
from __future__ import annotations

import json
import os
import pickle
import struct

import numpy
import pytest

import minipeft
from minipeft import T5
from minipeft.files import write_tensors
from minipeft.formats import recognized
from minipeft.formats.recognized import recognize
from tests.methods.golden import FIXTURES

MODEL = T5.from_pretrained(FIXTURES / "t5" / "v11")
A, Q = numpy.ones((2, 16), "float32"), "encoder.block.0.layer.0.SelfAttention.q"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


def tensors(name, *keys):
    """Writes a safetensors file with these keys."""
    return lambda path: write_tensors(path / name, {key: A for key in keys}, signed=False)


def text(name, content):
    return lambda path: (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def raw(name, content):
    return lambda path: (path / name).write_bytes(content)


def link(name):
    return lambda path: (path / name).symlink_to("nowhere")


def ours(name):
    def write(path):
        attachment = minipeft.attach(MODEL, minipeft.LoRA(2), numpy.random.default_rng(0))
        attachment.save(path / name)
        attachment.remove()
    return write


def inside(write):
    """The same, in a folder of the folder."""
    def done(path):
        (path / "one").mkdir()
        write(path / "one")
    return done


PEFT, HUB = {"peft_type": "LORA", "r": 2}, {"config": {"r": 2}, "name": "a"}
KOHYA = ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "lora_unet_down_blocks_0_attn1_to_q.alpha")
# {name: (what is in the folder, the file that is given or None for the folder, the kind, what the refusal says)}
CASES = {
    "a file of ours": ([ours("a.safetensors")], "a.safetensors", "OURS", None),
    "a file of ours under any name": ([ours("adapter")], "adapter", "OURS", None),
    "PEFT": ([text("adapter_config.json", PEFT), tensors("adapter_model.safetensors", f"base_model.model.{Q}.lora_A.wei"
              "ght")], None, "PEFT", None),
    "PEFT, a pickle": ([text("adapter_config.json", PEFT), raw("adapter_model.bin", b"PK")], None, "PEFT", None),
    "PEFT without a configuration": ([tensors("adapter_model.safetensors", "x")], None, "PEFT", None),
    "PEFT without tensors": ([text("adapter_config.json", PEFT)], None, "PEFT", None),
    "PEFT, damaged": ([text("adapter_config.json", "{"), text("adapter_model.safetensors", "...")], None, "PEFT", None),
    "PEFT with LoHa": ([text("adapter_config.json", {"peft_type": "LOHA"}), tensors(
        "adapter_model.safetensors", f"{Q}.hada_w1_a")], None, "PEFT", None),
    "PEFT, a link to nothing": ([text("adapter_config.json", PEFT), link("adapter_model.safetensors")], None, "PEFT",
                                None),
    "PEFT, a folder for a file": ([text("adapter_config.json", PEFT), lambda path: (
        path / "adapter_model.safetensors").mkdir()], None, "PEFT", None),
    "a configuration that is a link to nothing": ([link("adapter_config.json"), tensors(
        "adapter_model.safetensors", "x")], None, "PEFT", None),
    "PEFT, a pointer": ([text("adapter_config.json", PEFT), text("adapter_model.safetensors", LFS)], None, "PEFT",
                        None),
    "AdapterHub": ([text("adapter_config.json", HUB), tensors("adapter.safetensors", f"{Q}.loras.a.lora_A")], None,
                   "ADAPTERHUB", None),
    "AdapterHub, a pickle": ([text("adapter_config.json", HUB), raw("pytorch_adapter.bin", b"")], None, "ADAPTERHUB",
                             None),
    "AdapterHub without a configuration": ([tensors("adapter.safetensors", "x")], None, "ADAPTERHUB", None),
    "AdapterHub without tensors": ([text("adapter_config.json", HUB)], None, "ADAPTERHUB", None),
    "mlx-lm": ([text("adapter_config.json", {"fine_tune_type": "lora", "lora_parameters": {"scale": 20.0}}),
                tensors("adapters.safetensors", "model.layers.0.self_attn.q_proj.lora_a")], None, "MLX",
               r"lora_A = lora_a\^T .*lora_alpha = scale \* r"),
    "mlx-lm without a configuration": ([tensors("adapters.safetensors", "model.layers.0.mlp.up_proj.lora_a")], None,
                                       "MLX", "an adapter of mlx-lm's"),
    "mlx-lm without tensors": ([text("adapter_config.json", {"fine_tune_type": "lora"})], None, "MLX", "mlx-lm"),
    "mlx-lm, its file": ([tensors("x.safetensors", "model.layers.0.mlp.up_proj.lora_b")], "x.safetensors", "MLX",
                         "mlx-lm"),
    "kohya": ([tensors("x.safetensors", *KOHYA)], "x.safetensors", "KOHYA", "lora_down is PEFT's lora_A"),
    "kohya, its folder": ([tensors("x.safetensors", *KOHYA)], None, "KOHYA", "kohya's sd-scripts"),
    "kohya under PEFT's name": ([text("adapter_config.json", PEFT), tensors("adapter_model.safetensors", *KOHYA)], None,
                                "KOHYA", "kohya"),
    "torchtune": ([text("adapter_config.json", PEFT), tensors("adapter_model.safetensors", "layers.0.attn.output_proj."
                   "lora_a.weight")], None, "TORCHTUNE", "permutes the rows of q and k"),
    "LyCORIS": ([tensors("x.safetensors", "lora_unet_q.hada_w1_a", "lora_unet_q.alpha")], "x.safetensors", "LYCORIS",
                "LyCORIS.*dora_scale"),
    "LyCORIS with DoRA": ([tensors("x.safetensors", "lora_te_q.dora_scale", "lora_te_q.lora_up.weight")], None,
                          "LYCORIS", "LyCORIS"),
    "loralib": ([tensors("x.safetensors", "layers.0.q.lora_A", "layers.0.q.lora_B")], "x.safetensors", "LORALIB",
                "no configuration, and so no alpha"),
    "a model": ([tensors("model.safetensors", "shared.weight"), text("config.json", {})], None, "MODEL",
                r"a whole model.*T5.from_pretrained\(folder\)"),
    "a shard of a model in 4 bits": ([tensors("model-00002-of-00003.safetensors", "encoder.q.weight",
                                              "encoder.q.weight.quant_state.bitsandbytes__nf4")],
                                     "model-00002-of-00003.safetensors", "MODEL", "a whole model"),
    "the file of a model": ([tensors("model.safetensors", "model.embed_tokens.weight")], "model.safetensors", "MODEL",
                            "a whole model"),
    "a model under PEFT's name": ([text("adapter_config.json", PEFT), tensors("adapter_model.safetensors",
                                   "lm_head.weight", f"{Q}.weight")], None, "MODEL", "a whole model"),
    "GGUF": ([raw("x.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0))], "x.gguf", "GGUF", "a GGUF file"),
    "a folder with GGUF": ([raw("x.gguf", b"GGUF" + bytes(20))], None, "GGUF", "a GGUF file"),
    "a pickle by its name": ([raw("x.bin", b"anything")], "x.bin", "PICKLE", "can run code when it is opened"),
    "a pickle by its first bytes": ([raw("x", pickle.dumps({}, 4))], "x", "PICKLE", "safetensors alone"),
    "a folder with a pickle": ([raw("lora.pt", b"")], None, "PICKLE", "can run code"),
    "a pointer": ([text("x.safetensors", LFS)], "x.safetensors", "LFS_POINTER", "git lfs pull"),
    "a part of a folder of PEFT's": ([text("adapter_config.json", PEFT), tensors(
        "adapter_model.safetensors", f"base_model.model.{Q}.lora_A.weight")], "adapter_model.safetensors", "PART",
        "Pass the folder in which it lies"),
    "a part of a folder of AdapterHub's": ([tensors("x.safetensors", f"{Q}.loras.a.lora_A")], "x.safetensors", "PART",
                                           "Pass the folder"),
    "the other part": ([text("adapter_config.json", PEFT)], "adapter_config.json", "PART", "Pass the folder"),
    "nothing": ([], None, "EMPTY", "an empty folder. Expected an adapter file, or a folder with"),
    "something else": ([text("notes.txt", "...")], None, "NO_ADAPTER", "a folder without an adapter. Expected"),
    "folders of folders": ([inside(text("adapter_config.json", PEFT))], None, "NO_ADAPTER", "in folders of it: one. "),
    "a folder with files of ours": ([ours("a"), ours("b")], None, "NO_ADAPTER", "minipeft in it: a, b. Pass one of th"),
    "no file": ([], "nowhere", "MISSING", "nowhere is not there. Nothing is downloaded.*expected the path of"),
    "a checkpoint": ([lambda path: write_tensors(path / "x", {"w": A}, {"format": "minipeft-checkpoint-2"})], "x",
                     "CHECKPOINT", "not an adapter file of minipeft.*'minipeft-checkpoint-2'"),
    "an unknown file": ([text("x", "an adapter, honestly")], "x", "UNKNOWN", "not a safetensors file"),
    "unknown tensors": ([tensors("x.safetensors", "w")], "x.safetensors", "UNKNOWN", "not an adapter file of minipeft"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_path_is_recognized_and_refused_by_name_unless_it_is_read(case, tmp_path):
    made, name, kind, message = CASES[case]
    for write in made:
        write(tmp_path)
    path = tmp_path if name is None else tmp_path / name
    found = recognize(path)
    assert found.name == getattr(recognized, kind).name and recognize(str(path)) == found
    if message is not None:
        with pytest.raises(ValueError if found.exists else FileNotFoundError, match=message) as caught:
            minipeft.load(MODEL, path)
        assert str(path) in str(caught.value) and not MODEL.attachments


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_to_nothing_in_a_folder_is_a_file_that_is_missing(name, tmp_path):
    text("adapter_config.json", PEFT)(tmp_path)
    tensors("adapter_model.safetensors", f"base_model.model.{Q}.lora_A.weight")(tmp_path)
    (tmp_path / name).unlink()
    link(name)(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        minipeft.load(MODEL, tmp_path)


def test_what_is_read_has_a_reader_and_what_is_not_has_a_hint():
    kinds = [value for value in vars(recognized).values() if isinstance(value, recognized.Kind)]
    assert {kind.reader for kind in kinds} == {"minipeft", "peft", "adapterhub", None}
    assert not [kind for kind in kinds if kind.reader and kind.hint]
    assert {kind.name for kind in kinds if not kind.reader and not kind.hint} == {
        recognized.UNKNOWN.name, recognized.CHECKPOINT.name}, "those have errors of their own"


@pytest.mark.parametrize("folder", ["adapters", "zoo"])
def test_all_golden_folders_of_peft_are_folders_of_pefts(folder):
    paths = [path.parent for path in (FIXTURES / folder).glob("**/adapter_config.json")]
    assert len(paths) > 5 and {recognize(path) for path in paths} == {recognized.PEFT}


def test_all_golden_folders_of_adapterhub_are_folders_of_adapterhubs():
    paths = [path.parent for folder in ("bottleneck", "adapterhub") for path in (FIXTURES / folder).glob("*/*.json")]
    assert len(paths) > 8 and {recognize(path) for path in paths} == {recognized.ADAPTERHUB}


def test_no_tensor_is_read(tmp_path, monkeypatch):
    """The bytes of the tensors may be missing: the header says what the file is."""
    ours("a")(tmp_path)
    whole = (tmp_path / "a").read_bytes()
    monkeypatch.setattr(numpy, "fromfile", None)
    assert recognize(tmp_path / "a") == recognized.OURS
    (tmp_path / "a").write_bytes(whole[:-1])
    assert recognize(tmp_path / "a") == recognized.UNKNOWN, "damaged, and its reader says so"
    with pytest.raises(ValueError, match="truncated|gives? "):
        minipeft.load(MODEL, tmp_path / "a")


def test_a_folder_of_many_files_a_fifo_and_odd_names_take_no_time(tmp_path):
    for n in range(150):
        (tmp_path / f"{n:03}").write_text("")
    tensors("last.safetensors", *KOHYA)(tmp_path)
    assert recognize(tmp_path) == recognized.NO_ADAPTER
    os.mkfifo(tmp_path / "fifo")
    assert recognize(tmp_path / "fifo") == recognized.UNKNOWN
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "adapter_config.json")
    os.mkfifo(tmp_path / "d" / "adapter.safetensors")
    assert recognize(tmp_path / "d") == recognized.ADAPTERHUB
    assert recognize("a\0b") == recognized.MISSING and not recognize("x" * 5000).reader


def test_keys_alone_say_what_they_belong_to():
    assert recognized.by_keys([f"base_model.model.{Q}.lora_A.weight"]) is recognized.PEFT
    assert recognized.by_keys(["base_model.model.q.hada_w1_a"]) is recognized.PEFT
    assert recognized.by_keys(["prompt_embeddings"]) is recognized.PEFT
    assert recognized.by_keys(["lycoris_q.lora_A.weight"]) is recognized.LYCORIS
    assert recognized.by_keys(["w", "b"]) is recognized.by_keys([]) is None


@pytest.mark.parametrize("length", [0x280, 0x480, 0x580])
def test_a_safetensors_file_whose_length_begins_like_a_pickle_is_none(length, tmp_path):
    path = tmp_path / "a"
    write_tensors(path, {"x": numpy.zeros(2)}, {"pad": ""}, signed=False)
    short = int.from_bytes(path.read_bytes()[:8], "little")
    write_tensors(path, {"x": numpy.zeros(2)}, {"pad": "x" * (length - short)}, signed=False)
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert recognize(path) is not recognized.PICKLE
