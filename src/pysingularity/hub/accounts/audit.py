# SPDX-License-Identifier: Apache-2.0
"""The audit log: who changed what, written in the same transaction as the change."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from pysingularity.hub.accounts.rights import Principal
from pysingularity.hub.models import Audit


def record(session: Session, who: Principal | str, action: str, target: str = "", **details: Any) -> None:
    """Note a deed. `who` is a principal, or the name of a part of the hub ("command", "robot")."""
    name = who if isinstance(who, str) else who.name or "stranger"
    address = "" if isinstance(who, str) else who.address
    session.add(Audit(actor=name, action=action, target=target, details=details, address=address))
