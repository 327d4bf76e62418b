"""`veneer VERB ...`: the table of verbs, and what every verb has in common: exit codes and errors.

Exit codes: 0 success, 1 a bug of veneer (with its traceback), 2 bad input (one message), 130 interrupted.
Nothing heavy is imported here; a verb's module is imported when the verb runs.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from veneer.cli.output import notes_told, results, results_only, say, write_anything
from veneer.errors import ConfigError, VeneerError, nearest

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("veneer.cli.demo:run", "the whole life of one adapter on smollm2, in minutes on two cores"),
    "train": ("veneer.cli.train:run", "data + base -> adapter folder, metrics, report"),
    "eval": ("veneer.cli.eval:run", "base and adapters on a data file, with intervals"),
    "generate": ("veneer.cli.generate:run", "text from the base or an adapter"),
    "chat": ("veneer.cli.chat:run", "talk to the base and its adapters, switching live"),
    "data": ("veneer.cli.data:run", "data preview: what the model will see of a data file"),
    "merge": ("veneer.cli.merge:run", "adapters -> one adapter, or into the base -> a model; with an error report"),
    "convert": (
        "veneer.cli.convert:run",
        "any adapter -> plain PEFT LoRA, compressed; or the adapter of a tuned model",
    ),
    "inspect": ("veneer.cli.inspect:run", "adapters measured, alone and beside each other; would a server load them"),
    "push": ("veneer.cli.push:run", "an adapter with its model card -> the Hugging Face Hub"),
}
"""Verb -> (module:function that takes the words after the verb, one line of help)."""

_SURROUNDINGS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    # pydantic looks for plugins in every installed package: a tenth of a second that no verb has a use for.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    _tell_nobody()
    write_anything()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "help":
        words = [*words[1:2], "--help"]
    if not words:
        say(overview())
        return 2
    if words[0] in ("--help", "-h"):
        return _printed(overview())
    if words[0] == "--version":
        return _printed(_version())
    if words[0] not in VERBS:
        return _unknown_verb(words[0])
    _wait_politely()
    with results_only(), notes_told():
        return _run(words[0], words[1:])


def _tell_nobody() -> None:
    """Nothing goes over the network but what is asked for: a base by its hub id, an upload.

    Left alone, the Hub's client sends telemetry along, and transformers has a service of the Hub convert models that
    are not safetensors, which tells it what is being loaded.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def _wait_politely() -> None:
    """Where other processes run, lets OpenMP's threads sleep at barriers; read when torch is loaded.

    With another process on one of two cores, spinning makes a training step twice as slow as sleeping, or worse; on an
    idle machine, sleeping makes it two to four times as slow as spinning (docs/log.md). The load average would not do:
    it still counts the command before this one.
    """
    enough = max(1, (os.cpu_count() or 1) // 4)  # in a container, others are those of the whole host
    if "OMP_WAIT_POLICY" not in os.environ and _others_running() >= enough:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _others_running(file: Path = Path("/proc/loadavg"), looks: int = 5, pause: float = 0.01) -> int:
    """How many threads of others want a core, the median of a few looks; 0 where that is not known."""
    found = []
    for _ in range(looks):
        try:
            found.append(int(file.read_text().split()[3].partition("/")[0]) - 1)  # without the one that looks
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(pause)
    return sorted(found)[looks // 2]


def overview() -> str:
    """The text of `veneer --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in VERBS.items())
    return (
        "veneer: LoRA you can check. Train it fast, see what it learned and forgot, ship exactly that.\n\n"
        f"usage: veneer VERB [FILE.yaml] [--option value ...]\n\n{verbs}\n\n"
        "`veneer VERB --help` lists the options of a verb; every verb takes --json. Start with: veneer demo"
    )


def _printed(text: str) -> int:
    try:
        print(text, file=results(), flush=True)
    except BrokenPipeError:
        return 141  # as in `_run`
    return 0


def _run(verb: str, words: list[str]) -> int:
    """Call the verb; turn what it raises into a message and an exit code."""
    try:
        module, function = VERBS[verb][0].split(":")
        code: int | None = getattr(importlib.import_module(module), function)(words)
        results().flush()  # here, where a reader that has gone is no bug, and not while Python exits
        return code or 0
    except VeneerError as error:
        if not _told_elsewhere(error):
            say(f"veneer: {error}")
            if isinstance(error, ConfigError):
                say(f"`veneer {verb} --help` lists the options.")
        return 2
    except KeyboardInterrupt:
        say("veneer: interrupted")
        return 130
    except BrokenPipeError:
        return 141  # the reader has gone (`veneer generate | head`), as a shell reports it
    except Exception as error:
        if (number := _system_error(error)) not in _SURROUNDINGS:
            return _bug()
        where = getattr(error, "filename", None) or "it was not said where"
        say(f"veneer: {os.strerror(number)}: {where}; make room or choose another place")
        return 2


def _system_error(error: Exception) -> int:
    """The number of an error of the operating system, 0 for others; safetensors tells it in the text of its own."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else 0


def _told_elsewhere(error: VeneerError) -> bool:
    """Of torchrun's processes one speaks; all of them were given the same settings."""
    return error.told_elsewhere or (isinstance(error, ConfigError) and os.environ.get("RANK", "0") != "0")


def _bug() -> int:
    import traceback

    traceback.print_exc()
    say("veneer: this is a bug in veneer, not in what you typed; please report it with the traceback above")
    return 1


def _unknown_verb(word: str) -> int:
    near = nearest(word, VERBS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    say(f"veneer: unknown verb {word}{hint}\nThe verbs are: {', '.join(VERBS)}.")
    return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"veneer {version('veneer')}"
    except PackageNotFoundError:
        return "veneer (not installed: run from its source)"


if __name__ == "__main__":
    sys.exit(main())
