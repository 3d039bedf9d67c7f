"""What happened in a batch's folder: a line of JSON for each event, only ever added to. Standard library only.

Several processes, on several hosts, write to one journal. A line that a power cut tore is passed over; what is made is
known from the files themselves, what is being made from the claims.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan22.many import claim
from wan22.output.names import CLAIM, beside

NAME = "batch.jsonl"


class Journal:
    """The journal of a folder, to add to."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self._handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")  # a torn line would take the next one with it
        self._who = {"host": socket.gethostname(), "pid": os.getpid()}

    def add(self, event: str, **data: Any) -> None:
        """In one write, so that lines of several writers do not mix. A full disk loses a line, not the batch."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **data, **self._who}, ensure_ascii=False)
        try:
            os.write(self._handle, line.encode("utf-8", "replace") + b"\n")
        except OSError:
            return

    def close(self) -> None:
        os.close(self._handle)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole event, in order; none where there is no journal."""
    path = folder / NAME
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                continue
            if all(isinstance(event.get(key) or 0, int | float) for key in ("time", "seconds")):  # it can be edited
                yield {**event, "time": event.get("time") or 0}


def status(folder: Path) -> dict[str, Any]:
    """What of a folder's batches is done, running, failed and waiting, each with what is known of it; `bad` lines; and
    `seconds_left` at the pace so far, None where nobody is at work or nothing is finished yet."""
    items: dict[str, dict[str, Any]] = {}
    bad: dict[str, str] = {}
    seconds: list[float] = []
    for event in read(folder):
        name = str(event.get("name"))
        match event["event"]:
            case "begin":
                bad = {}
            case "bad":
                bad[str(event.get("where"))] = str(event.get("error"))
            case "item":
                items.setdefault(name, {}).update({key: event.get(key) for key in ("where", "request")})
            case "failed":
                items.setdefault(name, {})["error"] = event.get("error")
            case "start":
                items.setdefault(name, {}).update(error=None, started=event["time"])
            case "done":
                items.setdefault(name, {}).update(error=None, seconds=event.get("seconds"))
                seconds.append(float(event.get("seconds") or 0))
    parts: dict[str, list[dict[str, Any]]] = {"done": [], "running": [], "failed": [], "waiting": []}
    for name, item in items.items():
        output = folder / name
        if output.exists():
            part = "done"
        elif who := claim.holder(beside(output, CLAIM, hidden=True)):
            part, item["who"] = "running", who
        else:
            part = "failed" if item.get("error") else "waiting"
        parts[part].append({"name": name, **item})
    left = None
    if parts["running"] and (recent := seconds[-20:]):
        now = time.time()
        spent = sum(min(now - item.get("started", now), sum(recent) / len(recent)) for item in parts["running"])
        ahead = (len(parts["waiting"]) + len(parts["running"])) * sum(recent) / len(recent) - spent
        left = round(max(ahead, 0) / len(parts["running"]), 1)
    return {**parts, "bad": [{"where": where, "error": error} for where, error in bad.items()], "seconds_left": left}


def as_text(found: dict[str, Any]) -> str:
    """A status for a person."""
    counts = ", ".join(f"{len(found[part])} {part}" for part in ("done", "running", "failed", "waiting"))
    lines = [counts + (f", {len(found['bad'])} bad lines" if found["bad"] else "")]
    if found["seconds_left"] is not None:
        lines.append(f"about {duration(found['seconds_left'])} left")
    lines += [f"  running  {item['name']}  ({item['who']})" for item in found["running"]]
    lines += [f"  failed   {item['name']}: {item['error']}" for item in found["failed"]]
    lines += [f"  bad      {item['where']}: {item['error']}" for item in found["bad"]]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`3 h 07 min`, `12 min`, `8 s`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
