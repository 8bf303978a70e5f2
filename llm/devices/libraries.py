"""torch and transformers, imported in 2.3 seconds instead of 4.2 (Xeon, AVX-512), and 900 modules fewer.

transformers imports much that a process alone, which compiles nothing, does not use. That is imported once something
asks for it. To be dropped when transformers asks for less by itself.
"""

import gc
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """A package whose own file runs once something asks for what its module does not have yet."""

    has_run = False

    def __getattr__(self, attribute: str) -> Any:
        # inspect asks every module for such names; without __path__, imports of the package's modules ask for that
        if attribute.startswith("__") and attribute != "__path__":
            raise AttributeError(attribute)
        if not self.has_run:
            self.has_run = True
            assert self.__spec__ and self.__spec__.loader and self.__spec__.submodule_search_locations
            self.__path__ = self.__spec__.submodule_search_locations
            self.__spec__.loader.exec_module(self)
        # some packages put another module in their own place
        module = sys.modules[self.__name__]
        if module is self and attribute not in self.__dict__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {attribute!r}")
        return getattr(module, attribute)


def load() -> None:
    """Import torch and transformers."""
    # The objects that they make stay. To look for garbage among them takes a tenth of the import, and 0.2 s each time
    # from then on (Zen 3).
    gc.disable()
    try:
        torch = import_module("torch")
        # Builds of torch say so that lack it. With it transformers imports torch.distributed.tensor.
        torch.distributed.is_available = lambda: False
        # transformers marks functions for torch.compile, which nobody calls here.
        compiler = _defer("torch._dynamo", assume_constant_result=_mark, allow_in_graph=_mark, disable=_mark)
        # Its index of all models' classes takes 1,600 files to make, and transformers has made one of its own by now.
        _defer("transformers.models")
        import_module("transformers.generation.utils")
        # the modules of torch._dynamo that transformers imports do without the package; the others may not
        if compiler and not compiler.has_run:
            del compiler.__path__
    finally:
        gc.freeze()
        gc.enable()


def _defer(package: str, **given: Any) -> _Deferred | None:
    """Import a package without running its own file. None where the package has been imported."""
    if package in sys.modules:
        return None
    spec = find_spec(package)
    assert spec
    module = sys.modules[package] = module_from_spec(spec)
    module.__dict__.update(given)
    module.__class__ = _Deferred
    assert isinstance(module, _Deferred)
    return module


def _mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator that changes nothing, with or without arguments."""
    return _mark if function is None else function
