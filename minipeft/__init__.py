"""minipeft: a reference implementation of parameter-efficient fine-tuning, from scratch in NumPy.

The public names; each is documented where it is defined.
"""
import importlib
from typing import Any

from minipeft.attaching.attach import attach
from minipeft.attaching.attachment import Attachment
from minipeft.attaching.method import Method, fixed, register, setting, trained
from minipeft.attaching.report import report
from minipeft.attaching.select import select
from minipeft.backend import keep_heap, to_device, to_host, use
from minipeft.deprecated import install
from minipeft.engine import ops
from minipeft.engine.check import check_gradients
from minipeft.engine.stopped import stop_gradient
from minipeft.engine.tensor import Tensor, value_and_grad
from minipeft.engine.xray import xray
from minipeft.formats.load import load
from minipeft.methods.bias import AddedBias
from minipeft.methods.bottleneck import Bottleneck
from minipeft.methods.dora import DoRA
from minipeft.methods.hira import HiRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.loha import LoHa
from minipeft.methods.lokr import LoKr
from minipeft.methods.lora import LoRA
from minipeft.methods.mask import fisher, magnitude, top
from minipeft.methods.neighbors import nearest_tokens
from minipeft.methods.oft import OFT
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.qalora import QALoRA
from minipeft.methods.selective import Selective
from minipeft.methods.union import Union
from minipeft.methods.vera import VeRA
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.t5 import T5, T5Config
from minipeft.models.transformer import Transformer, TransformerConfig
from minipeft.nn.init import normal, ones, uniform, zeros
from minipeft.nn.weight import Fixed, Parameter, Piece, Reparam
from minipeft.nn.where import Where
from minipeft.operations.combine import combine
from minipeft.operations.extract import extract
from minipeft.quant.quantize import quantize
from minipeft.train.best import restore
from minipeft.train.data import Batches, batch_of
from minipeft.train.loop import fit
from minipeft.train.optim import AdamW
from minipeft.train.schedule import constant, cosine_decay, inverse_sqrt, linear_decay

__version__ = "0.2.0"
__all__ = ["AdamW", "AddedBias", "attach", "Attachment", "batch_of", "Batches", "Bottleneck", "check_gradients",
           "combine", "constant", "cosine_decay", "Decoder", "DecoderConfig", "DoRA", "extract", "fisher", "fit",
           "Fixed", "fixed", "HiRA", "IA3", "inverse_sqrt", "keep_heap", "linear_decay", "load", "LoHa", "LoKr",
           "LoRA", "magnitude", "Method", "nearest_tokens", "normal", "OFT", "ones", "ops", "Parameter", "Piece",
           "PrefixTuning", "PromptTuning", "QALoRA", "quantize", "register", "Reparam", "report", "restore", "select",
           "Selective", "setting", "stop_gradient", "T5", "T5Config", "Tensor", "to_device", "to_host", "top", "trace",
           "trained", "Transformer", "TransformerConfig", "uniform", "Union", "use", "value_and_grad", "VeRA", "Where",
           "xray", "zeros"]


def __getattr__(name: str) -> Any:
    # An import of minipeft loads neither laws, conformance kit nor tools; whoever asks for them gets them.
    if name in ("laws", "conformance", "tools", "autograd", "peft"):  # the last two are names of 0.1
        return importlib.import_module(f"minipeft.{name}")
    if name == "trace":
        return importlib.import_module("minipeft.conformance.trace").trace
    raise AttributeError(f"module 'minipeft' has no attribute {name!r}")


install(LoRA, PromptTuning, Selective)
