"""python tools/deck.py --anki FILE --sheet FILE: the same as python -m ftlab.classroom.cards, in a clone."""

from ftlab.classroom import cards

if __name__ == "__main__":
    cards.main()
