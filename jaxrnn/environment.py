"""What surrounds a run: what can move its bits (versions, platform, flags, threads), and how memory is kept."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Iterator

import jax

import jaxrnn
from jaxrnn import programs

VERSIONED = ('jaxrnn', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
"""Packages whose versions a result states."""

BITS = ('jax', 'jaxlib', 'flax', 'optax', 'jaxrnn')
"""Packages whose version can change what a step computes."""


def versions() -> dict[str, str]:
    """Package -> version, Python's among them."""
    return {'python': platform.python_version()} | {name: _version(name) for name in VERSIONED}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != 'jaxrnn':
            raise
        return jaxrnn.__version__  # a checkout that isn't installed


def describe() -> dict[str, str]:
    """Everything known to change the bits of a compiled step, by name."""
    device = jax.devices()[0]
    found = versions()
    return {
        **{name: found[name] for name in BITS},
        'platform': device.platform,
        'device': device.device_kind,
        'devices': str(jax.device_count()),
        **processor(_cpuinfo()),
        'threads': str(threads()),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'matmul_precision': str(jax.config.values['jax_default_matmul_precision']),
        'x64': str(jax.config.values['jax_enable_x64']),
        'threefry_partitionable': str(jax.config.values['jax_threefry_partitionable']),
    }


@functools.lru_cache(maxsize=1)
def sources() -> str:
    """16 hex digits over this package's own sources."""
    root = pathlib.Path(__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        total.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def digest(description: dict[str, str]) -> str:
    """16 hex digits over a description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def differences(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs, each as `name: recorded -> found`."""
    names = sorted(recorded.keys() | found.keys())
    pairs = [(name, recorded.get(name, '?'), found.get(name, '?')) for name in names]
    return [f'{name}: {old or "unset"} -> {new or "unset"}' for name, old, new in pairs if old != new]


def threads() -> int:
    """Processors this process may run on, which is how many threads XLA:CPU starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def use_threads(count: int) -> None:
    """Restricts this process to `count` processors; call it before JAX starts its backend. Linux only."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')
"""Where Linux keeps what a container may use."""


def memory() -> int:
    """Bytes that a run's arrays may take: of the device, or of the machine, where it computes on processors."""
    limit = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
    return limit or min([os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'), *_of_container()])


def _of_container() -> Iterator[int]:
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no limit is the word `max`
            yield int(pathlib.Path(path).read_text(encoding='ascii'))


# Parameters of mallopt: malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Keeps freed memory with this process; call it before JAX starts its backend.

    XLA:CPU takes a step's temporary memory from malloc and frees it after the step. Blocks as large come fresh from
    the kernel each time, which clears every page anew: about a tenth of a train step. Kept, they cost that once.
    The process then never shrinks. No result changes by a bit.

    Returns:
        Whether it is done; only glibc can.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if os.name == 'posix' else None
    if mallopt is None or platform.libc_ver()[0] != 'glibc':
        return False
    # Blocks of any size from one heap, whose top is never given back.
    return all([mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)])


def cache_folder() -> pathlib.Path:
    """Where this user's caches are: $JAXRNN_CACHE, $XDG_CACHE_HOME/jaxrnn or ~/.cache/jaxrnn."""
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return pathlib.Path(os.environ.get('JAXRNN_CACHE') or os.path.join(home, 'jaxrnn'))


def keep_compiled() -> None:
    """Has JAX keep compiled programs with this user, and find them there again; call it before it compiles any.

    Programs are kept apart by all that `describe` knows of: one that was compiled for another processor can crash
    this one. Within that JAX tells them apart by a key of its own. Nothing is changed where the user has set a
    directory of their own (JAX_COMPILATION_CACHE_DIR), nor where none is safe (see `programs.folder`).
    """
    if jax.config.values['jax_compilation_cache_dir']:
        return
    if (folder := programs.folder(cache_folder() / 'compiled', digest(describe()))) is not None:
        jax.config.update('jax_compilation_cache_dir', os.fspath(folder))


VECTORS = re.compile(r'avx\w*|amx\w*|fma\w*|f16c|asimd\w*|sve\w*')
"""Instructions, as Linux names them, with which XLA:CPU and Eigen sum in another order."""


def processor(cpuinfo: str) -> dict[str, str]:
    """The processor, and the instructions for vectors that it has, which a virtual machine may hide.

    Its name alone does not tell what is computed: a virtual machine may give several generations the same.

    Args:
        cpuinfo: text of Linux' /proc/cpuinfo; empty elsewhere.
    """

    def first(pattern: str) -> str:
        match = re.search(rf'^(?:{pattern})\s*:\s*(.+)$', cpuinfo, re.MULTILINE)
        return match[1] if match else ''

    name = first('model name|CPU part') or platform.processor() or platform.machine()
    parts = [f'{word} {found}' for word, found in (
        ('family', first('cpu family')), ('model', first('model')),
    ) if found]  # fmt: skip
    instructions = set(first('flags|Features').split())
    return {
        'processor': f'{name} ({", ".join(parts)})' if parts else name,
        'instructions': ' '.join(sorted(filter(VECTORS.fullmatch, instructions))),
    }


def _cpuinfo() -> str:
    try:
        return pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
    except OSError:
        return ''
