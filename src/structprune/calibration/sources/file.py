"""A text file, or a jsonl file whose lines carry a `text` field."""

from __future__ import annotations

import json
from pathlib import Path

from structprune.calibration.context import CalibrationWindows, SourceContext, draw_windows
from structprune.errors import InputError


def read_text(path: Path) -> str:
    """The file's text. Raises InputError if it is missing, not UTF-8, or a jsonl line lacks `text`."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("the text file does not exist", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError("the text file is not UTF-8", where=str(path), got=str(error)) from None
    except OSError as error:
        raise InputError("the text file cannot be read", where=str(path), got=str(error)) from None
    if path.suffix not in (".jsonl", ".json"):
        return content
    texts: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("the line is not JSON", where=f"{path}:{number}", got=str(error)) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError("the line has no text", where=f"{path}:{number}", wanted='{"text": "..."}')
        if any("\ud800" <= character <= "\udfff" for character in row["text"]):
            raise InputError("the line's text is no Unicode", where=f"{path}:{number}", got="half a surrogate pair")
        texts.append(row["text"])
    return "\n\n".join(texts)


def file_windows(path: Path, context: SourceContext) -> CalibrationWindows:
    """Windows drawn from the file's text."""
    return draw_windows(read_text(path), path.name, context)
