"""Automatic layer names that people would type themselves."""

import keras


def name_or_default(name: str | None, default: str) -> str:
    """Returns `name`, or a name free in this session: "moe", "moe_1", where Keras says "mo_e"."""
    if name is not None:
        return name
    count: int = keras.backend.get_uid(default)
    return default if count == 1 else f"{default}_{count - 1}"
