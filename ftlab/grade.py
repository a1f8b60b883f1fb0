"""`python -m ftlab.grade FILE_OR_FOLDER ...`: which exercises of a learner's notebooks are right.

How it does that stands in ftlab/exercises/grading.py.
"""

import sys

from ftlab.exercises.grading import main

if __name__ == "__main__":
    sys.exit(main())
