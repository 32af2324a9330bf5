"""This library in the benchmark: what each measurement runs. The clock is in worker.py."""
from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy

import minipeft
from sizes import ALPHA, BASE, MODELS, QLORA, RANK, RATE, Size
from minipeft.backend import to_device, xp
from minipeft.engine.ops import add


class Ours:
    """From one folder: a model with a LoRA, one that is trained in full, LoRAs on quantized bases, each with its AdamW,
    and one left alone."""

    def __init__(self, backend: str):
        self.backend = backend

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The context in which all other methods are called."""
        with minipeft.use(self.backend):
            yield

    def load(self, folder: Path, size: Size, kinds: tuple[str, ...] = MODELS) -> None:
        self.models: dict[str, Any] = {kind: minipeft.T5.from_pretrained(folder) for kind in kinds}
        self.params: dict[str, Any] = {}
        for kind, model in self.models.items():
            if kind in QLORA:
                name, options = BASE
                minipeft.quantize(model, name, keep=QLORA[kind], **options)
            if kind == "lora" or kind in QLORA:
                self.params[kind] = minipeft.attach(
                    model, minipeft.LoRA(rank=RANK, alpha=ALPHA), numpy.random.default_rng(0)).parameters
            elif kind == "full":
                self.params[kind] = minipeft.select(model, ".*")
            model.to(self.backend)
        self.optimizers = {kind: minipeft.AdamW(lr=RATE) for kind in self.params}
        self.batch, self.rng = size.ids(), numpy.random.default_rng(0)
        self.gradients: dict[str, Any] = {}

    def forward_backward(self, kind: str) -> float:
        """The loss; the gradients are kept for `update`."""
        model = self.models[kind]
        loss, self.gradients = minipeft.value_and_grad(
            lambda: model.loss(**self.batch, rng=self.rng), self.params[kind])
        return loss

    def update(self, kind: str) -> None:
        self.optimizers[kind].step(self.params[kind], self.gradients)
        self.gradients = {}

    def tiny(self, kind: str) -> None:
        """A forward and backward pass over one row of two tokens, which sets up whatever the first pass sets up."""
        model = self.models[kind]
        batch = {name: ids[:1, :2] for name, ids in self.batch.items()}
        minipeft.value_and_grad(lambda: model.loss(**batch, rng=self.rng), self.params[kind])

    def generate(self, new: int) -> list[list[int]]:
        """The base model's answers, without the start token."""
        return self.models["base"].generate(self.batch["input_ids"], max_new_tokens=new)[:, 1:].tolist()

    def matmul(self, n: int) -> Callable[[], Any]:
        """A function that multiplies float32 matrices [n, n] into an existing array."""
        a, b = (to_device(numpy.random.default_rng(i).random((n, n), numpy.float32)) for i in (0, 1))
        out = xp.empty_like(a)
        return lambda: xp.matmul(a, b, out=out)

    def chain(self, length: int) -> Callable[[], Any]:
        """A function that computes y = p + p + ... + p of a single number, and dy/dp."""
        p = minipeft.Parameter(to_device(numpy.ones(1, numpy.float32)))

        def step() -> Any:
            y = p
            for _ in range(length):
                y = add(y, p)
            return y

        return lambda: minipeft.value_and_grad(step, {"p": p})

    def flops(self, kind: str) -> int:
        """FLOPs of a step's forward and backward pass, counted op by op in a step."""
        model = self.models[kind]
        seen = minipeft.xray(lambda: model.loss(**self.batch, rng=self.rng), self.params[kind])
        return seen.forward_flops + seen.backward_flops

    def weight_bytes(self, kind: str) -> int:
        """Bytes of the weights of a model: of its own arrays, of what a LoRA adds, and of weights that are kept
        dequantized."""
        model = self.models[kind]
        arrays = {id(p): p for p in (*model.base_arrays.values(), *self.params.get(kind, {}).values())}
        kept = sum(slot.base.dense().data.nbytes for slot in model.slots.values() if getattr(slot.base, "keep", False))
        return kept + sum(p.data.nbytes for p in arrays.values())

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.backend == "cupy":
            xp.cuda.get_current_stream().synchronize()

    def device_bytes(self) -> int | None:
        """Bytes that the device's pool holds, or None on the host."""
        return xp.get_default_memory_pool().total_bytes() if self.backend == "cupy" else None

    def reset_device_peak(self) -> None:
        """Give back free memory. From here on the pool only grows, so its size at the end is the peak."""
        xp.get_default_memory_pool().free_all_blocks()

    def about(self) -> dict[str, Any]:
        """The versions of the library and of its BLAS."""
        found = {"minipeft": minipeft.__version__, "NumPy": numpy.__version__, "BLAS": blas()}
        if self.backend == "cupy":
            found["CuPy"] = xp.__version__
            found["GPU"] = xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
        return found


def blas() -> str:
    """Name and version of NumPy's BLAS and, where OpenBLAS tells, its kernels and threads."""
    built = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    text = f"{built.get('name', 'unknown')} {built.get('version', '')}".strip()
    try:
        maps = Path("/proc/self/maps").read_text()
        library = ctypes.CDLL(next(line.split()[-1] for line in maps.splitlines() if "openblas" in line))
    except (OSError, StopIteration):
        return text
    for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
        core = getattr(library, f"{prefix}openblas_get_corename{suffix}", None)
        threads = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
        if core and threads:
            core.restype = ctypes.c_char_p
            return f"{text}, {core().decode()} kernels, {threads()} threads"
    return text
