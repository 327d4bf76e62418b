"""Damaged option files: settings or a ConfigError, soon. `make fuzz` tries many more."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from veneer.config import RunConfig
from veneer.config.files import read_yaml
from veneer.errors import ConfigError

GOOD = """base_model: smollm2
dataset: [a.jsonl, b.jsonl]
r: 8
learning_rate: 1e-4
rank_pattern: {q_proj: 4}
target_modules: all-linear
"""
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)
PIECES = [
    "r: ",
    "- ",
    "? ",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "<<: *a",
    "!!python/object/apply:os.system [x]",
    "|\n",
    ">",
]
PIECES += [
    "!!binary",
    "!!set",
    "!!timestamp ",
    "2001-99-99",
    "0o9",
    "1:99:99",
    "1e999",
    ".nan",
    "-.inf",
    "9" * 5000,
    "\t",
]
PIECES += [
    "%YAML 9.9\n",
    "---\n",
    "...\n",
    "'",
    '"',
    "\\x",
    "\x85",
    "\ufeff",
    "é",
    "\n",
    "  ",
    "#",
    "[" * 300,
    "null",
    "~",
    "=",
]
KEYS = [
    "base_model",
    "dataset",
    "r",
    "lora_alpha",
    "scale",
    "rank_pattern",
    "target_modules",
    "max_steps",
    "seed",
    "new",
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
lines = st.builds("{}: {}\n".format, st.sampled_from(KEYS), values | st.sampled_from(PIECES))
texts = st.one_of(
    st.lists(lines, max_size=4).map("".join),
    st.lists(st.sampled_from(PIECES + GOOD.splitlines(keepends=True)) | st.text(max_size=5), max_size=12).map("".join),
    st.builds(lambda at, piece: GOOD[:at] + piece + GOOD[at:], st.integers(0, len(GOOD)), st.sampled_from(PIECES)),
)


@example(LAUGHS.encode())
@example(b"? [a]\n: 1\n")
@example(b"[" * 5000)
@given(texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40))
def test_fuzz_an_options_file_is_settings_or_a_config_error(content):
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_bytes(content)
        try:
            settings = RunConfig.from_flat(read_yaml(file))
        except ConfigError as error:
            text = str(error)
        else:
            assert RunConfig.from_flat(settings.to_flat()) == settings
            text = ""
    assert len(text) < 50_000
    assert time.process_time() - started < 10
