"""torch, transformers and peft in the benchmark, as their users run them. The interface is that of ours.py."""
from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from peft import LoraConfig, get_peft_model
from peft import __version__ as peft_version
from transformers import T5ForConditionalGeneration
from transformers import __version__ as transformers_version

from sizes import ALPHA, MODELS, RANK, RATE, TARGETS, Size


class Torch:
    """As `Ours`. AdamW is the fused one, which is torch's fastest. The cache is off in training. Quantized bases are
    those of bitsandbytes."""

    def __init__(self, backend: str):
        self.device = "cuda" if backend == "cupy" else "cpu"
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        yield

    def load(self, folder: Path, size: Size, kinds: tuple[str, ...] = MODELS) -> None:
        self.models: dict[str, Any] = {}
        self.optimizers: dict[str, Any] = {}
        torch.manual_seed(0)
        for kind in kinds:
            model = self._quantized(folder) if kind == "qlora" else T5ForConditionalGeneration.from_pretrained(folder)
            model = model.to(self.device)
            if kind in ("lora", "qlora"):
                model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
            self.models[kind] = model
            if kind == "base":
                continue
            model.train()
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizers[kind] = torch.optim.AdamW(trained, lr=RATE, fused=True)
        self.batch = {name: torch.from_numpy(ids).to(self.device) for name, ids in size.ids().items()}

    def _quantized(self, folder: Path) -> Any:
        """All linear weights but the head in NF4 with double quantization, computing in float32.

        By default transformers does not quantize `wo`, the second weight of T5's feed-forward layers. It casts hidden
        states to the dtype of that weight, and the codes are stored as uint8. Here `wo` is quantized as the others
        are, and codes are stored under a floating-point dtype."""
        from transformers import BitsAndBytesConfig

        class Whole(T5ForConditionalGeneration):
            _keep_in_fp32_modules = None

        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32)
        return Whole.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)

    def weight_bytes(self, kind: str) -> int:
        """Bytes of parameters and, where a weight is quantized, of its scales."""
        parameters = list(self.models[kind].parameters())
        scales = [tensor for p in parameters if (state := getattr(p, "quant_state", None))
                  for tensor in state.as_dict(packed=True).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *scales))

    def forward_backward(self, kind: str) -> float:
        self.optimizers[kind].zero_grad(set_to_none=True)
        loss = self.models[kind](**self.batch, use_cache=False).loss
        loss.backward()
        return loss.item()

    def update(self, kind: str) -> None:
        self.optimizers[kind].step()

    def tiny(self, kind: str) -> None:
        batch = {name: ids[:1, :2] for name, ids in self.batch.items()}
        self.models[kind](**batch, use_cache=False).loss.backward()
        self.optimizers[kind].zero_grad(set_to_none=True)

    def generate(self, new: int) -> list[list[int]]:
        with torch.inference_mode():
            answers = self.models["base"].generate(self.batch["input_ids"], max_new_tokens=new, do_sample=False,
                                                   num_beams=1, use_cache=True)
        return answers[:, 1:].tolist()

    def matmul(self, n: int) -> Callable[[], Any]:
        a, b = torch.rand(n, n, device=self.device), torch.rand(n, n, device=self.device)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    def chain(self, length: int) -> Callable[[], Any]:
        p = torch.ones(1, device=self.device, requires_grad=True)

        def run() -> None:
            y = p
            for _ in range(length):
                y = y + p
            y.backward()
            p.grad = None

        return run

    def flops(self, kind: str) -> int | None:
        """None: the FLOPs of a step are counted in our library."""
        return None

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_reserved() if self.device == "cuda" else None

    def reset_device_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def about(self) -> dict[str, Any]:
        found = {"torch": torch.__version__, "transformers": transformers_version, "peft": peft_version,
                 **bitsandbytes_version(),
                 "BLAS": torch_blas(), "threads": torch.get_num_threads()}
        if self.device == "cuda":
            found["GPU"] = torch.cuda.get_device_name()
        return found


def bitsandbytes_version() -> dict[str, str]:
    """{"bitsandbytes": its version}, or {} where it is not installed."""
    try:
        return {"bitsandbytes": importlib.metadata.version("bitsandbytes")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def torch_blas() -> str:
    """The BLAS that torch was built with, and its version where torch tells."""
    text = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", text)
    version = re.search(r"Math Kernel Library Version (\S+?)-", text)
    simd = re.search(r"CPU capability usage: (\S+)", text)
    parts = [name.group(1) if name else "unknown", version.group(1) if version else "",
             f"({simd.group(1)})" if simd else ""]
    return " ".join(part for part in parts if part)
