"""Ten differently filled tables of orders, on which a query of the task `ask` is checked.

    python data/ask/make_databases.py      rewrites databases/orders_0.csv ... orders_9.csv (a second)

Each table has its own size and its own taste: how often each city, plan, cuisine, status, payment and month occurs,
and which of them order for more, tip more or wait longer. So "the city with the most late orders" differs from table to
table, and a query that is right by luck on one fails on the next. All values come from sums and products of
`random.random()`, so every machine makes the same bytes.
"""

import calendar
import csv
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "databases"
SIZES = [640, 350, 1200, 480, 820, 560, 990, 420, 730, 1080]
COLUMNS = ["id", "day", "month", "city", "plan", "cuisine", "status", "payment", "total", "tip", "minutes", "stars"]
VALUES = {
    "month": [1, 2, 3, 4, 5, 6],
    "city": ["Pune", "Delhi", "Mumbai", "Chennai", "Kochi", "Jaipur"],
    "plan": ["free", "gold", "office"],
    "cuisine": ["thai", "pizza", "biryani", "dosa", "burger", "sushi", "chaat"],
    "status": ["done", "cancelled", "refunded"],
    "payment": ["card", "cash", "upi"],
}
BIG = 1000  # an order from here on is big: many totals stand exactly there, so that > and >= differ


def bell(r: random.Random) -> float:
    """A number from 0 to 1, mostly near a half, seldom near the ends."""
    return (r.random() + r.random() + r.random()) / 3


def tastes(r: random.Random) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """How often each value occurs in this table, and by what factor each value moves total, tip and minutes."""
    often = {name: [0.35 + r.random() for _ in values] for name, values in VALUES.items()}
    often["status"] = [5.0 + 2 * r.random(), 0.6 + r.random(), 0.6 + r.random()]
    moves = {
        value: {number: 0.8 + 0.4 * r.random() for number in ("total", "tip", "minutes")}
        for name in ("city", "plan", "cuisine", "payment", "month")
        for value in VALUES[name]
    }
    return often, moves


def new_total(r: random.Random, factor: float, taken: set[int]) -> int:
    """Rupees from 90 to 1,600: a round hundred or exactly BIG now and then, every other total once in a table."""
    chance = r.random()
    if chance < 0.02:
        return BIG
    if chance < 0.06:
        return 100 * (1 + int(r.random() * 15))
    while True:
        total = 90 + int(1511 * min(max(r.random() * factor, 0), 0.9999))
        if total % 100 and total not in taken:
            taken.add(total)
            return total
        factor = 1  # this corner of the table may be full


def new_tip(r: random.Random, factor: float) -> int:
    """0 for about half of the orders; else 5 to 200 rupees, small tips often a round ten, large ones rare."""
    if r.random() < 0.5:
        return 0
    part = r.random()
    tip = min(5 + int(195 * part * part * factor), 200)
    return 10 * max(1, tip // 10) if tip < 110 and r.random() < 0.4 else tip


def fill(seed: int) -> list[dict]:
    """The orders of table number `seed`, the oldest first; ids from 1001."""
    r = random.Random(2026 + seed)
    often, moves = tastes(r)
    taken: set[int] = set()
    orders = []
    for _ in range(SIZES[seed]):
        order = {name: r.choices(values, often[name])[0] for name, values in VALUES.items()}
        factor = {"total": 1.0, "tip": 1.0, "minutes": 1.0}
        for name in ("city", "plan", "cuisine", "payment", "month"):
            for number in factor:
                factor[number] *= moves[order[name]][number]
        day = 1 + int(r.random() * calendar.monthrange(2026, order["month"])[1])
        order["day"] = f"2026-{order['month']:02}-{day:02}"
        order["total"] = new_total(r, factor["total"], taken)
        order["tip"] = new_tip(r, factor["tip"])
        order["minutes"] = 12 + int(63.99 * min(bell(r) * 0.75 * factor["minutes"] + 0.15 * r.random(), 1))
        stars = 5.99 - 3 * r.random() * r.random() - 2 * r.random() * order["minutes"] / 75
        order["stars"] = "" if r.random() < 0.25 else max(1, int(stars))
        orders.append(order)
    orders.sort(key=lambda order: order["day"])  # a stable sort
    return [{"id": 1001 + number, **order} for number, order in enumerate(orders)]


def write(folder: Path = FOLDER) -> None:
    """Write orders_0.csv ... orders_9.csv; an empty `stars` is NULL."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(len(SIZES)):
        with open(folder / f"orders_{seed}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(fill(seed))


if __name__ == "__main__":
    write()
