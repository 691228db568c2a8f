"""Lazy registration: callbacks that run when a module is imported, and mappings that import an entry when it is read."""

import importlib
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from importlib.abc import Loader, MetaPathFinder
from threading import RLock
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}
_lock = RLock()


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> None:
    """Calls `callback(module)` once: now if the module is already imported, else as the last step of its import.

    The callback runs while the import lock of the module is held, so it must not import anything that imports the module.
    """
    with _lock:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        _waiting.setdefault(module, []).append(callback)
    run_waiting()


def run_waiting() -> None:
    """Runs the callbacks of every module that is imported by now.

    Needed for a module whose import another thread had begun before the callback was added: `_Finder` missed it.
    """
    for name in [name for name in tuple(_waiting) if name in sys.modules]:
        # import_module waits for another thread that is still executing the module.
        _run(name, importlib.import_module(name))


def _run(name: str, module: ModuleType) -> None:
    with _lock:
        callbacks = _waiting.pop(name, [])
        for callback in callbacks:
            callback(module)


class _Finder(MetaPathFinder):
    """Wraps the loader of a module that callbacks wait for in a `_CallbackLoader`; the other finders find the module."""

    def find_spec(self, name, path, target=None):
        if name not in _waiting:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Finder) else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallbackLoader(spec.loader)
                return spec
        return None


class _CallbackLoader(Loader):
    """Runs a module's own loader, then the callbacks."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        # Restores the module's own loader, because inspect and importlib.resources use it.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _run(module.__name__, module)


class LazyMapping(MutableMapping):
    """A dictionary with deferred entries, which are imported when they are looked up or listed.

    A key that is a class is matched by its module and name, so a lookup by class imports no other entry's class.

    Args:
        entries: initial entries, not deferred.
    """

    def __init__(self, entries: Mapping | None = None):
        self._loaded: dict[Hashable, Any] = dict(entries or {})
        self._deferred: dict[str, Callable[[], tuple[Hashable, Any]]] = {}

    def defer(self, name: str, load: Callable[[], tuple[Hashable, Any]]) -> None:
        """Adds an entry: `load()` returns its key and value; `name` is the key, or `module.Class` of a key that is a class.

        An existing entry of that name is kept.
        """
        if name not in map(_name, self._loaded):
            self._deferred[name] = load

    def _load(self, name: str) -> None:
        load = self._deferred.get(name)
        if load is not None:
            key, value = load()
            # Store before deleting the deferred entry, so that another thread always finds the entry in one of the two.
            self._loaded[key] = value
            self._deferred.pop(name, None)

    def _load_all(self) -> dict[Hashable, Any]:
        for name in tuple(self._deferred):
            self._load(name)
        return self._loaded

    def __contains__(self, key: object) -> bool:
        return _name(key) in self._deferred or key in self._loaded

    def __getitem__(self, key):
        self._load(_name(key))
        return self._loaded[key]

    def __setitem__(self, key, value) -> None:
        self._loaded[key] = value
        self._deferred.pop(_name(key), None)

    def __delitem__(self, key) -> None:
        self._load(_name(key))
        del self._loaded[key]

    def __iter__(self) -> Iterator:
        return iter(tuple(self._load_all()))

    def __len__(self) -> int:
        return len(self._loaded) + len(self._deferred)

    def __repr__(self) -> str:
        return repr(self._load_all())

    def __reduce__(self):
        return dict, (dict(self._load_all()),)

    def copy(self) -> dict:
        """A plain dictionary of all entries."""
        return dict(self._load_all())


def _name(key: object) -> str:
    if isinstance(key, str):
        return key
    return f"{getattr(key, '__module__', '')}.{getattr(key, '__qualname__', '')}"
