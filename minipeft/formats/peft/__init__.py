"""Adapters of Hugging Face's PEFT: their directories, read and written.

    attachment = minipeft.load(model, "lora-folder")             or minipeft.formats.peft.load(model, "lora-folder")
    minipeft.formats.peft.save(attachment, "folder")             adapter_config.json and adapter_model.safetensors
    minipeft.formats.peft.to_peft(attachment, arrays)            {key: array}: values or gradients under PEFT's keys
"""
from minipeft.formats.peft import ia3, lora, oft, prefix, products, prompts, selective, vera  # noqa: F401
from minipeft.formats.peft.files import load, save, to_peft  # noqa: F401
