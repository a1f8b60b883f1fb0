"""What do 1,000 answers cost on machines of your own? The idle hours are paid for, too.

    python evaluate.py --endpoint ... --model a --file test.jsonl --batch_size 32 --out served.json
    python price.py --answers served.json --dollars_an_hour 2.50 --answers_a_day 20000 --peak 4

A rented machine costs the same whether anybody asks or not. So the price of an answer is that of
the hours, shared among the answers that were wanted, and not that of the seconds an answer takes:
with few questions a cheap model on a fast card is dear.

- What a machine can do is measured: the latencies in --answers, which overlap, --batch_size of them
  at once. Raise evaluate.py's --batch_size until `s of a machine` falls no more, or until an answer
  takes longer than your users wait.
- --answers_a_day comes from your log, --peak too: the busiest hour's answers over the mean hour's,
  of the hours that are switched on. Machines are counted for that hour, and idle in the others.
- --hours: how many hours a day they are switched on, if you switch them off.

Not in it: the training, a spare machine for the day one fails, starting up, traffic, storage, and
the people who watch it. For a hosted model the provider bills tokens, and idle time is not yours.
"""

import argparse
import json
import math
import sys
from pathlib import Path

HOUR = 3600  # seconds


def machine_seconds(latencies, at_once):
    """Seconds of a machine for one answer, of latencies that overlap, `at_once` at a time."""
    return sum(latencies) / len(latencies) / min(at_once, len(latencies))


def of_1000(seconds, dollars_an_hour, answers_a_day, hours=24.0, peak=1.0):
    """(dollars for 1,000 answers, machines, the share of their hours in which they work).

    machines = ceil(peak * answers_a_day * seconds / (hours * 3600))
    dollars = 1000 * machines * hours * dollars_an_hour / answers_a_day

    seconds: of a machine for one answer (machine_seconds). hours: switched on, of a day. peak: the
    answers of the busiest of these hours over those of the mean one. At a share of 1 the price is
    the one without idle time, 1000 * seconds * dollars_an_hour / 3600; else that over the share.
    """
    positive = all(each > 0 for each in (seconds, dollars_an_hour, answers_a_day))  # nan isn't
    if not (positive and 0 < hours <= 24 and peak >= 1):
        raise ValueError(
            f"got seconds {seconds}, dollars_an_hour {dollars_an_hour}, answers_a_day "
            f"{answers_a_day}, hours {hours}, peak {peak}; wanted the first three above 0, hours "
            "from 0 to 24, and a peak of at least 1: no hour is the busiest and below the mean"
        )
    work = answers_a_day * seconds / HOUR  # hours of one machine, of a day
    machines = math.ceil(round(peak * work / hours, 9))  # floats: 1.0000000000000002 is one machine
    dollars = 1000 * machines * hours * dollars_an_hour / answers_a_day
    return dollars, machines, work / hours / machines


def parsed(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", required=True, help="what evaluate.py --endpoint has written")
    parser.add_argument("--dollars_an_hour", type=float, required=True, help="of one machine")
    parser.add_argument("--answers_a_day", type=float, required=True)
    parser.add_argument("--hours", type=float, default=24.0, help="a day, switched on")
    parser.add_argument("--peak", type=float, default=1.0, help="busiest hour over mean hour")
    return parser.parse_args(arguments)


def measured(file):
    """Seconds of a machine for one answer, from a file of evaluate.py."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        return machine_seconds(found["latencies"], found["asked"]["batch_size"])
    except FileNotFoundError:
        sys.exit(f"no file {file}: wanted what evaluate.py --endpoint --out has written")
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        sys.exit(
            f"{file} has no latencies of a server with the batch_size that asked for them: wanted "
            "what evaluate.py --endpoint --out has written; was it run without --endpoint?"
        )


def main(arguments=None):
    asked = parsed(sys.argv[1:] if arguments is None else arguments)
    seconds = measured(asked.answers)
    try:
        dollars, machines, busy = of_1000(
            seconds, asked.dollars_an_hour, asked.answers_a_day, asked.hours, asked.peak
        )
    except ValueError as error:
        sys.exit(str(error))
    never_idle = 1000 * seconds * asked.dollars_an_hour / HOUR
    print(f"{seconds:.3g} s of a machine for an answer; machines: {machines}, busy {busy:.1%}")
    print(f"${dollars:.4g} for 1,000 answers; ${never_idle:.4g} if they were never idle")


if __name__ == "__main__":
    main()
