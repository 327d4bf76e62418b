"""Bad adapter folders, one case a fault: each is refused with a message that names it, or is read as what it means.

`pytest tests -k hostile` lists them. What each part does with such files is tested beside that part; this is the list.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.adapter import files
from veneer.adapter.attach import attach, detach
from veneer.adapter.card import CARD, Adapter, Card
from veneer.adapter.faults import LONGEST
from veneer.adapter.formats import CONFIG
from veneer.adapter.peft_tensors import WEIGHTS
from veneer.errors import AdapterError, ConfigError, WrongBaseError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
A, B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")
Edit = Callable[[Path], object]


@pytest.fixture
def folder(pico, adapter_for, tmp_path) -> Path:
    """A good folder as PEFT writes it: no card, r 8, alpha 16."""
    made = adapter_for(pico(), {Q: 8, V: 8}).save(tmp_path / "adapter")
    (made / CARD).unlink()
    config = json.loads((made / CONFIG).read_text())
    (made / CONFIG).write_text(json.dumps(config | {"lora_alpha": 16, "target_modules": [Q, V]}))
    return made


def config(**changes: Any) -> Edit:
    """Other settings; a value may be given as the JSON text itself, in bytes."""

    def edit(folder: Path) -> None:
        whole = json.loads((folder / CONFIG).read_text()) | changes
        parts = [f"{json.dumps(k)}: {v.decode() if isinstance(v, bytes) else json.dumps(v)}" for k, v in whole.items()]
        (folder / CONFIG).write_text("{" + ", ".join(parts) + "}")

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / WEIGHTS)

    return edit


def raw(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Edit:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(entries: dict[str, Any] | str, body: bytes = bytes(64)) -> Edit:
    text = entries if isinstance(entries, str) else json.dumps(entries)
    return raw(lambda _: struct.pack("<Q", len(text)) + text.encode() + body)


def entry(*offsets: int, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def replaced(make: Callable[[Path], object], name: str = WEIGHTS) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def filled(value: float) -> Edit:
    return tensors(lambda t: t[A].fill_(value))


def renamed(change: Callable[[str], str]) -> Edit:
    return tensors(lambda t: [t.update({change(key): t.pop(key)}) for key in list(t)])


def outside(folder: Path) -> Path:
    """A good weights file that is not in the folder."""
    target = folder.parent / "secret.safetensors"
    target.write_bytes((folder / WEIGHTS).read_bytes())
    return target


def linked_out(folder: Path) -> None:
    target = outside(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(target)


def sparse(size: int, keep: bool) -> Edit:
    def edit(folder: Path) -> None:
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size if keep else 0)
        os.truncate(folder / WEIGHTS, size)

    return edit


@contextmanager
def unverified() -> Iterator[None]:
    """A folder without a card does not know its base, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Canary:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


LIST_BOMB = b"[" + b"[]," * 6_000_000 + b"[]]"
MANY_KEYS = json.dumps({f"key{i}": 1 for i in range(200_000)}).encode()[1:-1]
PICKLE = pickle.dumps(Canary())
posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX files")

# fault -> (what makes it, words of the message)
REFUSED: dict[str, tuple[Edit, list[str]]] = {
    # 1 missing
    "no config": (lambda f: (f / CONFIG).unlink(), [f"{CONFIG}: missing"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [f"{WEIGHTS}: missing"]),
    # 2 broken files
    "empty weights": (raw(lambda _: b""), ["broken or truncated (0 bytes"]),
    "truncated header": (raw(lambda w: w[:40]), ["broken or truncated", "the header says"]),
    "truncated data": (raw(lambda w: w[:-4]), ["broken or truncated", "its header tells of"]),
    "trailing bytes": (raw(lambda w: w + b"more"), ["broken or truncated", "its header tells of"]),
    "header length 2^62": (raw(lambda w: struct.pack("<Q", 2**62) + w[8:]), ["broken or truncated", str(2**62)]),
    "header length 0": (raw(lambda w: bytes(8) + w[8:]), ["(header): not JSON"]),
    "overlapping offsets": (header({"a": entry(0, 16), "b": entry(8, 24)}, bytes(32)), ["broken or truncated"]),
    "offsets beyond the end": (header({"a": entry(0, 2**40)}, bytes(16)), ["broken or truncated"]),
    "offsets that do not fit the shape": (header({"a": entry(0, 8)}, bytes(16)), ["broken or truncated"]),
    "negative shape": (header({"a": entry(0, 16, shape=(-2, -2))}), ["without dtype, shape and data_offsets", "'a'"]),
    "shape that overflows": (header({"a": entry(0, 0, shape=(2**62, 2**62))}), ["broken or truncated"]),
    "an entry that is no object": (header({"a": [1]}), ["without dtype, shape and data_offsets", "'a'"]),
    "bad UTF-8 in the header": (raw(lambda _: struct.pack("<Q", 4) + b'{"\xff"'), ["UTF"]),
    "repeated tensor": (header('{"x": {"dtype": "F32"}, "x": {}}'), ["repeated keys: 'x'"]),
    "repeated config key": (raw(lambda c: c[:-1] + b', "r": 8}', CONFIG), [CONFIG, "repeated keys: 'r'"]),
    "bad UTF-8 in the config": (raw(lambda c: c.replace(b"LORA", b"L\xff"), CONFIG), [CONFIG, "utf-8"]),
    "NaN in the config": (config(lora_alpha=b"NaN"), [CONFIG, "NaN is not a number"]),
    "truncated config": (raw(lambda c: c[:-9], CONFIG), [CONFIG, "not JSON"]),
    # 3 pickles
    "pickle .bin": (replaced(lambda p: p.with_name("adapter_model.bin").write_bytes(PICKLE)), ["can run any code"]),
    "pickle under the right name": (raw(lambda _: PICKLE), ["a pickle under another name"]),
    # 4 what is no file of the folder
    "folder as weights": (replaced(Path.mkdir), [f"{WEIGHTS}: not a regular file"]),
    "pipe as weights": (replaced(os.mkfifo), [f"{WEIGHTS}: not a regular file"]),
    "pipe as config": (replaced(os.mkfifo, CONFIG), [f"{CONFIG}: not a regular file"]),
    "device as weights": (replaced(lambda p: p.symlink_to("/dev/zero")), ["a link out of the folder", "/dev/zero"]),
    "link out of the folder": (linked_out, ["a link out of the folder", "secret.safetensors", "copy the file"]),
    "link up out of the folder": (replaced(lambda p: p.symlink_to("../../x")), ["a link out of the folder"]),
    "link to itself": (replaced(lambda p: p.symlink_to(p)), [f"{WEIGHTS}: cannot be opened"]),
    "link to nothing": (replaced(lambda p: p.symlink_to("nothing")), [f"{WEIGHTS}: missing"]),
    # 6 values, ranks, scales, shapes, types
    "NaN value": (filled(float("nan")), ["NaN or infinite values", A]),
    "infinite value": (filled(float("inf")), ["NaN or infinite values", A]),
    "overflow once folded": (tensors(lambda t: t[B].fill_(3e38)), ["overflow once the scale is folded in", Q]),
    "overflow of the update": (filled(1e38), ["can overflow float32", Q]),
    "vanishing once folded": (config(lora_alpha=1e-300), ["values vanish once the scale is folded in", Q]),
    "alpha NaN as text": (config(lora_alpha="NaN"), ["lora_alpha: got 'NaN'"]),
    "alpha infinite": (config(lora_alpha=b"1e999"), ["lora_alpha: got inf"]),
    "alpha 0": (config(lora_alpha=0), ["lora_alpha: got 0"]),
    "alpha 1e308": (config(lora_alpha=1e308), ["lora_alpha: got 1e+308"]),
    "alpha of 400 digits": (config(lora_alpha=10**400), ["lora_alpha: got 1000"]),
    "alpha true": (config(lora_alpha=True), ["lora_alpha: got True"]),
    "r 0": (config(r=0), ["r: got 0, wanted a whole number"]),
    "r -1": (config(r=-1), ["r: got -1"]),
    "r 2^31": (config(r=2**31), ["config 2147483648, tensors 8"]),
    "r true": (config(r=True), ["r: got True"]),
    "r as text": (config(r="8"), ["r: got '8'"]),
    "r 8.0": (config(r=8.0), ["r: got 8.0"]),
    "r missing": (config(r=None), ["r: got None"]),
    "r is not that of A": (config(r=4), ["the rank is not that of the tensors", "config 4, tensors 8"]),
    "A without B": (tensors(lambda t: t.pop(B)), ["lora_A without lora_B", Q]),
    "B without A": (tensors(lambda t: t.pop(A)), ["lora_B without lora_A", Q]),
    "transposed": (tensors(lambda t: t.update({A: t[A].T, B: t[B].T})), ["the rank is not that", "tensors 32"]),
    "A transposed": (tensors(lambda t: t.update({A: t[A].T})), ["do not chain", "A [32, 8], B [32, 8]"]),
    "integers": (tensors(lambda t: t.update({A: t[A].to(torch.int8)})), ["types of numbers", "I8"]),
    "truth values": (tensors(lambda t: t.update({A: t[A] > 0})), ["types of numbers", "BOOL"]),
    "complex": (tensors(lambda t: t.update({A: t[A].to(torch.complex64)})), ["types of numbers", "C64"]),
    "float8": (tensors(lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})), ["types of numbers", "F8_E4M3"]),
    "0-dim": (tensors(lambda t: t.update({A: torch.tensor(1.0)})), ["do not chain", "A []"]),
    "three sides": (tensors(lambda t: t.update({A: t[A][None]})), ["do not chain", "A [1, 8, 32]"]),
    "2^40 wide and empty": (header({A: entry(0, 0, shape=(0, 2**40))}, b""), ["empty tensors", str(2**40)]),
    "no tensors": (tensors(dict.clear), ["no tensors"]),
    # 7 keys
    "extra key": (tensors(lambda t: t.update(extra=torch.ones(1))), ["keys that are not understood", "'extra'"]),
    "no prefix": (renamed(lambda k: k.removeprefix("base_model.model.")), ["no 'base_model.model.' before it"]),
    "adapter's name in the key": (renamed(lambda k: k.replace(".weight", ".default.weight")), [".default.weight'"]),
    "key in capitals": (renamed(lambda k: k.replace("lora_", "LORA_")), ["letters of another case"]),
    # 8 patterns: what matches quickly is read as what it means, see below
    "regex too costly": (
        config(rank_pattern={"(?:" * 9 + "m?" + "){900}" * 9: 8}),
        ["rank_pattern", "could take too long to match"],
    ),
    "regex that is none": (config(alpha_pattern={"(": 2}), ["alpha_pattern", "'('"]),
    "regex with flags": (config(alpha_pattern={"(?i)Q": 2}), ["alpha_pattern", "flags are not accepted"]),
    "pattern of 1 MB": (config(alpha_pattern={"q.*" * 350_000: 2}), ["alpha_pattern", "1050000 characters"]),
    "patterns that are a list": (config(rank_pattern=[1]), ["rank_pattern: got [1], wanted an object"]),
    # 10 and 11 what is more than LoRA
    "unknown kind": (config(peft_type="LOHA2"), ["peft_type: got 'LOHA2'"]),
    "no kind": (config(peft_type=None), ["peft_type: missing"]),
    "DoRA without magnitudes": (config(use_dora=True), ["use_dora: got True, but", "has no lora_magnitude_vector"]),
    "bias": (config(bias="lora_only"), ["bias: got 'lora_only'"]),
    "lora_bias": (config(lora_bias=True), ["lora_bias"]),
    "modules_to_save": (config(modules_to_save=["lm_head"]), ["modules_to_save"]),
    "layer_replication": (config(layer_replication=[[0, 2]]), ["layer_replication"]),
    "aLoRA": (config(alora_invocation_tokens=[1, 2]), ["alora_invocation_tokens"]),
    "PiSSA not converted": (config(init_lora_weights="pissa"), ["init_lora_weights: got 'pissa'"]),
    "future setting": (config(use_future=True), ["'use_future': not a known setting of LoRA"]),
    "200,000 future settings": (
        raw(lambda c: c[:-1] + b", " + MANY_KEYS + b"}", CONFIG),
        ["'key0'", "199992 more such settings"],
    ),
    # 12 bombs
    "5 GB of nothing": (sparse(5 * 2**30, keep=False), ["(header): not JSON"]),
    "5 GB behind the tensors": (sparse(5 * 2**30, keep=True), ["broken or truncated (5368709120 bytes"]),
    "config of 65 MB": (raw(lambda c: c + b" " * (65 * 2**20), CONFIG), [CONFIG, "at most 67108864 are read"]),
    "config of 6 million lists": (config(new=LIST_BOMB), [CONFIG, "more than 5000000 values"]),
    "config 100,000 deep": (config(new=b"[" * 100_000 + b"]" * 100_000), [CONFIG, "not JSON"]),
    "config 100 deep": (config(new=b"[" * 100 + b"]" * 100), [CONFIG, "nested more than"]),
    "card of 65 MB": (lambda f: (f / CARD).write_bytes(b"{}" + b" " * (65 * 2**20)), [CARD, "at most 67108864"]),
    "card of 6 million lists": (lambda f: (f / CARD).write_bytes(b'{"a":' + LIST_BOMB + b"}"), ["5000000 values"]),
    "card 100 deep": (
        lambda f: (f / CARD).write_bytes(b'{"training":' + b"[" * 100 + b"]" * 100 + b"}"),
        [CARD, "nested more than"],
    ),
    "header 100 deep": (header('{"x":' + "[" * 100 + "]" * 100 + "}"), ["nested more than"]),
    # 14 names that reach a log or a path
    "module of look-alike letters": (renamed(lambda k: k.replace("model.l", "mоdel.l")), ["keys that are not unders"]),
    "module of 4 KB": (renamed(lambda k: k.replace("layers", "l" * 4096)), ["keys that are not understood"]),
    "module with ..": (renamed(lambda k: k.replace("layers", "..")), ["keys that are not understood"]),
    "module with /": (renamed(lambda k: k.replace("layers", "a/b")), ["keys that are not understood", "a/b"]),
    "module with %2e": (renamed(lambda k: k.replace("layers", "%2e%2e")), ["keys that are not understood", "%2e"]),
    "module with NUL": (renamed(lambda k: k.replace("layers", "a\0b")), ["keys that are not understood", r"a\x00b"]),
    "module with a line end": (renamed(lambda k: k.replace("layers", "a\nb")), [r"a\nb"]),
    "setting with a line end": (config(**{"a\nveneer: all is well": 1}), [r"'a\nveneer: all is well'"]),
    "value with terminal codes": (config(bias="\x1b[2Jnone"), [r"\x1b[2J"]),
    "writer's version with a line end": (
        lambda f: (f / CARD).write_text(json.dumps({"format": 9, "veneer_version": "1\nall is well"})),
        [r"1\nall is well"],
    ),
}  # fmt: skip


@contextmanager
def memory_below(limit: int | None) -> Iterator[None]:
    """Measured where it matters: it makes everything slow."""
    if limit:
        tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= (limit or 0)


@posix
@pytest.mark.parametrize("fault", REFUSED)
def test_refused(folder, fault, monkeypatch):
    make, words = REFUSED[fault]
    monkeypatch.chdir(folder.parent)
    make(folder)
    started = time.process_time()
    with pytest.raises(AdapterError) as caught, memory_below(2**28 if "B " in fault or "million" in fault else None):
        Adapter.load(folder)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert all(line.isprintable() for line in text.splitlines()) and len(text) < 5_000
    assert text.splitlines()[0].endswith("cannot be loaded:") and text.endswith("Nothing was loaded.")
    assert time.process_time() - started < 10
    assert not Path("ran").exists()


# What looks odd and is no fault: read as what it means.


@pytest.mark.parametrize(
    "where", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
)
@pytest.mark.parametrize("bomb", ["(a+)+b", "(.*)*x", "(?:(?:(?:^){65535}){65535}){65535}"])
def test_a_regex_bomb_is_matched_at_once(folder, pico, where, bomb):
    before = Adapter.load(folder).identity
    config(**{where: {bomb: 3} if "pattern" in where and "layers" not in where else bomb})(folder)
    started = time.process_time()
    adapter = Adapter.load(folder)
    with unverified():
        attach(pico(), adapter)
    assert adapter.identity == before and time.process_time() - started < 5


ODD: dict[str, Edit] = {
    "hard link": lambda f: os.link(outside(f), f / "other") or os.replace(f / "other", f / WEIGHTS),
    "link inside the folder": lambda f: (f / WEIGHTS).rename(f / "w") and (f / WEIGHTS).symlink_to("w"),
    "denormal value": tensors(lambda t: t[A].__setitem__((0, 0), 1e-40)),
    "one value of 1e30": tensors(lambda t: t[A].__setitem__((0, 0), 1e30)),
    "float64": tensors(lambda t: t.update({A: t[A].double()})),
    "future setting that is off": config(use_future=False, other_future=None, more_future={}),
    "auto_mapping": config(auto_mapping={"base_model_class": "os", "parent_library": "os"}),
}


@posix
@pytest.mark.parametrize("case", ODD)
def test_loaded_as_it_is(folder, tmp_path, case):
    ODD[case](folder)
    adapter = Adapter.load(folder)
    assert adapter.modules() == [Q, V] and adapter.card.scales == {Q: 2.0, V: 2.0}
    assert Adapter.load(adapter.save(tmp_path / "again")).identity == adapter.identity


@pytest.mark.parametrize("length", [0x280, 0x480, 0x580, 0x4B50])
def test_a_header_whose_length_looks_like_the_mark_of_a_pickle(folder, length):
    before = Adapter.load(folder).identity
    whole = (folder / WEIGHTS).read_bytes()
    old = int.from_bytes(whole[:8], "little")
    assert old <= length
    padded = whole[8 : 8 + old] + b" " * (length - old)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + padded + whole[8 + old :])
    assert Adapter.load(folder).identity == before


@posix
def test_a_snapshot_of_the_hub_is_made_of_links_to_its_blobs(folder, tmp_path):
    repository = tmp_path / "models--someone--something"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "1234").mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(repository / "blobs" / name)
        (repository / "snapshots" / "1234" / name).symlink_to(f"../../blobs/{name}")
    assert Adapter.load(repository / "snapshots" / "1234").modules() == [Q, V]


@posix
def test_saving_over_links_writes_beside_them_not_through(folder, adapter_for, pico):
    target = outside(folder)
    before = target.read_bytes()
    (folder / WEIGHTS).unlink()
    os.link(target, folder / WEIGHTS)
    (folder / CARD).symlink_to(folder.parent / "card")
    other = adapter_for(pico(), {Q: 4})
    other.save(folder)
    assert Adapter.load(folder).identity == other.identity
    assert target.read_bytes() == before and not (folder.parent / "card").exists()


def test_10_000_tiny_tensors(tmp_path, folder):
    modules = [f"model.layers.{n}.p" for n in range(5_000)]
    found = {f"base_model.model.{m}.lora_A.weight": torch.ones(1, 1) for m in modules}
    found |= {f"base_model.model.{m}.lora_B.weight": torch.ones(1, 1) for m in modules}
    save_file(found, folder / WEIGHTS)
    config(r=1, lora_alpha=2, rank_pattern=dict.fromkeys(modules, 1), alpha_pattern={f"^{m}": 2 for m in modules})(
        folder
    )
    started = time.process_time()
    adapter = Adapter.load(folder)
    assert len(adapter.modules()) == 5_000 and set(adapter.card.scales.values()) == {2.0}
    assert Adapter.load(adapter.save(tmp_path / "again")).identity == adapter.identity
    assert time.process_time() - started < 15


@posix
def test_a_file_that_is_swapped_while_it_is_read(folder, monkeypatch):
    """The name means another file as soon as the first is open: what was opened is what is loaded."""
    before, fstat = Adapter.load(folder).identity, os.fstat

    def swapping(handle: int) -> os.stat_result:
        for name in (CONFIG, WEIGHTS):
            if os.path.samestat(fstat(handle), os.stat(folder / name)):
                (folder / name).unlink()
                (folder / name).write_bytes(b"other")
        return fstat(handle)

    monkeypatch.setattr(files.os, "fstat", swapping)
    assert Adapter.load(folder).identity == before
    assert (folder / WEIGHTS).read_bytes() == b"other"


def test_a_file_that_grows_while_it_is_read(folder, monkeypatch):
    fstat = os.fstat

    def growing(handle: int) -> os.stat_result:
        status = fstat(handle)
        with open(folder / CONFIG, "ab") as file:
            file.write(b"more")
        return status

    whole = (folder / CONFIG).read_bytes()
    monkeypatch.setattr(files.os, "fstat", growing)
    assert files.read_whole(folder / CONFIG, 2**20) == whole


# 13 the disk


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
def test_one_flipped_bit_under_a_card_is_never_another_adapter(pico, adapter_for, tmp_path, name):
    adapter = adapter_for(pico(), {Q: 2})
    folder = adapter.save(tmp_path / "adapter")
    whole = (folder / name).read_bytes()
    for bit in range(0, 8 * len(whole), max(1, 8 * len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(damaged)
        with suppress(AdapterError):
            assert Adapter.load(folder).identity == adapter.identity


# 7 and 9 the base


BASES: dict[str, tuple[dict[str, Any], Edit, list[str]]] = {
    "fewer layers": ({"layers": 1}, config(), [f"linear layers that the model lacks: {V}"]),
    "more layers": (
        {"layers": 3}, config(target_modules=["q_proj"]), ["has no factors for", "layers.2.self_attn.q_proj"],
    ),
    "another width": ({"hidden": 48}, config(), ["another shape", "adapter [32, 32], model [48, 48]"]),
    "a prefix that the model lacks": (
        {}, renamed(lambda k: k.replace("model.model.", "model.model.language_model.")),
        ["linear layers that the model lacks", f"the model calls language_model.model.layers.0.self_attn.q_proj {Q}"],
    ),
    "without the prefix that the model has": (
        {}, renamed(lambda k: k.replace("model.model.", "model.")), [f"the model calls layers.0.self_attn.q_proj {Q}"],
    ),
    "names in capitals": ({}, renamed(lambda k: k.replace("q_proj", "Q_Proj")), [f"Q_Proj {Q}"]),
    "zero modules": ({}, renamed(lambda k: k.replace("layers", "blocks")), ["model lacks", "blocks.0", "blocks.1"]),
    "half of the modules": ({}, renamed(lambda k: k.replace("layers.1", "layers.9")), ["model.layers.9.self_attn"]),
    "a module that is no linear layer": (
        {}, renamed(lambda k: k.replace("self_attn.q_proj", "input_layernorm")), ["model lacks", "input_layernorm"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BASES)
def test_put_on_a_wrong_base(folder, pico, case):
    size, edit, words = BASES[case]
    edit(folder)
    model = pico(**size)
    keys = list(model.state_dict())
    with unverified(), pytest.raises(WrongBaseError) as caught:
        attach(model, Adapter.load(folder))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(model.state_dict()) == keys  # nothing was put on


def of_head(rows: int) -> Adapter:
    tensors = {"lm_head.a": torch.ones(2, 32) / 8, "lm_head.b": torch.ones(rows, 2).cumsum(0) / 8}
    return Adapter(tensors, Card("lora", {}, {"lm_head": 1.0}, {"lm_head": 2}))


def test_a_resized_vocabulary(pico):
    model = pico()
    model.resize_token_embeddings(128)
    with unverified(), pytest.raises(WrongBaseError, match=r"adapter \[96, 32\], model \[128, 32\]"):
        attach(model, of_head(96))


def test_tied_embeddings_stay_as_they_are(pico):
    """An adapted head of a model whose embedding is the same tensor: the head speaks, the embedding is not touched."""
    model = pico(tie_word_embeddings=True)
    ids_BT = torch.arange(8)[None]
    embedded, before = model.model.embed_tokens(ids_BT), model(ids_BT).logits
    with unverified():
        attach(model, of_head(96))
    assert not torch.allclose(model(ids_BT).logits, before)
    assert torch.equal(model.model.embed_tokens(ids_BT), embedded)
    detach(model)
    assert torch.equal(model(ids_BT).logits, before)


# 14 names of adapters and of folders

NAMES = [
    "",
    "a.b",
    "..",
    "a/b",
    "a\\b",
    "%2e%2e",
    "a\0b",
    "a\nveneer: all is well",
    "a b",
    "x" * 65,
    "аdapter",
    "ｎame",
    "é",
]
NAMES += ["base", "Base", "CON", "nul", "com1", "LPT9", "keys", "__class__", "forward"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_for_an_adapter_that_is_refused(pico, adapter_for, name):
    with pytest.raises(ConfigError, match="an adapter's name is 1 to 64 of the letters") as caught:
        attach(pico(), adapter_for(pico(), {Q: 2}), name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a\0b", "a\nveneer: all is well", "no/such/folder", "%2e%2e", ""], ids=ascii
)
def test_a_folder_name_that_cannot_be(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError) as caught:
        Adapter.load(path)
    assert str(caught.value).isprintable() or path == ""


def test_the_longest_module_name(tmp_path):
    def load(length: int) -> Adapter:
        name = "m" * length
        tensors = {f"{name}.a": torch.ones(1, 2), f"{name}.b": torch.ones(2, 1)}
        return Adapter(tensors, Card("lora", {}, {name: 1.0}, {name: 1}))

    assert load(LONGEST).modules()
    with pytest.raises(AdapterError, match="names"):
        load(LONGEST + 1)


@pytest.mark.parametrize("options", [[1], {"system_prompt": 3}, {"system_prompt": ["x"]}], ids=str)
def test_a_card_whose_system_prompt_is_none(pico, adapter_for, tmp_path, options):
    _refused_options(pico, adapter_for, tmp_path, options)


@pytest.mark.parametrize("length", ["1024", 0, -1, True, 1.5], ids=str)
def test_a_card_whose_longest_row_is_no_number_of_tokens(pico, adapter_for, tmp_path, length):
    _refused_options(pico, adapter_for, tmp_path, {"max_length": length})


def _refused_options(pico, adapter_for, tmp_path, options):
    folder = adapter_for(pico(), {Q: 2}).save(tmp_path / "adapter")
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"training": {"options": options}}))
    with pytest.raises(AdapterError, match=r"training\.options: .*wanted"):
        Adapter.load(folder)
