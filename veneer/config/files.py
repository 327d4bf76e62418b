"""Options in a YAML file: one flat mapping, `option: value`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in the file. ConfigError: missing, not YAML, not a mapping, an option twice."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"cannot read the options in {path}: {reason}; wanted a YAML file, `option: value`") from None
    try:
        options = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}; wanted lines such as `r: 16`") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:  # odd values
        reason = f"{type(error).__name__}, {str(error)[:200]!r}"
        raise ConfigError(f"{path} is not YAML that can be read ({reason}); wanted lines such as `r: 16`") from None
    if not isinstance(options or {}, dict):
        raise ConfigError(f"{path} holds a {type(options).__name__}; wanted a mapping of lines such as `r: 16`")
    return {str(name): value for name, value in (options or {}).items()}


def write_yaml(path: str | Path, options: Mapping[str, Any]) -> None:
    """Write options so that `read_yaml` gives them back."""
    Path(path).write_text(dump_yaml(options), encoding="utf-8")


def dump_yaml(options: Mapping[str, Any]) -> str:
    """The options as YAML text, in their order."""
    import yaml

    # Unprintable line ends such as U+0085 are lost by PyYAML unless every letter beyond ASCII is escaped.
    printable = json.dumps(options, ensure_ascii=False, default=str).isprintable()
    style = {"sort_keys": False, "allow_unicode": printable, "default_flow_style": None, "width": 120}
    return str(yaml.dump(dict(options), Dumper=_dumper(), **style))


def _one_line(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + (problem or str(error).splitlines()[0])


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader for which 1e-5 is a number (YAML 1.1 wants 1.0e-5) and a key may stand only once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((key for key, count in keys.items() if count > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(problem=f"{twice} stands twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(*_FLOAT)
    return Loader


def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        """SafeDumper that quotes the text `1e5`, which our loader would take for a number."""

    Dumper.add_implicit_resolver(*_FLOAT)
    return Dumper


_FLOAT = "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
