"""Adapters of AdapterHub's library `adapters` for T5: their directories, read and written.

    attachment = minipeft.load(model, "folder")                  or minipeft.formats.adapterhub.load(model, "folder")
    minipeft.formats.adapterhub.save(attachment, "folder")       adapter_config.json and adapter.safetensors
    minipeft.formats.adapterhub.to_adapterhub(attachment, arrays)    {key: array} under AdapterHub's keys

Read and written are bottleneck adapters, LoRA, DoRA with alpha = r, (IA)^3 before the activation, prefix tuning with
as_adapterhub=True, and unions of these. AdapterHub loads such a folder with
`model.load_adapter("folder", use_safetensors=True)`.
"""
from minipeft.formats.adapterhub.files import load, save, to_adapterhub  # noqa: F401
