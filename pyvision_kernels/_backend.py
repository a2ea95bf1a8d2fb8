"""Whose kernels run where both we and PyTorch have one, and how exact ours must be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

BACKENDS = ("auto", "pvk", "torch")


class Choice:
    """What `backend` and `strict_numerics` have set; `key` is a part of every cached plan.

    The last part of the key counts what else plans depend on: how often the tuner found something, or was turned on.
    """

    def __init__(self) -> None:
        self.backend = "auto"
        self.strict = False
        self.key: tuple[str, bool, int] = ("auto", False, 0)

    def set(self, backend: str, strict: bool) -> None:
        self.backend, self.strict, self.key = backend, strict, (backend, strict, self.key[2])

    def renew(self) -> None:
        """Puts every cached plan out of date."""
        self.key = (self.backend, self.strict, self.key[2] + 1)


CHOICE = Choice()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses whose kernels the ops run that PyTorch has a fast kernel for too (convolution, linear).

    ``with pvk.backend("pvk"): ...``; of the whole process, not of a thread.

    Args:
        name (str): ``"pvk"``: ours always. ``"torch"``: PyTorch's always. ``"auto"``, the default: ours, but PyTorch's
            where that was measured to be faster (`pvk.explain` says which, docs/ops say where).

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected name to be 'auto', 'pvk' or 'torch', but got {name!r}")
    previous = CHOICE.backend
    CHOICE.set(name, CHOICE.strict)
    try:
        yield
    finally:
        CHOICE.set(previous, CHOICE.strict)


@contextlib.contextmanager
def strict_numerics() -> Iterator[None]:
    """No kernel whose error against float64 may exceed twice that of PyTorch's: leaves out Winograd F(4x4, 3x3).

    ``with pvk.strict_numerics(): ...``; of the whole process, not of a thread.
    """
    previous = CHOICE.strict
    CHOICE.set(CHOICE.backend, True)
    try:
        yield
    finally:
        CHOICE.set(CHOICE.backend, previous)
