"""Compiled programs: `jit` with the compiler's options that suit each, kept on disk traced, compiled ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .._version import SOURCE, source_on_disk
from ..errors import is_concrete
from .cores import cores, left_there, placed, shape_of, shared, sharing
from .progress import anyone, tell
from .room import drop_if_full, make_room

#: How the names of this package's modules begin.
_PACKAGE = __name__.partition(".")[0] + "."

#: On a CPU, less optimisation, in few pieces, compiles a fifth faster and runs as fast; without fusion emitters
#: compilation takes half of its time and memory, and what is compiled runs slower by a third.
_USUAL = {"xla_backend_optimization_level": 1, "xla_cpu_prefer_vector_width": 512}
_USUAL["xla_cpu_parallel_codegen_split_count"] = min(2 * cores(), 32)
_QUICK = {**_USUAL, "xla_cpu_use_fusion_emitters": False}
#: Cores that share a program may wait for each other as long as they like.
_PATIENT = {"xla_cpu_collective_call_terminate_timeout_seconds": 10**6, "xla_cpu_collective_timeout_seconds": 10**6}


@functools.cache
def _options(backend: str, quick: bool, mesh: Mesh | None = None) -> dict:
    """The options, those that this version of the compiler has."""
    found: dict[str, Any] = {}
    for options in (_QUICK if quick else _USUAL, {} if mesh is None else _PATIENT):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if backend == "cpu" and options:
                jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
                found |= options
    return found


def platform(arrays: Iterable[Any] = ()) -> str:
    """What JAX computes on, by the name that exported programs have ("cpu", "cuda"): where an array is bound to, else
    the default device, else the default backend."""
    bound = [a for a in arrays if isinstance(a, jax.Array) and a.committed]
    config: Any = jax.config
    device = next(iter(bound[0].devices())) if bound else config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return jax.export.default_export_platform() if name == jax.default_backend() else name


#: What a user may ask of JAX is not asked of these programs: the undefined is NaN, arrays of several types meet.
_RULES = (
    lambda: jax.debug_nans(False),
    lambda: jax.debug_infs(False),
    lambda: jax.numpy_dtype_promotion("standard"),
    lambda: jax.numpy_rank_promotion("allow"),
)


class _Made(NamedTuple):
    """A jitted function of the arrays among the arguments; the trees of its results, one of which is there once it was
    traced: places stand for their arrays; whether it was read from disk."""

    run: Any
    outcomes: list
    kept: bool = False


class Program:
    """`eqx.filter_jit(f)`. With `quick` compilation is faster and what is compiled slower, on a CPU.

    Where JAX has a compilation cache on disk the traced program is kept there too: a second start neither traces nor
    lowers it, which takes longer than reading what was compiled. That is for functions of this package whose static
    arguments say in words what they are; everything else is jitted as usual.
    """

    def __init__(self, f: Callable, quick: bool = False):
        functools.update_wrapper(self, f)
        self._f, self._quick = f, quick
        self._inner: Any = eqx.filter_jit(f)
        self._made: dict[Any, _Made] = {}
        self._under_way: dict[Any, Any] = {}
        self._seen: set[Any] = set()

    def __call__(self, *args):
        with _own_rules():
            # Options belong to the outermost jit: inside another one there is none to be had.
            # (What is made of nothing inside one is a tracer, even where all arguments are known.)
            if not all(map(is_concrete, (*jax.tree_util.tree_leaves(args), jnp.zeros(())))):
                with sharing(None):
                    return self._inner(*args)
            leaves, treedef = jax.tree_util.tree_flatten(args)
            leaves = [placed(leaf, shared()) if eqx.is_array(leaf) else leaf for leaf in leaves]
            arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
            if anyone():
                self._announce(args, treedef, [a.shape for a in arrays])
            key, made = self._prepared(args, leaves, treedef)
            if compiling := self._under_way.get(key):
                compiling.exception()  # if there is one it is met again below
                self._under_way.pop(key, None)
            try:
                return _filled(made.outcomes, made.run(*arrays))
            except Exception:  # not for this machine; an error of the program itself comes again below
                if not made.kept:
                    raise
            made = self._made[key] = self._plain(platform(arrays), leaves, treedef)
            return _filled(made.outcomes, made.run(*arrays))

    def ahead(self, *args):
        """What a call will return, with shapes in the place of arrays, as some of `args` may have: it is compiled
        meanwhile in another thread."""
        with _own_rules():
            leaves, treedef = jax.tree_util.tree_flatten(args)
            if mesh := shared():
                leaves = [shape_of(leaf, mesh) if _is_array(leaf) else leaf for leaf in leaves]
            if anyone():
                self._announce(args, treedef, [a.shape for a in filter(_is_array, leaves)])
            key, made = self._prepared(args, leaves, treedef)
            lowered = made.run.lower(*filter(_is_array, leaves))
            self._under_way[key] = _compilers(self._quick).submit(lowered.compile)
            out = lowered.out_info
            if made.kept and mesh is None:  # whose results are bound to their device
                here = jnp.zeros(()).sharding
                out = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here) for s in out]
            return _filled(made.outcomes, out)

    def _announce(self, args, treedef, shapes) -> None:
        inner = args[0] if args and callable(args[0]) else self._f  # of `across`
        call = (getattr(inner, "__name__", ""), treedef, tuple(shapes))
        tell(call[0], call not in self._seen)
        self._seen.add(call)

    def _prepared(self, args, leaves: list, treedef) -> tuple[Any, _Made]:
        arrays, folder = list(filter(_is_array, leaves)), _folder()
        backend = platform(arrays)
        shapes = tuple((a.shape, str(a.dtype)) for a in arrays)
        still = tuple(None if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
        key = (treedef, shapes, still, backend, folder, _version(), shared())
        if key not in self._made:
            drop_if_full()
            made = None
            if folder is not None and self._ours() and all(map(_known, args)):
                made = self._keep(folder, backend, leaves, treedef, shapes)
            self._made[key] = made or self._plain(backend, leaves, treedef)
        return key, self._made[key]

    def _ours(self) -> bool:
        """Whether the function is one of this package, found under its name: then its source says what it does."""
        f: Any = self._f
        found = getattr(sys.modules.get(f.__module__), f.__qualname__, None)
        return f.__module__.startswith(_PACKAGE) and (found is f or getattr(found, "_f", None) is f)

    def _plain(self, backend: str, leaves: list, treedef) -> _Made:
        flat, outcomes = self._flat(leaves, treedef)
        return _Made(jax.jit(flat, compiler_options=_options(backend, self._quick, shared())), outcomes)

    def _keep(self, folder: Path, backend: str, leaves: list, treedef, shapes) -> _Made | None:
        """From disk, if it is there; None where the arguments are not such that a later start could know them again."""
        still = [None if _is_array(leaf) else leaf for leaf in leaves]
        words = f"{treedef} {still}"
        plain = all(leaf is None or isinstance(leaf, bool | int | float | str) for leaf in still)
        at_home = shared() or all(len(a.devices()) == 1 for a in leaves if isinstance(a, jax.Array))
        if not (plain and at_home) or "0x" in words or "<" in words:
            return None
        name = f"{self._f.__module__}.{self._f.__qualname__} {shared()}"
        path = folder / hashlib.sha256(f"{_version()} {name} {backend} {words} {shapes}".encode()).hexdigest()
        try:
            exported, outcome = _read(path)
        except Exception:  # not there, or not readable: it is made anew
            try:
                _write(path, *self._export(backend, leaves, treedef))
                exported, outcome = _read(path)  # what a later start will see
            except Exception:  # a folder that cannot be written, a program that cannot be exported
                return None
        return _Made(jax.jit(exported.call, compiler_options=_options(backend, self._quick, shared())), [outcome], True)

    def _flat(self, leaves: list, treedef) -> tuple[Callable, list]:
        """The function of the arrays among `leaves` alone, and where the trees of its results will be."""
        still, outcomes = [None if _is_array(leaf) else leaf for leaf in leaves], []
        is_array, mesh = list(map(_is_array, leaves)), shared()

        def flat(*arrays):
            given = iter(arrays)
            full = [next(given) if is_it else leaf for leaf, is_it in zip(still, is_array, strict=True)]
            out, out_def = jax.tree_util.tree_flatten(self._f(*jax.tree_util.tree_unflatten(treedef, full)))
            places = [_Place() if eqx.is_array(leaf) else leaf for leaf in out]
            outcomes[:] = [jax.tree_util.tree_unflatten(out_def, places)]
            # Weak types do not survive on disk, nor in shapes: what they are handed to would be made once more.
            return left_there([jax.lax.convert_element_type(a, a.dtype) for a in out if eqx.is_array(a)], mesh)

        return flat, outcomes

    def _export(self, backend: str, leaves: list, treedef):
        flat, outcomes = self._flat(leaves, treedef)
        given = [shape_of(leaf, shared()) for leaf in leaves if _is_array(leaf)]
        exported = jax.export.export(jax.jit(flat), platforms=[backend])(*given)
        return exported, outcomes[-1]


@contextlib.contextmanager
def _own_rules():
    with contextlib.ExitStack() as stack:
        for rule in _RULES:
            stack.enter_context(rule())
        yield


def _is_array(leaf) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


@functools.cache
def _compilers(quick: bool) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(cores(), 2) if quick else 1)  # of the others each needs half a gigabyte


def _known(tree) -> bool:
    """Whether all nodes of the tree are of classes of Python or of this package, whose source is part of `_version`."""
    if tree is None or jax.tree_util.all_leaves([tree]):
        return True
    module = type(tree).__module__
    if module != "builtins" and not module.startswith(_PACKAGE):
        return False
    return all(map(_known, jax.tree_util.default_registry.flatten_one_level(tree)[0]))


# ---- what is kept on disk --------------------------------------------------------------------------------------


class _Place:
    """Where an array of the results belongs."""


def _filled(outcomes: list, arrays):
    given = iter(arrays)
    return jax.tree_util.tree_map(lambda leaf: next(given) if isinstance(leaf, _Place) else leaf, outcomes[-1])


def _words(tree) -> Any:
    """A tree of this package's classes and Python's, with places for its arrays, as JSON has it; else `TypeError`."""
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, _Place):
        return {"place": True}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_words(item) for item in tree]}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _words(item) for key, item in tree.items()}}
    kind = type(tree)
    if _class(kind.__module__, kind.__qualname__) is kind:
        return {
            "class": [kind.__module__, kind.__qualname__],
            "fields": [_words(getattr(tree, f)) for f in _fields(kind)],
        }
    raise TypeError(f"{kind} has no description")


def _tree(words) -> Any:
    """The tree that `_words` describes. Nothing is run for it: no class makes anything but its fields."""
    if not isinstance(words, dict):
        return words
    if "class" in words:
        kind, parts = _class(*words["class"]), [_tree(item) for item in words["fields"]]
        if issubclass(kind, tuple):
            return tuple.__new__(kind, parts)
        made = object.__new__(kind)
        for name, part in zip(_fields(kind), parts, strict=True):
            object.__setattr__(made, name, part)
        return made
    ((kind, content),) = words.items()
    if kind == "dict":
        return {key: _tree(item) for key, item in content.items()}
    return _Place() if kind == "place" else {"list": list, "tuple": tuple}[kind](map(_tree, content))


def _class(module: str, name: str) -> type:
    """A named tuple or equinox module of this package."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    ours = module.startswith(_PACKAGE) and isinstance(kind, type)
    if not ours or not (issubclass(kind, eqx.Module) or hasattr(kind, "_fields")):
        raise TypeError(f"{module}.{name} is not a class of this package")
    return kind


def _fields(kind: Any) -> Iterable[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields


def _folder() -> Path | None:
    """Where programs are kept: beside what JAX has compiled."""
    config: Any = jax.config
    cache = config.jax_compilation_cache_dir
    if not SOURCE or not cache or "://" in str(cache) or config.jax_disable_jit:
        return None
    return Path(cache) / "lorastate-programs"


_VERSIONS = *map(version, ("jax", "jaxlib", "equinox")), sys.version


def _version() -> str:
    """What a traced program depends on beside its arguments: this package's source, the versions below, float64."""
    config: Any = jax.config
    return f"{SOURCE} {_VERSIONS} {config.jax_enable_x64, config.jax_default_matmul_precision}"


def kept_arrays(words: str, make: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """`make()`, kept beside the programs under a name that `words`, which say in full what it is, determine."""
    folder = _folder()
    if folder is None:
        return make()
    path = folder.with_name("lorastate-nodes") / hashlib.sha256(f"{_version()} {words}".encode()).hexdigest()
    try:
        data = io.BytesIO(_load(path))
        return tuple(np.load(data) for _ in range(int(np.load(data))))
    except Exception:  # not there, or not readable: it is made anew
        arrays = make()
    data = io.BytesIO()
    for array in (np.array(len(arrays)), *arrays):
        np.save(data, array)
    with contextlib.suppress(OSError):  # a folder that cannot be written
        _store(path, data.getvalue())
    return arrays


def _read(path: Path):
    words, program = _load(path).split(b"\n", 1)
    return jax.export.deserialize(bytearray(program)), _tree(json.loads(words))


def _write(path: Path, exported, outcome) -> None:
    _store(path, json.dumps(_words(outcome)).encode() + b"\n" + bytes(exported.serialize()))


#: Bytes that a folder may hold: several versions of the package, some hundred kinds of setting each.
_MOST = 2**28


def alone(folder: Path) -> bool:
    """Whether nobody else may write there: what is kept is run."""
    status = folder.stat()
    return os.name != "posix" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _load(path: Path) -> bytes:
    """What `_store` has written; an `OSError` if it is not there, not whole, or not safe."""
    if not alone(path.parent):
        raise PermissionError(f"others may write to {path.parent}")
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise OSError(f"{path} is damaged")
    with contextlib.suppress(OSError):
        os.utime(path)  # the oldest is what was not used for longest
    return data[32:]


def _store(path: Path, data: bytes) -> None:
    """Whole or not at all, for other processes may be reading; the oldest files make room.

    Nothing where the source has been edited since it was imported: a later start would take this for its result.
    """
    if source_on_disk() != SOURCE:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not alone(path.parent):
        raise PermissionError(f"others may write to {path.parent}")
    handle, part = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(hashlib.sha256(data).digest() + data)
    os.replace(part, path)
    make_room(path.parent, _MOST)
