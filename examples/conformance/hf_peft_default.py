"""Hugging Face PEFT as it is by default: on a base in half precision the adapters are float32.

    pip install peft==0.21.2 torch
    python -m minipeft.conformance --impl examples.conformance.hf_peft_default
"""
import functools
import importlib

hf_peft = importlib.import_module(__name__.replace("hf_peft_default", "hf_peft"))

capabilities = {**hf_peft.capabilities, "name": "huggingface/peft, as by default"}
lora_linear = functools.partial(hf_peft.lora_linear, autocast=True)
lora_embedding = functools.partial(hf_peft.lora_embedding, autocast=True)
