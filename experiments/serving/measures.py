"""Serving: CPU time a token, tokens a second, waits; one record a round and setting."""

from statistics import median


def records(lines: list[dict]) -> list[dict]:
    """Measured rows; a round stands in for a seed, since nothing here is drawn."""
    found = [line for line in lines if line["part"] in ("runs", "earlier")]
    return [line | {"seed": line["round"], "how": _how(line), "set": _set(line)} for line in found]


def _how(line: dict) -> str:
    if line["part"] == "earlier":
        return f"{line['engine']}, {line['arm']}, {line['concurrency']}"
    return line.get("order") or f"{line['arm']}, {line['clients']}"


def _set(line: dict) -> str:
    if line["part"] == "earlier":
        return "tickets"
    return "both" if line["what"] == "order" else "ask"


def cpu_ask(record: dict, lab) -> float | None:
    return _cpu(record) if record["set"] == "ask" else None


def cpu_both(record: dict, lab) -> float | None:
    return _cpu(record) if record["set"] == "both" else None


def _cpu(record: dict) -> float:
    return 1000 * record["cpu_seconds"] / record["tokens"]


def speed_ask(record: dict, lab) -> float | None:
    return _speed(record) if record["set"] == "ask" else None


def speed_tickets(record: dict, lab) -> float | None:
    return _speed(record) if record["set"] == "tickets" else None


def _speed(record: dict) -> float:
    return record["tokens"] / record["seconds"]


def first_ask(record: dict, lab) -> float | None:
    return median(record["first"]) if record["set"] == "ask" else None


def per_token_ask(record: dict, lab) -> float | None:
    return 1000 * median(record["per_token"]) if record["set"] == "ask" else None


def same_ask(record: dict, lab) -> float | None:
    return _same(record) if record["set"] == "ask" else None


def same_both(record: dict, lab) -> float | None:
    return _same(record) if record["set"] == "both" else None


def same_tickets(record: dict, lab) -> float | None:
    return _same(record) if record["set"] == "tickets" else None


def _same(record: dict) -> float:
    return record["same"] / record["requests"]
