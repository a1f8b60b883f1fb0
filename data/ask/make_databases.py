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
BIG, LATE = 1000, 45  # rupees, minutes; many orders stand exactly there, so that > and >= differ
MOVED = {"done": 0.4, "tipped": 0.4, "unrated": 0.4, "total": 0.35, "tip": 0.4, "minutes": 0.12, "stars": 0.3}


def tastes(r: random.Random) -> tuple[list[float], dict, dict]:
    """How often each city occurs, how often each value within a city, and how much each value moves the rest."""
    often = {name: [0.2 + 1.2 * r.random() for _ in values] for name, values in VALUES.items()}
    here = {
        (city, name): [often[name][i] * (0.4 + 1.2 * r.random()) for i in range(len(values))]
        for city in VALUES["city"]
        for name, values in VALUES.items()
    }
    moves = {
        value: {what: most * (2 * r.random() - 1) for what, most in MOVED.items()}
        for name in ("city", "plan", "cuisine", "payment", "month")
        for value in VALUES[name]
    }
    return often["city"], here, moves


def new_total(r: random.Random, factor: float, taken: set[int]) -> int:
    """Rupees from 90 to 1,600: exactly BIG or a round number now and then, every other total once in a table."""
    chance = r.random()
    if chance < 0.02:
        return BIG
    if chance < 0.09:
        return 50 * (2 + int(r.random() * 23))  # 100 to 1,200
    while True:
        total = 90 + int(1511 * min(r.random() * factor, 0.9999))
        if total % 50 and total not in taken:
            taken.add(total)
            return total
        factor = 1  # this corner of the table may be full


def new_tip(r: random.Random, factor: float, taken: set[int]) -> int:
    """5 to 300 rupees: small tips are common and often a round ten, those above 100 rare and each once in a table."""
    while True:
        part = r.random()
        tip = 5 + int(250 * part * part * part * part * factor)
        if tip <= 100:
            return 10 * max(1, tip // 10) if r.random() < 0.4 else tip
        if tip <= 300 and tip not in taken:
            taken.add(tip)
            return tip


def new_minutes(r: random.Random, factor: float) -> int:
    """12 to 75 minutes, mostly around 40, exactly LATE now and then."""
    if r.random() < 0.03:
        return LATE
    while True:
        minutes = 12 + int(64 * 0.42 * (r.random() + r.random()) * factor)
        if minutes <= 75:
            return minutes


def fill(number: int) -> list[dict]:
    """The orders of one table, the oldest first; ids from 1001."""
    r = random.Random(2026 + number)
    cities, here, moves = tastes(r)
    totals: set[int] = set()
    tips: set[int] = set()
    orders = []
    for _ in range(SIZES[number]):
        city = r.choices(VALUES["city"], cities)[0]
        order = {name: r.choices(values, here[city, name])[0] for name, values in VALUES.items()} | {"city": city}
        factor = {what: max(0.3, 1 + sum(moves[v][what] for v in order.values() if v in moves)) for what in MOVED}
        order["status"] = r.choices(VALUES["status"], [3.5 * factor["done"], *here[city, "status"][1:]])[0]
        day = 1 + int(r.random() * calendar.monthrange(2026, order["month"])[1])
        order["day"] = f"2026-{order['month']:02}-{day:02}"
        order["total"] = new_total(r, factor["total"], totals)
        order["tip"] = new_tip(r, factor["tip"], tips) if r.random() < 0.5 * factor["tipped"] else 0
        order["minutes"] = new_minutes(r, factor["minutes"])
        part = r.random()
        stars = int(5.99 - 5 * part * part * factor["stars"] - r.random() * order["minutes"] / 75)
        order["stars"] = "" if r.random() < 0.26 * factor["unrated"] else max(1, stars)
        orders.append(order)
    orders.sort(key=lambda order: order["day"])  # a stable sort
    return [{"id": 1001 + place, **order} for place, order in enumerate(orders)]


def write(folder: Path = FOLDER) -> None:
    """Write orders_0.csv ... orders_9.csv; an empty `stars` is NULL."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(SIZES)):
        with open(folder / f"orders_{number}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(fill(number))


if __name__ == "__main__":
    write()
