"""What a record of an experiment tells of how it was made."""

NOT_RECORDED = "not recorded"


def told(record: dict, field: str):
    """The value of a field such as versions or cpu_seconds, or "not recorded"."""
    if field in record:
        return record[field]
    if field == "versions" and "environment" in record:
        return {
            k: v
            for k, v in record["environment"].items()
            if k in ("torch", "trl", "peft", "transformers")
        }
    return record.get("train_cpu_seconds", NOT_RECORDED) if field == "cpu_seconds" else NOT_RECORDED
