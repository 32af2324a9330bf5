"""Damaged and hostile files: a program. `python tests/attacks/damaged_files.py [--seconds 20] [--seed 0]`

Again and again it makes valid files of a target, damages one of them, and loads the result in a child process. What
has to hold, whatever the damage:

    the load ends within 10 s and takes less than 500 MB;
    it gives what was saved, or raises ValueError or OSError with less than 1,000 characters that name the path;
    files are not changed, and nothing is changed in memory by a load that raises.

Something else than what was saved is loaded only from files that were forged: changed in a consistent way, and signed
again where they carry a digest. At the end a table says how often each damage was done and what came of it; the exit
status is 1 if anything failed. The i-th damage depends on the seed and on i alone: `--only I` repeats one.
"""
from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy  # noqa: E402

import minipeft  # noqa: E402
from minipeft.files import DIGEST, read_tensors, write_tensors  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that the program runs from any folder
from tests.attacks import trained  # noqa: E402

SECONDS, MEGABYTES, CHARACTERS = 10, 500, 1000


@dataclasses.dataclass(frozen=True)
class Target:
    """Files that are loaded. make: valid ones, in an empty folder. ready: what they are loaded into (None for nothing),
    made anew for each try. load: (folder, ready) -> a fingerprint of what was loaded. state: a fingerprint of `ready`,
    which a load that raises must leave as it was. signed: whether the files carry digests of their contents. writes:
    whether a load that succeeds goes on and writes files."""

    name: str
    make: Callable[[Path], None]
    load: Callable[[Path, Any], str]
    ready: Callable[[], Any] = lambda: None
    state: Callable[[Any], str] = lambda ready: ""
    signed: bool = True
    writes: bool = False


def sha256_of(arrays: Any, *more: Any) -> str:
    """Of {name: array} and what JSON can hold."""
    digest = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for name in sorted(arrays):
        array = numpy.asarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- the targets

T5_CONFIG = minipeft.T5Config(23, 12, 5, 3, 20, 1, 2, 8, 20, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
CONFIG = minipeft.TransformerConfig(23, 12, 3, 20, 2, 1, positions="learned", max_length=9, final_norm=True)


FIXTURES = Path(__file__).parents[1] / "fixtures"


def t5() -> minipeft.T5:
    return minipeft.T5(T5_CONFIG, numpy.random.default_rng(1), "float32")


def transformer() -> minipeft.Transformer:
    return minipeft.Transformer(CONFIG, numpy.random.default_rng(1), "float32")


def model_sha(model: Any) -> str:
    return sha256_of(model.state(), model.config.resolved())


def make_foreign(folder: Path) -> None:
    """As transformers writes it: no digest anywhere."""
    t5().save_pretrained(folder)
    tensors, _ = read_tensors(folder / "model.safetensors")
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}, signed=False)


def make_shards(folder: Path) -> None:
    make_foreign(folder)
    tensors, _ = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        name, part = f"model-0000{i + 1}-of-00003.safetensors", dict(list(tensors.items())[i::3])
        write_tensors(folder / name, part, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_four_bits(folder: Path) -> None:
    """As transformers writes it with bitsandbytes."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FIXTURES / "bitsandbytes" / "nf4_double" / name, folder / name)


def make_quantized(folder: Path) -> None:
    model = minipeft.T5(dataclasses.replace(T5_CONFIG, d_model=32, d_kv=8), numpy.random.default_rng(1))
    for kind, where in (("int4", r"\.q\."), ("q4_1", r"\.k\."), ("fp4", r"\.v\.")):
        minipeft.quantize(model, kind, where)
    model.save_pretrained(folder)


def load_t5(folder: Path, _: Any) -> str:
    model = minipeft.T5.from_pretrained(folder)
    schemes = {name: repr(getattr(slot.base, "scheme", "")) for name, slot in model.slots.items()}
    return sha256_of(model.state(), model.config.resolved(), schemes)


def load_transformer(folder: Path, _: Any) -> str:
    return model_sha(minipeft.Transformer.from_pretrained(folder))


FOREIGN = ("adapters/lora_rank_alpha_pattern", "adapters/dora", "adapters/lora_modules_to_save",
           "adapters/prompt_tuning", "adapters/lora_token_rows", "zoo/shira_t5", "zoo/vera_t5", "bottleneck/seq_bn")


def copy_of(folder: str) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        for path in sorted((FIXTURES / folder).iterdir()):
            if path.name != "golden.npz":
                shutil.copyfile(path, target / path.name)
    return make


def base_of(folder: str) -> Callable[[], minipeft.T5]:
    def ready() -> minipeft.T5:
        with numpy.load(FIXTURES / folder / "golden.npz") as golden:
            return minipeft.T5.from_pretrained(FIXTURES / str(golden["base"]))
    return ready


def load_foreign(folder: Path, model: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sha256_of(minipeft.load(model, folder, name="a").tensors)


def foreign_state(model: Any) -> str:
    return sha256_of({**model.state(), **{name: p.data for name, p in minipeft.select(model, ".").items()}},
                     list(model.attachments), list(model.plugged))


TARGETS = [
    Target("T5 folder", lambda folder: t5().save_pretrained(folder), load_t5),
    Target("Transformer folder", lambda folder: transformer().save_pretrained(folder), load_transformer),
    Target("T5 folder of transformers", make_foreign, load_t5, signed=False),
    Target("T5 folder in shards", make_shards, load_t5, signed=False),
    Target("T5 folder in four bits", make_four_bits, load_t5, signed=False),
    Target("T5 folder with codes", make_quantized, load_t5),
    *(Target(name, trained.save(name), trained.load(name), trained.bare, trained.seen) for name in trained.METHODS),
    Target("LoRA and PromptTuning", trained.save("LoRA", "PromptTuning"), trained.load("LoRA", "PromptTuning"),
           trained.bare, trained.seen),
    *(Target(folder.replace("/", " "), copy_of(folder), load_foreign, base_of(folder), foreign_state, signed=False)
      for folder in FOREIGN),
    Target("checkpoint", trained.make_checkpoint, trained.resume, list, lambda ready: repr([r for r in ready if
           r == "changed"]), writes=True),
]


# --------------------------------------------------------------------------------------------------------- the damages

Rng = numpy.random.Generator
WILD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 10 ** 6, 10 ** 8, 10 ** 9, 2 ** 31 - 1, 2 ** 31, 2 ** 53, 2 ** 62,
    2 ** 63, 2 ** 64, 10 ** 400, -10 ** 400, "@digits@", 0.5, 1.5, -0.0, 1e-320, 1e308, -1e308, "@nan@", "@inf@",
    "@1e999@", "", "x", "relu", "gelu", "gated-gelu",
    "F64", "BF16", "BOOL", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "." * 300,
    "x" * 5000, "\u202e\x1b[2J", [], [0], [1, 1], [0, 2 ** 40], [-1, 5], [2 ** 62, 4], [12] * 40, [12.0, 3], ["1"], {},
    {"a": 1}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "@deep@", "@deepest@", "@many@"]
RAW = {"@digits@": "9" * 5000, "@nan@": "NaN", "@inf@": "-Infinity", "@1e999@": "1e999",
       "@deep@": "[" * 900 + "]" * 900, "@deepest@": '{"a":' * 50_000 + "1" + "}" * 50_000,
       "@many@": "[" + "[[]]," * 100_000 + "0]"}


def dumped(value: Any) -> bytes:
    """JSON, with what `RAW` stands for."""
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def wild(rng: Rng) -> Any:
    return WILD[rng.integers(len(WILD))]


def spoiled(value: Any, rng: Rng) -> Any:
    """A JSON object with a few values, keys or entries that are something else."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.integers(1, 4)):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.7:
                at = at[key]
                continue
            what = rng.integers(6) if isinstance(at, dict) else 0
            if what == 1:
                del at[key]
            elif what == 2:
                at[("k" * 5000, "\ud800", "", "a\0", "__metadata__", f"{key}x")[rng.integers(6)]] = at.pop(key)
            elif what == 3:
                at["more" * int(rng.integers(1, 3000))] = wild(rng)
            elif what == 4 and isinstance(at[key], int):
                at[key] = at[key] + int(rng.integers(-2, 3))
            elif what == 5:
                other = keys[rng.integers(len(keys))]
                at[key], at[other] = at[other], at[key]
            else:
                at[key] = wild(rng)
            break
    return value


def split(raw: bytes) -> tuple[dict, bytes]:
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + n]), raw[8 + n:]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def regular(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def any_file(folder: Path, rng: Rng) -> Path:
    files = regular(folder)
    return files[rng.integers(len(files))]


def one(folder: Path, rng: Rng, ending: str) -> Path:
    files = [path for path in regular(folder) if path.name.endswith(ending)]
    return files[rng.integers(len(files))] if files else any_file(folder, rng)


def cut(folder: Path, rng: Rng) -> None:
    path = any_file(folder, rng)
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def flip(folder: Path, rng: Rng) -> None:
    path = any_file(folder, rng)
    raw = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 9)):
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)


def flip_header(folder: Path, rng: Rng) -> None:
    path = one(folder, rng, ".safetensors")
    raw = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(len(raw), 8 + int.from_bytes(raw[:8], "little"))))
        raw[at] = int(rng.choice(list(b'0123456789"{}[],:- eE.FUIBO_\0\xff')))
    path.write_bytes(raw)


def overwrite(folder: Path, rng: Rng) -> None:
    path = any_file(folder, rng)
    raw = bytearray(path.read_bytes())
    a, b = sorted(rng.integers(0, len(raw) + 1, 2))
    raw[a:b] = rng.bytes(b - a) if rng.random() < 0.5 else bytes(b - a)
    path.write_bytes(raw)


def lengthen(folder: Path, rng: Rng) -> None:
    path = any_file(folder, rng)
    if rng.random() < 0.5:
        path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 100))))
    else:
        os.truncate(path, 2 ** int(rng.integers(20, 41)))  # sparse: takes no room on the disk


def claim(folder: Path, rng: Rng) -> None:
    """Another length of the header."""
    path = one(folder, rng, ".safetensors")
    raw = path.read_bytes()
    path.write_bytes(int(2 ** rng.uniform(0, 64) - 1).to_bytes(8, "little") + raw[8:])


def big_header(folder: Path, rng: Rng) -> None:
    """Eight MiB of what takes much memory or time when it is parsed, or a hundred of anything."""
    path = one(folder, rng, ".safetensors")
    size = 2 ** 23
    text = (b"[" + b"[[[[]]]]," * (size // 9 - 1) + b"0]", b"[" + b'{"":[]},' * (size // 8 - 1) + b"0]",
            b"{" + b",".join(b'"%x":{}' % i for i in range(size // 12)) + b"}", b" " * size,
            b"{}" + b" " * 100_000_000)[rng.integers(5)]
    path.write_bytes(joined(text, split(path.read_bytes())[1]))


def forge_header(folder: Path, rng: Rng) -> None:
    """A header with wild values; the digest, where there is one, is made to fit if the file can be read at all."""
    path = one(folder, rng, ".safetensors")
    header, data = split(path.read_bytes())
    header.get("__metadata__", {}).pop(DIGEST, None)
    path.write_bytes(joined(dumped(spoiled(header, rng)), data))
    try:
        tensors, metadata = read_tensors(path)
        write_tensors(path, tensors, metadata)
    except (ValueError, OSError, MemoryError):
        pass


def forge_numbers(folder: Path, rng: Rng) -> None:
    """Tensors with another dtype or shape, other names, NaN and infinities, signed again."""
    path = one(folder, rng, ".safetensors")
    tensors, metadata = read_tensors(path)
    for _ in range(rng.integers(1, 4)):
        name = list(tensors)[rng.integers(len(tensors))]
        x, what = tensors[name], rng.integers(7)
        if what == 0:
            tensors[name] = x.astype(("float64", "int64", "bool", "uint8", "int16")[rng.integers(5)])
        elif what == 1:
            tensors[name] = x.reshape(-1) if x.ndim > 1 else x.reshape(1, -1)
        elif what == 2 and x.size and x.dtype.kind == "f":
            x.reshape(-1)[rng.integers(x.size)] = (numpy.nan, numpy.inf, -numpy.inf, 3e38)[rng.integers(4)]
        elif what == 3:
            tensors[(f"{name}x", name.replace("0", "9"), "k" * 5000)[rng.integers(3)]] = tensors.pop(name)
        elif what == 4:
            del tensors[name]
        elif what == 5:
            tensors["more"] = numpy.zeros((0, 2 ** 40)) if rng.random() < 0.5 else numpy.ones(3)
        elif x.ndim:
            tensors[name] = numpy.concatenate([x, x])
        if not tensors:
            break
    write_tensors(path, tensors, metadata)


def forge_json(folder: Path, rng: Rng) -> None:
    path = one(folder, rng, ".json")
    if path.suffix == ".json":
        path.write_bytes(dumped(spoiled(json.loads(path.read_bytes()), rng)))


def spoil_json(folder: Path, rng: Rng) -> None:
    """What is hardly JSON any more."""
    path = one(folder, rng, ".json")
    if path.suffix != ".json":
        return
    raw = path.read_bytes().rstrip()
    path.write_bytes((b"\xef\xbb\xbf" + raw, raw.replace(b'"', b"'"), raw[:-1] + b', "d_model": 5}', b"[" + raw + b"]",
                      raw + raw, raw.replace(b"e", b"\xff", 1), raw.decode().encode("utf-16"), b"[" * 10 ** 6, b"null",
                      raw[:-1] + b', "x": ' + b"[" * 900 + b"]" * 900 + b"}", raw + b" " * 2 ** 24,
                      raw[:-1] + b', "x": "' + b"y" * 2 ** 22 + b'"}')[rng.integers(12)])


def special(folder: Path, rng: Rng) -> None:
    """No regular file where one is wanted."""
    path = any_file(folder, rng)
    what, name = rng.integers(8), path.name
    path.unlink()
    if what == 0:
        os.mkfifo(path)
    elif what == 1:
        path.mkdir()
    elif what == 2:
        path.symlink_to(name)
    elif what == 3:
        path.symlink_to(("/dev/zero", "/dev/tty", "/dev/stdin", "/proc/self/mem", "/dev/null")[rng.integers(5)])
    elif what == 4:
        path.symlink_to("nowhere")
    elif what == 5:
        os.mkfifo(folder / "fifo")
        path.symlink_to("fifo")
    elif what == 6:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))


def mixed_up(folder: Path, rng: Rng) -> None:
    """One file in the place of another."""
    a, b = any_file(folder, rng), any_file(folder, rng)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def linked(folder: Path, rng: Rng) -> None:
    """A symbolic link to the very file, as caches have them: no damage at all."""
    path = any_file(folder, rng)
    path.rename(folder / "blob")
    path.symlink_to("blob")


def forge_texts(folder: Path, rng: Rng) -> None:
    trained.forge_texts(folder, rng, spoiled, dumped)


def nothing(folder: Path, rng: Rng) -> None:
    """The valid files."""


# damage: what it may lead to. "noticed": what was saved is loaded, or nothing. "forged": whatever is consistent.
# "none": what was saved is loaded. Files without digests cannot notice a changed bit of their data.
DAMAGES: dict[Callable[[Path, Rng], None], str] = {
    nothing: "none", linked: "none", cut: "noticed", flip: "noticed", overwrite: "noticed", lengthen: "noticed",
    claim: "noticed", special: "noticed", mixed_up: "noticed", big_header: "noticed", spoil_json: "noticed",
    flip_header: "forged", forge_header: "forged", forge_numbers: "forged", forge_json: "forged",
    forge_texts: "forged"}


# --------------------------------------------------------------------------------------------------------- one attempt

def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder: what it is, and its bytes (of a large one, its size)."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        small = stat.S_ISREG(info.st_mode) and info.st_size < 2 ** 25
        found[str(path.relative_to(folder))] = (info.st_mode, path.read_bytes() if small else info.st_size)
    return found


def child(target: Target, folder: Path, out: int) -> None:
    """Loads, and writes a line of JSON about it to the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready = target.ready()
    before = target.state(ready)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * os.sysconf("SC_PAGE_SIZE") + MEGABYTES * 2 ** 20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    said: dict[str, Any] = {}
    try:
        said["loaded"] = target.load(folder, ready)
    except BaseException as error:
        kind, message = type(error), str(error)
        said["error"] = f"{kind.__name__}: {message[:300]}"
        if not isinstance(error, (ValueError, OSError)):
            said["failure"] = f"raises {kind.__name__}"
        elif len(message) >= CHARACTERS:
            said["failure"] = f"a message of {len(message)} characters"
        elif str(folder) not in message:
            said["failure"] = "the message does not name the path"
        elif target.state(ready) != before:
            said["failure"] = "something was changed, and then it raised"
    said["seconds"] = time.perf_counter() - begun
    said["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    os.write(out, json.dumps(said).encode())


def attempt(target: Target, folder: Path) -> dict[str, Any]:
    """What a load of `folder` in a child process says; "failure" is there if a promise was broken."""
    before = contents(folder)
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(into)
            child(target, folder, out)
        finally:
            os._exit(0)
    os.close(out)
    deadline, status = time.monotonic() + SECONDS, None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
        if status is None:
            time.sleep(0.001)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(into, "rb") as pipe:
        raw = pipe.read()
    said: dict[str, Any] = json.loads(raw) if raw else {}
    if status is None:
        said["failure"] = f"not done after {SECONDS} s"
    elif not raw:
        said["failure"] = f"the process died: status {status}"
    elif said["megabytes"] > MEGABYTES:
        said["failure"] = f"{said['megabytes']:.0f} MB"
    elif contents(folder) != before and not (target.writes and "loaded" in said):
        said["failure"] = "files were changed"
    return said


def judged(said: dict[str, Any], saved: str, may: str, signed: bool) -> str:
    """"equal", "refused", "forged", or what is wrong."""
    if "failure" in said:
        return f"FAILED: {said['failure']}"
    if "error" in said:
        return "refused" if may != "none" else "FAILED: valid files are refused"
    if said["loaded"] == saved:
        return "equal"
    if may == "none" or may == "noticed" and signed:
        return "FAILED: something else than what was saved was loaded"
    return "forged"


def main(targets: list[Target], arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Loads damaged files.")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, help="so many attempts, however long they take")
    parser.add_argument("--only", type=int, help="repeat the attempt of this number")
    options = parser.parse_args(arguments)
    table: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    worst, end = {"seconds": 0.0, "megabytes": 0.0}, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as where:
        top, valid = Path(where), {}
        for target in targets:
            (top / target.name).mkdir()
            target.make(top / target.name)
            said = attempt(target, top / target.name)
            if "loaded" not in said:
                raise SystemExit(f"{target.name}: valid files are refused: {said}")
            valid[target.name] = said["loaded"]
        i = options.only or 0
        while i < options.tries if options.tries else time.monotonic() < end:
            rng = numpy.random.default_rng([options.seed, i])
            target = targets[i % len(targets)]
            damage = list(DAMAGES)[rng.integers(len(DAMAGES))]
            folder = top / f"try {i}"
            shutil.copytree(top / target.name, folder)
            with numpy.errstate(all="ignore"):
                damage(folder, rng)
            said = attempt(target, folder)
            outcome = judged(said, valid[target.name], DAMAGES[damage], target.signed)
            table[target.name, damage.__name__][outcome.partition(":")[0]] += 1
            worst = {key: max(value, said.get(key, 0.0)) for key, value in worst.items()}
            if outcome.startswith("FAILED"):
                print(f"--seed {options.seed} --only {i}: {target.name}, {damage.__name__}: {outcome}; "
                      f"{said.get('error', '')}", flush=True)
            if options.only is not None:
                print(said, outcome, sep="\n")
                break
            shutil.rmtree(folder)
            i += 1
    print(f"{'target':28}{'damage':16}{'equal':>8}{'refused':>9}{'forged':>8}{'FAILED':>8}")
    for (name, damage_name), counts in sorted(table.items()):
        print(f"{name:28}{damage_name:16}" + "".join(f"{counts[kind]:{width}}" for kind, width in
                                                     (("equal", 8), ("refused", 9), ("forged", 8), ("FAILED", 8))))
    tries, failed = sum(sum(c.values()) for c in table.values()), sum(c["FAILED"] for c in table.values())
    print(f"{tries} damaged loads, {failed} failed; the slowest took {worst['seconds']:.2f} s, the largest "
          f"{worst['megabytes']:.0f} MB (seed {options.seed})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(TARGETS))
