"""A checkpoint with random weights, for systems that only load one: `python -m benchmarks.peers_checkpoint 8b`.

Beside the weights lies a tokenizer of bytes: the smallest that such a system accepts. Nothing here is ever tokenised.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_child import MARK

SPECIAL = ["<pad>", "<s>", "</s>"]  # their ids are benchmarks.gpu_model.PAD, BEGIN, END


def folder(shape: str) -> Path:
    """Where the checkpoint of a shape lies; VENEER_BENCH_MODELS names another parent."""
    default = Path(tempfile.gettempdir()) / "veneer-bench-models"
    return Path(os.environ.get("VENEER_BENCH_MODELS", default)) / shape


def save(shape: str, device: str = "cuda") -> Path:
    """Writes the checkpoint unless it is there, whole or not at all; returns its folder."""
    target = folder(shape)
    if target.is_dir():
        return target
    from benchmarks.gpu_model import fresh

    partial = target.with_name(f"{shape}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    fresh(shape, device).save_pretrained(partial)
    tokenizer().save_pretrained(partial)
    partial.rename(target)
    return target


def tokenizer() -> Any:
    """One token for each byte, and the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, bos_token=begin, eos_token=end)


if __name__ == "__main__":
    print(MARK + json.dumps({"folder": str(save(sys.argv[1]))}))
