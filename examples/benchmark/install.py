"""From an empty virtual environment to the first finished LoRA step, and how much is installed then.

Two environments are made, one after the other: this library from its folder, and torch, transformers and peft. Each is
timed from `pip install` to the end of a fresh process that makes a model of the size d64, attaches a LoRA to its
queries and values, and makes one step. pip's cache is off, so everything is fetched. The installed size counts the
files that came into the environment, with those that Python compiled at the first step.
"""
from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).parents[2]
PEERS = {"torch": "torch", "transformers": "transformers<5", "peft": "peft"}

OURS = """
import numpy, minipeft
rng = numpy.random.default_rng(0)
model = minipeft.T5(minipeft.T5Config(vocab_size=128, d_model=64, d_kv=16, num_heads=4, d_ff=256, num_layers=2,
                                      num_decoder_layers=2), rng)
lora = minipeft.attach(model, minipeft.LoRA(rank=8, alpha=16), rng)
ids = rng.integers(2, 128, (32, 32))
loss, gradients = minipeft.value_and_grad(lambda: model.loss(ids, ids, rng=rng), lora.parameters)
minipeft.AdamW(lr=1e-5).step(lora.parameters, gradients)
"""
TORCH = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration
model = T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=64, d_kv=16, num_heads=4, d_ff=256, num_layers=2,
                                            num_decoder_layers=2, decoder_start_token_id=0))
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"])).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
ids = torch.randint(2, 128, (32, 32))
model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
optimizer.step()
"""


def pinned(name: str) -> str:
    """The version that is installed here, so that the same one is measured; else the one that setup.cfg asks for."""
    try:
        return f"{name}=={importlib.metadata.version(name).split('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return PEERS[name]


def measured(say: Callable[[str], None]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """({how, sides: {name: seconds, bytes, ...}}, failures). say: gets a line about the current stage."""
    sides: dict[str, Any] = {}
    failures = []
    for name, program in (("ours", OURS), ("torch + peft", TORCH)):
        say(f"{name}: pip install, and a first step")
        with tempfile.TemporaryDirectory(prefix="minipeft-install-") as folder:
            wanted = [pinned(n) for n in PEERS] if program is TORCH else [str(sources(Path(folder) / "minipeft"))]
            try:
                sides[name] = _first_step(Path(folder) / "venv", wanted, program)
            except subprocess.CalledProcessError as error:
                failures.append({"side": name, "doing": "installation", "what": f"exit status {error.returncode}",
                                 "stderr": (error.stderr or "").splitlines()[-12:]})
    return {"how": "pip --no-cache-dir, from the indexes that pip has here", "sides": sides}, failures


def sources(folder: Path) -> Path:
    """A copy of the sources, because building a package leaves files beside them."""
    shutil.copytree(ROOT / "minipeft", folder / "minipeft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def _first_step(folder: Path, wanted: list[str], program: str) -> dict[str, Any]:
    venv.create(folder, with_pip=True)
    python = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    empty = size_of(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> float:
        begun = time.perf_counter()
        subprocess.run([python, *arguments], check=True, capture_output=True, text=True, env=environment, cwd=folder)
        return time.perf_counter() - begun

    install = run("-m", "pip", "install", "--no-cache-dir", "--no-input", *wanted)
    step = run("-c", program)
    again = run("-c", program)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True,
                            check=True, env=environment).stdout.split()
    return {"install_seconds": install, "step_seconds": step, "step_again_seconds": again,
            "seconds": install + step, "bytes": size_of(folder) - empty, "packages": listed}


def size_of(folder: Path) -> int:
    """Bytes of all files in the folder and below. Links are not followed."""
    return sum(entry.lstat().st_size for entry in folder.rglob("*") if entry.is_file() and not entry.is_symlink())
