"""The same documents in every form in which a text file may hold them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import Any

ROWS = ["the first text", 'two, with a "quote"', "drei: \u00e4\u00f6\u00fc \u4f60\u597d"]
JOINED = "\n\n".join(ROWS)


def json_lines(field: str = "text") -> str:
    return "\n".join(json.dumps({field: text}, ensure_ascii=False) for text in ROWS)


def csv_rows(separator: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([("number", "text"), *enumerate(ROWS)])
    return out.getvalue()


FORMS: dict[str, bytes] = {
    "array.json": json.dumps([{"text": text} for text in ROWS]).encode(),
    "strings.json": json.dumps(ROWS).encode(),
    "lines.json": json_lines().encode(),
    "lines.jsonl": json_lines().encode(),
    "lines.ndjson": json_lines().encode(),
    "marked.jsonl": b"\xef\xbb\xbf" + json_lines().encode(),
    "wide.jsonl": json_lines().encode("utf-16"),
    "lines.jsonl.gz": gzip.compress(json_lines().encode()),
    "rows.csv": csv_rows().encode(),
    "rows.tsv": csv_rows("\t").encode(),
    "plain.txt": JOINED.encode(),
    "wide.txt": JOINED.encode("utf-16"),
    "plain.txt.gz": gzip.compress(JOINED.encode()),
}

CHAT = [("user", "Who?"), ("assistant", "Me.")]
CHATS: dict[str, Any] = {
    "messages": {"messages": [{"role": role, "content": content} for role, content in CHAT]},
    "parts": {"messages": [{"role": r, "content": [{"type": "text", "text": c}, {"type": "image"}]} for r, c in CHAT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
}
