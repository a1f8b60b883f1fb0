"""ftlab: the thin helper package of the fine-tuning course.

Three rooms: `scratch` (what you build by hand), `pipeline` (what you do at work), `classroom` (what teaches).
Names are imported from their home, e.g. `from ftlab.pipeline.models import load`.
"""
