# SPDX-License-Identifier: Apache-2.0
"""Telling forges how builds stand: what was told is a column of the build, so a hub that was killed tells the rest."""

from __future__ import annotations

import time

import sqlalchemy as sa

from pysingularity import messages
from pysingularity.hub.builds.states import FINAL
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Build, Collection, now
from pysingularity.hub.sources.statuses import StatusError, forge_of, request_of, send, word_of

#: Builds older than this (seconds) are history that no forge waits for.
OLD = 86400.0
#: A report that was refused so often is given up; each further try waits twice as long.
TRIES = 6
GIVEN_UP = "refused"


class Reporter:
    """Sends reports, and remembers which ones have to wait for another try."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        #: build → (tries so far, when to try again)
        self._later: dict[int, tuple[int, float]] = {}

    def work(self) -> bool:
        """Send what is due; returns whether something was sent."""
        sent = False
        for build in self._due():
            tries, at = self._later.get(build.id, (0, 0.0))
            if at > time.monotonic():
                continue
            told = word_of(build.state)
            try:
                self._send(build)
            except StatusError as error:
                tries += 1
                self._later[build.id] = tries, time.monotonic() + 2.0**tries
                messages.warning(f"build {build.id}: {error.message}")
                if tries < TRIES:
                    continue
                told = GIVEN_UP
            self._later.pop(build.id, None)
            sent = True
            with self.hub.write() as session:
                session.execute(
                    sa.update(Build)
                    .where(Build.id == build.id)
                    .values(reported=told)
                    .execution_options(synchronize_session=False)
                )
        return sent

    def _due(self) -> list[Build]:
        over = Build.state.in_(FINAL)
        with self.hub.read() as session:
            query = (
                sa.select(Build)
                .join(Collection, Collection.id == Build.collection_id)
                .where(
                    Collection.status_token != "",
                    Build.created_at > now() - OLD,
                    sa.or_(sa.and_(over, Build.reported.in_(("", "pending"))), sa.and_(~over, Build.reported == "")),
                )
                .order_by(Build.id)
                .limit(100)
            )
            return list(session.scalars(query))

    def _send(self, build: Build) -> None:
        forge = forge_of(build.collection, self.hub.settings.sources)
        if forge is None:
            raise StatusError("no-forge", f"{build.collection.full_name}: the address does not tell the kind of forge")
        base = self.hub.settings.url.rstrip("/")
        page = f"{base}/{build.collection.full_name}/builds/{build.id}" if base else ""
        send(request_of(forge, build, token=build.collection.status_token, url=page))
