"""A model on its device: how it is loaded and laid out, and what the device offers."""

import gc
from importlib import import_module


def _import_libraries() -> None:
    """The objects that torch and transformers make when they are imported stay. To look for garbage among them takes a
    tenth of the import, and 0.2 s each time from then on (Zen 3)."""
    gc.disable()
    try:
        import_module("torch")
        import_module("transformers.modeling_utils")
    finally:
        gc.freeze()
        gc.enable()


_import_libraries()
