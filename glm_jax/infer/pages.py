"""Which pages of the key-value cache are whose: free list, reference counts, and prompts that begin
alike.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

NO_KEY = b""  # before a row's first page


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full page's content: its tokens and, by the key of the page before, all that
    precede them.
    """
    return hashlib.blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class PagePool:
    """Hands out pages. A full page is known by its tokens and those before it, so that later rows
    can share it.

    A page nobody holds keeps its content until it is needed: the page unused for longest is taken
    first.
    """

    def __init__(self, num_pages: int):
        self.holders = [0] * num_pages
        self.key_of: dict[int, bytes] = {}
        self.page_of: dict[bytes, int] = {}
        self.free: collections.OrderedDict[int, None] = collections.OrderedDict(
            (page, None) for page in range(num_pages)
        )

    @property
    def num_free(self) -> int:
        return len(self.free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages held once, or None, and nothing held, where fewer are free."""
        if count > len(self.free):
            return None
        pages = [self.free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
            self._forget(page)
        return pages

    def known(self, keys: Sequence[bytes]) -> int:
        """Length of the longest run of `keys`, from the first one, whose pages are known."""
        return next((count for count, key in enumerate(keys) if key not in self.page_of), len(keys))

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of `keys`, from the first one, that are known; each held
        once more.
        """
        pages = []
        for key in keys[: self.known(keys)]:
            page = self.page_of[key]
            self.free.pop(page, None)
            self.holders[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes):
        """Makes a full page known. Where another page of this content is known already, that one
        stays.
        """
        if key not in self.page_of and page not in self.key_of:
            self.page_of[key], self.key_of[page] = page, key

    def release(self, pages: Sequence[int]):
        """One holder less of each page. Free pages of unknown content are the first to be taken
        again, then a row's last.
        """
        for page in reversed(pages):
            assert self.holders[page] > 0, page
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free[page] = None
                if page not in self.key_of:
                    self.free.move_to_end(page, last=False)

    def forget_all(self):
        """Nothing is known any more: the weights changed. Pages that are held stay held."""
        self.key_of.clear()
        self.page_of.clear()

    def _forget(self, page: int):
        key = self.key_of.pop(page, None)
        if key is not None:
            del self.page_of[key]
