"""Owns the node's facts: checks the one file that user-data brings, and turns it into what the service reads.

``python3 facts.py FACTS OUT`` writes into the folder OUT ``keys.json`` (hashes of the API keys) and ``node.env``
(settings), or, if the facts are wrong or missing, ``problem`` and nothing else: the service then says why at /ready and
answers nobody. Exit code 0 for facts that are right, 1 for others, with one line each about what is wrong.
"""

import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMA = Path("/usr/share/mini-llm/facts.schema.json")
_LARGEST_BYTES = 32 << 10  # user-data as a whole have no more


class FactsWrong(Exception):
    """The facts cannot be used; ``problems`` are lines for people."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


def read_facts(path: Path, schema: dict[str, Any]) -> dict[str, Any]:
    """The facts of a file. Raises FactsWrong with every problem found."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise FactsWrong(
            [f"{path} is missing: write it with write_files in this server's user-data, as cloud-init/node.yaml shows"]
        ) from None
    except OSError as error:
        raise FactsWrong([f"{path} cannot be read: {error.strerror}"]) from error
    if len(text) > _LARGEST_BYTES:
        raise FactsWrong([f"{path} is longer than {_LARGEST_BYTES} bytes"])
    try:
        facts = yaml.safe_load(text.decode())
    except UnicodeDecodeError as error:
        raise FactsWrong([f"{path} is not UTF-8: byte {error.start}"]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise FactsWrong([f"{path} is not YAML: {_where(error)}"]) from error
    found = jsonschema.Draft202012Validator(schema).iter_errors(facts)
    problems = [_describe(error) for error in sorted(found, key=lambda error: [str(part) for part in error.path])]
    problems += _find_twins(facts) + _find_bad_times(facts) if not problems else []
    if problems:
        raise FactsWrong(problems)
    return facts


def keys_of(facts: dict[str, Any], now: datetime) -> dict[str, Any]:
    """The service's key file, from facts that are right."""
    return {
        "keys": [
            {"created": now.isoformat(timespec="seconds"), "scopes": ["generate"], **_as_in_json(key)}
            for key in facts["api_keys"]
        ]
    }


def settings_of(facts: dict[str, Any]) -> dict[str, str]:
    """Settings of the service, from facts that are right."""
    return {"LLM_PRICE_EUR_PER_HOUR": str(facts["price_eur_per_hour"])} if "price_eur_per_hour" in facts else {}


def _where(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or type(error).__name__
    return f"{what} (line {mark.line + 1})" if mark else str(what)


def _describe(error: jsonschema.ValidationError) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path).lstrip(".") or "facts"
    hint = error.schema.get("description", "") if isinstance(error.schema, dict) else ""
    match error.validator:
        case "additionalProperties":
            known = ", ".join(error.schema["properties"])
            extra = ", ".join(repr(name) for name in error.instance if name not in error.schema["properties"])
            return f"{place}: {extra} is not known here; known are {known}"
        case "required":
            missing = next(name for name in error.validator_value if name not in error.instance)
            return f"{place}: {missing} is missing"
        case "type":
            return f"{place}: must be {_type_name(error.validator_value)}" + (f" ({hint})" if hint else "")
    # The value itself is left out: it may be a key that somebody took for its hash.
    return f"{place}: {hint or 'is not valid'}"


def _type_name(kind: str) -> str:
    names = {"object": "names with values", "array": "a list", "string": "a text", "integer": "a whole number"}
    return names.get(kind, f"a {kind}")


def _find_twins(facts: dict[str, Any]) -> list[str]:
    problems = []
    for field in ("name", "sha256"):
        values = [key[field] for key in facts["api_keys"]]
        if len(set(values)) < len(values):
            problems.append(f"api_keys: two of them have the same {field}")
    return problems


def _find_bad_times(facts: dict[str, Any]) -> list[str]:
    problems = []
    for number, key in enumerate(facts["api_keys"]):
        if "expires" not in key:
            continue
        try:
            expires = datetime.fromisoformat(str(_as_in_json(key)["expires"]))
        except ValueError:
            expires = None
        if expires is None or expires.tzinfo is None:
            problems.append(f"api_keys[{number}].expires: must be a time with its zone, as 2027-01-31T12:00:00Z")
    return problems


def _as_in_json(key: dict[str, Any]) -> dict[str, Any]:
    """YAML makes times of texts that look like one."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in key.items()}


def write_whole(path: Path, text: str, mode: int) -> None:
    """Writes a file under another name first; it belongs to its folder's group, which is the service's."""
    unfinished = path.with_name(path.name + ".unfinished")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    os.chown(unfinished, -1, path.parent.stat().st_gid)
    unfinished.chmod(mode)
    unfinished.replace(path)


def main(facts_path: Path, out: Path, schema_path: Path = SCHEMA) -> int:
    """Checks and writes; the boundary where problems become lines."""
    names = ("keys.json", "node.env", "problem")
    for name in names:
        (out / name).unlink(missing_ok=True)
    try:
        facts = read_facts(facts_path, json.loads(schema_path.read_text()))
    except FactsWrong as wrong:
        for problem in wrong.problems:
            print(f"mini-llm: this node does not serve: {re.sub(r'[^ -~]', '?', problem)}")
        write_whole(out / "problem", "\n".join(wrong.problems) + "\n", 0o640)
        return 1
    write_whole(out / "keys.json", json.dumps(keys_of(facts, datetime.now(UTC)), indent=1) + "\n", 0o640)
    write_whole(out / "node.env", "".join(f"{name}={value}\n" for name, value in settings_of(facts).items()), 0o640)
    print(f"mini-llm: the facts are right; {len(facts['api_keys'])} keys")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
