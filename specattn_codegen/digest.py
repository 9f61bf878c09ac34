"""One canonical text for any frozen object, and the digest that every cache key is made of."""

import dataclasses
import hashlib
import json


def to_plain(value: object) -> object:
    """Dataclasses, tuples and dicts as JSON types; fields keep their names, dict keys are sorted by the writer."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical form")


def canonical_json(value: object) -> str:
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(*values: object) -> str:
    """First 20 hex digits (80 bits) of the SHA-256 of the values' canonical text."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()[:20]
