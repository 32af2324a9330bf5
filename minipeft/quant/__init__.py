"""Quantized weights: codes in place of numbers. `quantize.py` puts them into a model, `weight.py` is the weight, and
`scheme.py` is the contract of a way to quantize."""
from minipeft.quant import affine as _affine, ggml as _ggml  # noqa: F401  (so that their kinds are known)
from minipeft.quant.fourbit import FourBit  # noqa: F401
from minipeft.quant.quantize_4bit import Quantized4Bit, quantize_4bit  # noqa: F401
from minipeft.quant.quantize import Quantized, quantize  # noqa: F401
from minipeft.quant.scheme import Scheme, scheme  # noqa: F401
from minipeft.quant.weight import QuantizedWeight  # noqa: F401
