"""The course's tasks: each has a system prompt and a scorer, and its rows lie in `data/`."""
