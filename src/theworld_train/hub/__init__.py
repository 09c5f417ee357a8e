"""The hub: what runs need of it, the lock file that pins it, and the local cache that training reads.

`fetch` alone uses the network. Everything else here looks at the disk and nowhere else.
"""

from theworld_train.hub.cache import check_lock, ensure_local
from theworld_train.hub.download import fetch
from theworld_train.hub.lock import (
    FETCH_HINT,
    LOCK_FILE,
    Lock,
    LockedDataset,
    LockedModel,
    pinned_revision,
    read_lock,
    write_lock,
)
from theworld_train.hub.repositories import Repository, pin_revisions, pin_rules, required_repositories

__all__ = [
    "FETCH_HINT",
    "LOCK_FILE",
    "Lock",
    "LockedDataset",
    "LockedModel",
    "Repository",
    "check_lock",
    "ensure_local",
    "fetch",
    "pin_revisions",
    "pin_rules",
    "pinned_revision",
    "read_lock",
    "required_repositories",
    "write_lock",
]
