"""Damaged adapter folders: `Adapter.load` gives a whole adapter or an AdapterError, soon, and stays in the folder.

A few seconds here; `make fuzz` tries many more (`VENEER_FUZZ` is the number of examples).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from veneer.adapter.card import CARD, Adapter, Card
from veneer.adapter.formats import CONFIG
from veneer.adapter.peft_tensors import WEIGHTS
from veneer.errors import AdapterError
from veneer.model.fingerprint import Fingerprint

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs POSIX signals")

SECONDS, BYTES = 10, 2**30
Files = dict[str, Any]  # name -> bytes, or a function that makes something else under that name
_touched: list[str] | None = None
_PATHS = {"open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate", "shutil.rmtree"}
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class"}


def _audit(name: str, given: tuple[Any, ...]) -> None:
    is_path = name in _PATHS and not isinstance(given[0], int)  # else a file that is open already
    if _touched is not None and (is_path or name in _NEVER):
        _touched.append(name if name in _NEVER else os.path.abspath(os.fsdecode(given[0])))


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails for what takes too long, takes too much memory, or touches anything outside the folder."""
    global _touched
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {SECONDS} s"))
    signal.alarm(SECONDS)
    _touched = touched = []
    try:
        yield
    finally:
        _touched = None
        signal.alarm(0)
    outside = [path for path in touched if not path.startswith(os.path.realpath(folder))]
    assert not outside
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BYTES, f"{grown} bytes more"


@pytest.fixture(scope="module")
def good() -> list[Files]:
    """Good folders: ours with a card, ours without, and one as PEFT writes it, with patterns and a bfloat16 tensor."""
    ranks = {"layers.0.q": 2, "layers.1.q": 3}
    tensors = {f"{m}.a": torch.randn(r, 4) for m, r in ranks.items()}
    tensors |= {f"{m}.b": torch.randn(5, r) for m, r in ranks.items()}
    settings = {"r": 2, "target_modules": ["q"]}
    card = Card("lora", settings, dict.fromkeys(ranks, 2.0), ranks, Fingerprint("1" * 64), "base", training={"x": [1]})
    with tempfile.TemporaryDirectory() as folder:
        path = Adapter(tensors, card).save(Path(folder) / "a")
        Adapter.load(path)  # whatever is imported on the way is imported now
        ours = {name: (path / name).read_bytes() for name in (CARD, CONFIG, WEIGHTS)}
    config = json.loads(ours[CONFIG]) | {"lora_alpha": 8, "rank_pattern": {r"layers\.1\..*": 3}, "alpha_pattern": {}}
    theirs = {CONFIG: json.dumps(config).encode(), WEIGHTS: ours[WEIGHTS]}
    return [ours, {CONFIG: ours[CONFIG], WEIGHTS: ours[WEIGHTS]}, theirs]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


TEXTS = ["", "8", "../../etc", "\x00", "\n  - all is well\x1b[31m", "é", "\ud800", "(a+)+b", "(", "(?i)q", "x" * 5000]
NUMBERS = [0, -1, 1, 2, 2**31, 2**63, 10**400, 0.0, -0.0, 5e-324, 1e38, 1e308, float("nan"), float("inf")]
KEYS = ["r", "lora_alpha", "rank_pattern", "use_dora", "lora_dropout", "new", "identity", "format", "dtype", "shape"]
odd = st.recursive(
    st.sampled_from([None, True, False, *NUMBERS, *TEXTS, [], {}, nested(70), nested(900)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS + TEXTS), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def change_json(draw: Callable, value: Any) -> bytes:
    """The JSON text of an object with one thing put in, replaced or taken out; now and then a key stands twice."""
    *path, last = draw(st.sampled_from([(draw(st.sampled_from(KEYS + TEXTS)),), *places(value)]))
    inner = value
    for key in path:
        inner = inner[key]
    if draw(st.booleans()) or last not in (inner if isinstance(inner, dict) else range(len(inner))):
        inner[last] = draw(odd)
    else:
        del inner[last]
    text = json.dumps(value)
    return (text[:-1] + ", " + text[1:] if draw(st.integers(0, 15)) == 0 else text).encode()


def change_bytes(draw: Callable, raw: bytes) -> bytes:
    at = draw(st.integers(0, len(raw)))
    length = draw(st.sampled_from([0, 1, 4, 8, len(raw)]))
    return raw[:at] + draw(st.binary(max_size=9) | st.just(raw)) + raw[at + length :]


def change_values(draw: Callable, raw: bytes) -> bytes:
    """Other numbers in the last bytes of the weights."""
    number = draw(st.sampled_from([float("nan"), float("inf"), 3e38, 1e38, -1e38, 1e-45, 1e-40, -0.0]))
    at = len(raw) - 4 * draw(st.integers(1, 8))
    return raw[:at] + torch.tensor([number]).numpy().tobytes() + raw[at + 4 :] if at > 0 else raw


def change_header(draw: Callable, raw: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    try:
        header = change_json(draw, json.loads(raw[8 : 8 + length]))
    except (ValueError, IndexError):  # broken before
        return change_bytes(draw, raw)
    told = draw(st.sampled_from([len(header)] * 6 + [0, 2**62, 2**64 - 1, len(header) + 1]))
    return told.to_bytes(8, "little") + header + raw[8 + length :]


def change_text(draw: Callable, raw: bytes) -> bytes:
    try:
        return change_json(draw, json.loads(raw))
    except (ValueError, IndexError):
        return change_bytes(draw, raw)


KINDS: list[Callable[[Path], object]] = [
    lambda path: None,
    lambda path: path.mkdir(),
    os.mkfifo,
    lambda path: path.symlink_to("/etc/passwd"),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to(CONFIG),
    lambda path: path.touch() or os.truncate(path, 5 * 2**30),
]


@st.composite
def damaged(draw: Callable, whole: Files) -> Files:
    files = dict(whole)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(files)))
        if not isinstance(files[name], bytes) or draw(st.integers(0, 9)) == 0:
            files[name] = draw(st.sampled_from(KINDS))
            continue
        changes = [change_bytes, change_values, change_header] if name == WEIGHTS else [change_bytes, change_text]
        files[name] = draw(st.sampled_from(changes))(draw, files[name])
    return files


def check_message(text: str) -> None:
    """Short, and nothing of the files could pass for a line of ours or move a terminal's cursor."""
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)
    assert len(text) < 50_000


@given(st.data())
def test_fuzz_a_damaged_folder_is_an_adapter_or_an_adapter_error(good, data):
    files = data.draw(st.sampled_from(good).flatmap(damaged))
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "adapter"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content) if isinstance(content, bytes) else content(folder / name)
        before = sorted(os.listdir(holder) + os.listdir(folder))
        started = time.monotonic()
        try:
            with watched(folder):
                adapter = Adapter.load(folder)
        except AdapterError as error:
            event("refused")
            check_message(str(error))
        else:
            event("loaded")
            again = Adapter.load(adapter.save(Path(holder) / "again"))
            assert again.identity == adapter.identity and again.card == adapter.card
            before.append("again")
        assert sorted(os.listdir(holder) + os.listdir(folder)) == sorted(before)
        assert time.monotonic() - started < SECONDS
